"""Greedy answers with a KV cache, a different adapter for every row of a batch.

Prompts are read in packs, many short ones side by side, so that hardly any compute goes to padding; their keys and
values are then dealt to a cache with a line for each row. There is no left padding to mask, and positions are the real
ones. Adapters are chosen by gates over the rank-concatenated bank, so a mixed batch is one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedrouter_jax.data import packing
from fedrouter_jax.models import DecoderConfig, decode_step, empty_cache, logits, prefill
from fedrouter_jax.types import Array, LoRA, PyTree


@partial(jax.jit, static_argnames=("config", "slots", "stop", "new_tokens"))
def greedy(
    config: DecoderConfig,
    base: PyTree,
    packs: packing.Packs,
    owner: Array,
    turns: Array,
    lengths: Array,
    lora: LoRA | None,
    gates: Array | None,
    *,
    slots: int,
    stop: int,
    new_tokens: int,
) -> Array:
    """Greedy continuations, int32 [row, new_tokens]; from the first `stop` token on, every token is `stop`.

    The prompts lie in `packs` [turn, pack, time], of which the first `turns` (int32 []) are filled, and are of at most
    `slots` tokens; `owner` int32 [turn, pack, time] is the row of a token, past the last for padding. `lengths` int32
    [row], `gates` float32 [row, rank]. A row of length 0 is padding: it is finished from the start. Stops early once
    every row has.
    """
    rows, dtype = len(lengths), base["embedding"].dtype

    def read(turn, carry):
        last, cache = carry
        here, of = jax.tree.map(lambda leaf: leaf[turn], (packs, owner))
        gate = None if gates is None else gates[of]
        hidden, cache = prefill(config, base, *here, of, cache, lora, gate)
        ends = jnp.where(here.positions + 1 == lengths[of], of, rows)
        return last.at[ends].set(hidden, mode="drop"), cache

    empty = jnp.zeros((rows, config.width), dtype), empty_cache(config, rows, slots, new_tokens, dtype)
    last, cache = jax.lax.fori_loop(0, turns, read, empty)
    first = jnp.argmax(logits(config, base, last), axis=-1).astype(jnp.int32)
    first = jnp.where(lengths > 0, first, stop)
    answer = jnp.full((rows, new_tokens), stop, jnp.int32).at[:, 0].set(first)

    def unfinished(carry):
        step, latest, _, _ = carry
        return (step < new_tokens) & jnp.any(latest != stop)

    def advance(carry):
        step, latest, answer, cache = carry
        hidden, cache = decode_step(config, base, latest, cache, lora, gates)
        best = jnp.argmax(logits(config, base, hidden), axis=-1).astype(jnp.int32)
        latest = jnp.where(latest == stop, stop, best)
        return step + 1, latest, answer.at[:, step].set(latest), cache

    return jax.lax.while_loop(unfinished, advance, (jnp.ones((), jnp.int32), first, answer, cache))[2]


def generate(
    config: DecoderConfig,
    base: PyTree,
    prompts: Sequence[Sequence[int]],
    lora: LoRA | None,
    gates: np.ndarray | None,
    *,
    stop: int,
    new_tokens: int,
    rows_at_once: int = 64,
    packs_at_once: int = 1,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[list[int]]:
    """Answers to token id prompts, without the stop token, in the order given.

    Prompts of similar length answer together, at most `rows_at_once`; `packs_at_once` packs of prompts go through the
    model together. `gates` is [prompt, rank]; `advance` is called with the number of rows done. Batches are as even as
    can be, and the longest prompt of one counts as a multiple of 64, so few shapes are compiled.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return answers
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    batches = -(-len(order) // rows_at_once)
    rows = min(rows_at_once, -(-len(order) // batches // 8) * 8)
    time = packing.pack_length(max(map(len, prompts)))
    turns = -(-rows // packs_at_once)  # every prompt may need a pack of its own
    for here in np.array_split(np.array(order), batches):
        texts = [prompts[i] for i in here]
        assignment = packing.first_fit([(len(text), 0) for text in texts], time, 0, rows)
        packs = packing.lay_out(texts, assignment, turns * packs_at_once, time)
        owner = packing.owners(packs, assignment, rows)
        packs, owner = jax.tree.map(lambda leaf: leaf.reshape(turns, packs_at_once, time), (packs, owner))
        spare = (0, rows - len(here))
        found = greedy(
            config, base, packs, owner, np.int32(-(-len(assignment) // packs_at_once)),
            np.pad(np.array([len(text) for text in texts], np.int32), spare),
            lora, None if gates is None else np.pad(gates[here], [spare, (0, 0)]),
            slots=-(-max(map(len, texts)) // 64) * 64, stop=stop, new_tokens=new_tokens,
        )  # fmt: skip
        for index, answer in zip(here, np.asarray(found).tolist(), strict=False):
            answers[index] = answer[: answer.index(stop)] if stop in answer else answer
        advance(len(here))
    return answers
