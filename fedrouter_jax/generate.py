"""Greedy answers with a KV cache, a different adapter for every row of a batch.

Prompts are read in packs, many short ones side by side, so that hardly any compute goes to padding; their keys and
values are then dealt to a cache with a line for each row. There is no left padding to mask, and positions are the real
ones. Adapters are chosen by gates over the rank-concatenated bank, so a mixed batch is one forward pass.

Tasks differ in how long their answers are, and a batch of all tasks would wait for the longest. So a row that has
finished takes the next prompt while the others go on (continuous batching, Yu et al., OSDI 2022), and when no prompt is
left, the batch shrinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from fedrouter_jax import models
from fedrouter_jax.data import packing
from fedrouter_jax.models import DecoderConfig
from fedrouter_jax.types import Advance, Array, LoRA, PyTree, unseen

_BLOCK = 128  # scores; a divisor of the vocabularies of the models we know
_FEWEST = 16  # the fewest rows of a batch that has shrunk


class Answering(NamedTuple):
    """Rows that are being answered, each at a token of its own."""

    cache: models.Cache
    latest: Array  # int32 [row]: the last token, `stop` when the row has finished
    answer: Array  # int32 [row, new_tokens], `stop` where nothing is written


def best_token(scores: Array) -> Array:
    """The place of the highest of `scores` [row, token], the first of equal ones: int32 [row].

    The highest block of tokens, then the highest in it: XLA's argmax on CPUs compares one score after the other, its
    maximum a vector at a time.
    """
    rows, tokens = scores.shape
    blocks = jnp.pad(scores, ((0, 0), (0, -tokens % _BLOCK)), constant_values=-jnp.inf).reshape(rows, -1, _BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * _BLOCK + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


@partial(jax.jit, static_argnames=("config", "stop"), donate_argnames="state")
def prefill(
    config: DecoderConfig,
    base: PyTree,
    packs: packing.Packs,
    owner: Array,
    turns: Array,
    lengths: Array,
    pages: tuple[Array, Array],
    state: Answering,
    lora: LoRA | None,
    gates: Array | None,
    *,
    stop: int,
) -> Answering:
    """Reads a prompt into each row with a length, and writes the first token there. The other rows stay as they are.

    The prompts lie in `packs` [turn, pack, time], of which the first `turns` (int32 []) are filled; `owner` int32
    [turn, pack, time] is the row of a token, past the last for padding. `lengths` int32 [row], 0 for rows without a
    prompt; `pages` are the cache's `owner` and `start` with these prompts in it; `gates` float32 [row, rank].
    """
    rows, new = state.answer.shape

    def turn(number, carry):
        last, cache = carry
        here, of = jax.tree.map(lambda leaf: leaf[number], (packs, owner))
        gate = None if gates is None else gates[of]
        hidden, cache = models.prefill(config, base, *here, of, cache, lora, gate)
        ends = jnp.where(here.positions + 1 == lengths[of], of, rows)
        return last.at[ends].set(hidden, mode="drop"), cache

    fresh = lengths > 0
    last = jnp.zeros((rows, config.width), base["norm"].dtype)
    last, cache = jax.lax.fori_loop(0, turns, turn, (last, models.reuse_rows(state.cache, fresh, *pages)))
    first = best_token(models.logits(config, base, last))
    answer = jnp.full((rows, new), stop, jnp.int32).at[:, 0].set(first)
    latest = jnp.where(fresh, first if new > 1 else stop, state.latest)
    return Answering(cache, latest, jnp.where(fresh[:, None], answer, state.answer))


@partial(jax.jit, static_argnames=("config", "stop"), donate_argnames="state")
def decode(
    config: DecoderConfig,
    base: PyTree,
    few: Array,
    state: Answering,
    lora: LoRA | None,
    gates: Array | None,
    *,
    stop: int,
) -> Answering:
    """Writes a token in each row, again and again, until at most `few` (int32 []) rows are unfinished.

    A row finishes with its first `stop` token, or when its answer is full.
    """
    rows, new = state.answer.shape

    def unfinished(state):
        return jnp.sum(state.latest != stop) > few

    def advance(state):
        place = state.cache.written - state.cache.began + 1
        hidden, cache = models.decode_step(config, base, state.latest, state.cache, lora, gates)
        best = best_token(models.logits(config, base, hidden))
        best = jnp.where(state.latest == stop, stop, best)
        answer = state.answer.at[jnp.arange(rows), place].set(best, mode="drop")
        return Answering(cache, jnp.where(place + 1 < new, best, stop), answer)

    return jax.lax.while_loop(unfinished, advance, state)


@jax.jit
def select(state: Answering, rows: Array, pages: Array, owner: Array, start: Array) -> Answering:
    """These `rows` (int32 [row]) and `pages` (int32 [page]) alone; `owner` and `start` are those of the pages."""
    cache = models.select_rows(state.cache, rows, pages, owner, start)
    return Answering(cache, state.latest[rows], state.answer[rows])


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
    shrinks: bool = True,
    where: Sharding | None = None,
    advance: Advance = unseen,
) -> list[list[int]]:
    """Answers to token id prompts, without the stop token, in the order given.

    At most `rows_at_once` prompts are answered side by side, the longest first; at most `packs_at_once` packs of
    prompts go through the model together. `gates` is [prompt, rank]; `advance` is called with the number of rows done.
    Finished rows take the next prompts once they are a quarter of all; these are shorter, so the pages that are free
    hold them.
    Keys and values lie `where` that says, by default on the first device.
    Few shapes are compiled: a cache that `shrinks` does so to half its rows or pages at least. Not to is for devices
    whose programs take long to compile.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return answers
    sizes = np.array([len(prompt) for prompt in prompts])
    needs = -(-sizes // models.PAGE)
    waiting = sorted(range(len(prompts)), key=lambda i: (sizes[i], -i))  # the longest last: the next to be taken
    rows = min(rows_at_once, -(-len(prompts) // 8) * 8)
    time = packing.pack_length(int(sizes.max()))
    first = packing.first_fit([(sizes[i], 0) for i in waiting[-rows:]], time, 0, rows)
    packs_at_once = packing.packs_of_a_turn([len(first)], packs_at_once)
    held = np.full(rows, -1)  # the prompt that each row answers
    owner = np.full(_pages(needs[waiting[-rows:]].sum(), 32 if shrinks else rows), rows, np.int32)  # of each page
    start = np.zeros_like(owner)
    state = Answering(
        models.empty_cache(config, rows, owner, start, new_tokens, base["embedding"].dtype, where),
        *jax.device_put((np.full(rows, stop, np.int32), np.full((rows, new_tokens), stop, np.int32)), where),
    )
    while waiting or (held >= 0).any():
        if waiting:  # as many rows are free as are to be filled
            free = np.flatnonzero(held < 0)[: len(waiting)]
            held[free] = [waiting.pop() for _ in free]
            owner, start = _dealt(owner, start, held, free, needs)
            turn = _packed(prompts, held, free, time, packs_at_once)
            state = prefill(config, base, *turn, (owner, start), state, lora, _of(gates, held), stop=stop)

        live = np.flatnonzero(held >= 0)
        half = not waiting and len(live) <= _half(rows)
        enough = _pages(needs[held[live]].sum(), 32)
        if shrinks and (half or enough <= len(owner) // 2):
            kept = np.argsort(held < 0, kind="stable")[: rows // 2 if half else rows]
            pages = np.argsort(~np.isin(owner, live), kind="stable")[:enough]
            place = np.full(rows + 1, len(kept), np.int32)
            place[live] = np.searchsorted(kept[: len(live)], live)
            held, rows, owner, start = held[kept], len(kept), place[owner[pages]], start[pages]
            state = select(state, kept, pages, owner, start)

        if waiting:
            few = rows - min(max(1, rows // 4), len(waiting))
        else:
            few = _half(rows) if shrinks else 0
        state = decode(config, base, np.int32(few), state, lora, _of(gates, held), stop=stop)
        latest, written = np.asarray(state.latest), np.asarray(state.answer).tolist()
        done = np.flatnonzero((held >= 0) & (latest == stop))
        for row in done:
            answers[held[row]] = written[row][: written[row].index(stop)] if stop in written[row] else written[row]
        held[done] = -1
        advance(len(done))
    return answers


def _half(rows: int) -> int:
    """Half the rows of a batch; 0 where a program for so few would take longer to compile than it saves."""
    return rows // 2 if rows // 2 >= _FEWEST else 0


def _pages(count: int, step: int) -> int:
    """Pages of a cache that holds so many: few sizes, multiples of `step`, so few shapes."""
    return -(-int(count) // step) * step


def _dealt(owner: np.ndarray, start: np.ndarray, held: np.ndarray, free: np.ndarray, needs: np.ndarray):
    """`owner` and `start` of the cache's pages when the rows `free` have taken the prompts they hold."""
    others = np.setdiff1d(np.flatnonzero(held >= 0), free)
    owner = np.where(np.isin(owner, others), owner, len(held)).astype(np.int32)
    taken = np.flatnonzero(owner == len(held))[: needs[held[free]].sum()]
    start = start.copy()
    owner[taken] = np.repeat(free, needs[held[free]])
    start[taken] = np.concatenate([np.arange(needs[held[row]]) for row in free]) * models.PAGE
    return owner, start


def _of(gates: np.ndarray | None, held: np.ndarray) -> np.ndarray | None:
    """The gates of the prompts in the rows; those of a row without one do not matter."""
    return None if gates is None else gates[held]


def _packed(prompts: Sequence[Sequence[int]], held: np.ndarray, free: np.ndarray, time: int, packs_at_once: int):
    """The arguments of `prefill` for the prompts that the rows `free` hold: packs, owner, turns, lengths."""
    texts = [prompts[i] for i in held[free]]
    assignment = packing.first_fit([(len(text), 0) for text in texts], time, 0, len(texts))
    turns = -(-len(held) // packs_at_once)  # every prompt may need a pack of its own
    packs = packing.lay_out(texts, assignment, turns * packs_at_once, time)
    owner = packing.owners(packs, [free[pack].tolist() for pack in assignment], len(held))
    packs, owner = jax.tree.map(lambda leaf: leaf.reshape(turns, packs_at_once, time), (packs, owner))
    lengths = np.zeros(len(held), np.int32)
    lengths[free] = [len(text) for text in texts]
    return packs, owner, np.int32(-(-len(assignment) // packs_at_once)), lengths
