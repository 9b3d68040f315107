"""Embedding texts with the frozen base model: mean over tokens of a hidden state.

FedRouter (arXiv 2604.00050) embeds the bare instruction with the last layer after the final norm; an inner layer
costs less and separates more tasks (`routing.RECIPES`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedrouter_jax.data import packing
from fedrouter_jax.models import DecoderConfig, hidden_states
from fedrouter_jax.types import Array, LoRA, PyTree

TEXTS_PER_PACK = 32


@partial(jax.jit, static_argnames=("config", "layers"))
def pooled(config: DecoderConfig, base: PyTree, packs: packing.Packs, layers: int | None) -> Array:
    """Mean hidden state of each text, float32 [pack, TEXTS_PER_PACK, width]; zero where a pack has no such text.

    `layers` blocks are run (None: all, then the final norm).
    """
    hidden = hidden_states(config, base, *packs, layers=layers, final_norm=layers is None).astype(jnp.float32)
    member = jax.nn.one_hot(packs.segments - 1, TEXTS_PER_PACK)
    sums = jnp.einsum("ptw,pts->psw", hidden, member)
    return sums / jnp.maximum(member.sum(axis=1), 1)[..., None]


def embed(
    config: DecoderConfig,
    base: PyTree,
    texts: Sequence[Sequence[int]],
    depth: float | None,
    packs_at_once: int = 1,
    advance: Callable[[int], None] = lambda texts: None,
) -> np.ndarray:
    """Embeddings float32 [text, width] of token id lists.

    `depth` is the share of the blocks to run (None: all and the final norm); `packs_at_once` packs go through the
    model together; `advance` is called with the number of texts done.
    """
    layers = None if depth is None else max(1, round(depth * config.layers))
    time = pack_length(max(map(len, texts)))
    assignment = packing.first_fit([(len(text), 0) for text in texts], time, 0, TEXTS_PER_PACK)
    embeddings = np.zeros((len(texts), config.width), np.float32)
    for start in range(0, len(assignment), packs_at_once):
        here = assignment[start : start + packs_at_once]
        means = np.asarray(pooled(config, base, packing.lay_out(texts, here, packs_at_once, time), layers))
        for pack, rows in enumerate(here):
            embeddings[rows] = means[pack, : len(rows)]
        advance(sum(map(len, here)))
    return embeddings


@partial(jax.jit, static_argnames="config")
def last_states(
    config: DecoderConfig, base: PyTree, tokens: Array, lengths: Array, lora: LoRA | None, gates: Array | None
) -> Array:
    """The hidden state after the final norm at the last token of right-padded rows: float32 [row, width].

    `tokens` int32 [row, time], `lengths` int32 [row], `gates` float32 [row, rank].
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = hidden_states(config, base, tokens, positions, None, lora, gates)
    return hidden[jnp.arange(len(tokens)), jnp.maximum(lengths, 1) - 1].astype(jnp.float32)


def pack_length(longest: int, least: int = 256) -> int:
    """The static length of packs: a multiple of 128 that holds the longest row, at least `least`.

    Longer packs waste less on their tail; attention inside a pack grows with the square, so not longer than needed.
    """
    return max(least, -(-longest // 128) * 128)
