"""Embedding texts with the frozen base model: mean over tokens of a hidden state.

FedRouter (arXiv 2604.00050) embeds the bare instruction with the last layer after the final norm; an inner layer
costs less and separates more tasks (`routing.RECIPES`). There, however, the state of the first token may be a hundred
times as long as any other, an attention sink (Xiao et al., ICLR 2024, arXiv 2309.17453; Sun et al., "Massive
Activations in Large Language Models", COLM 2024, arXiv 2402.17762). It is much the same in all texts, so a mean that
holds it says above all over how many tokens it was taken. `skip` leaves it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedrouter_jax.data import packing
from fedrouter_jax.models import DecoderConfig, first_blocks, hidden_states
from fedrouter_jax.types import Advance, Array, LoRA, PyTree, unseen

TEXTS_PER_PACK = 32
_WINDOW = 512  # texts that are packed together: packing costs the square of them


@partial(jax.jit, static_argnames=("config", "final_norm", "last", "skip"))
def pooled(
    config: DecoderConfig,
    base: PyTree,
    packs: packing.Packs,
    lora: LoRA | None,
    gates: Array | None,
    final_norm: bool,
    last: bool,
    skip: int,
) -> Array:
    """A state of each text, float32 [pack, TEXTS_PER_PACK, width]; zero where a pack has no such text.

    The mean over tokens without the first `skip`, where there are more, or with `last` that of the last token, under
    `lora` with `gates` [pack, TEXTS_PER_PACK, rank].
    """
    member = jax.nn.one_hot(packs.segments - 1, TEXTS_PER_PACK)
    gates = None if gates is None else jnp.einsum("pts,psr->ptr", member, gates)
    hidden = hidden_states(config, base, *packs, lora, gates, final_norm=final_norm)
    place, length = packs.positions[..., None], member.sum(axis=1, keepdims=True)
    if last:
        member = jnp.where(place == length - 1, member, 0)
    elif skip:
        member = jnp.where((place >= skip) | (length <= skip), member, 0)
    sums = jnp.einsum("ptw,pts->psw", hidden.astype(jnp.float32), member, precision="highest")
    return sums / jnp.maximum(member.sum(axis=1), 1)[..., None]


def blocks(config: DecoderConfig, depth: float | None) -> int:
    """How many blocks a share of them is; None: all."""
    return config.layers if depth is None else max(1, round(depth * config.layers))


def embed(
    config: DecoderConfig,
    base: PyTree,
    texts: Sequence[Sequence[int]],
    depth: float | None,
    packs_at_once: int = 1,
    advance: Advance = unseen,
    *,
    lora: LoRA | None = None,
    gates: np.ndarray | None = None,
    last: bool = False,
    skip: int = 0,
) -> np.ndarray:
    """Embeddings float32 [text, width] of token id lists: means over tokens, or with `last` the last token's states.

    The first `skip` tokens of a text do not count, unless it has no others.

    `depth` is the share of the blocks to run (None: all and the final norm); at most `packs_at_once` packs go through
    the model together; `advance` is called with the number of texts done. `gates` [text, rank] open adapters of `lora`.
    """
    if not texts:
        return np.zeros((0, config.width), np.float32)
    if depth is not None:  # here, for a program would copy these blocks out of all in every call
        config, base, lora = first_blocks(config, base, lora, blocks(config, depth))
    sizes = [len(text) for text in texts]
    time = packing.pack_length(max(sizes))
    if len(texts) <= _WINDOW:
        time = packing.fitted_length(sizes, TEXTS_PER_PACK, packs_at_once)
    assignment = [
        [start + row for row in rows]
        for start in range(0, len(texts), _WINDOW)
        for rows in packing.first_fit([(n, 0) for n in sizes[start : start + _WINDOW]], time, 0, TEXTS_PER_PACK)
    ]
    packs_at_once = packing.packs_of_a_turn([len(assignment)], packs_at_once)
    embeddings = np.zeros((len(texts), config.width), np.float32)
    for start in range(0, len(assignment), packs_at_once):
        here = assignment[start : start + packs_at_once]
        packs = packing.lay_out(texts, here, packs_at_once, time)
        opened = None
        if gates is not None:
            opened = np.zeros((packs_at_once, TEXTS_PER_PACK, gates.shape[1]), np.float32)
            for pack, rows in enumerate(here):
                opened[pack, : len(rows)] = gates[rows]
        states = np.asarray(pooled(config, base, packs, lora, opened, depth is None, last, skip))
        for pack, rows in enumerate(here):
            embeddings[rows] = states[pack, : len(rows)]
        advance(sum(map(len, here)))
    return embeddings
