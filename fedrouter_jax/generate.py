"""Greedy answers with a KV cache, a different adapter for every row of a batch.

Rows are right-padded: each row's cache grows from its own end, so there is no left padding to mask and positions are
the real ones. Adapters are chosen by gates over the rank-concatenated bank, so a mixed batch is one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedrouter_jax.models import DecoderConfig, decode_step, logits, prefill
from fedrouter_jax.types import Array, LoRA, PyTree


@partial(jax.jit, static_argnames=("config", "stop", "new_tokens"))
def greedy(
    config: DecoderConfig,
    base: PyTree,
    tokens: Array,
    lengths: Array,
    lora: LoRA | None,
    gates: Array | None,
    *,
    stop: int,
    new_tokens: int,
) -> Array:
    """Greedy continuations, int32 [row, new_tokens]; from the first `stop` token on, every token is `stop`.

    `tokens` int32 [row, time] right-padded, `lengths` int32 [row], `gates` float32 [row, rank]. A row of length 0 is
    padding: it is finished from the start. Stops early once every row has.
    """
    rows = jnp.arange(tokens.shape[0])
    hidden, cache = prefill(config, base, tokens, jnp.maximum(lengths, 1), tokens.shape[1] + new_tokens, lora, gates)
    scores = logits(config, base, hidden[rows, jnp.maximum(lengths, 1) - 1])
    first = jnp.where(lengths > 0, jnp.argmax(scores, axis=-1).astype(jnp.int32), stop)
    answer = jnp.full((tokens.shape[0], new_tokens), stop, jnp.int32).at[:, 0].set(first)

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
    rows_at_once: int = 32,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[list[int]]:
    """Answers to token id prompts, without the stop token, in the order given.

    Prompts of similar length share a batch, padded to a multiple of 64, so few shapes are compiled.
    `gates` is [prompt, rank]; `advance` is called with the number of rows done.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for here, tokens, lengths, gate in batches(prompts, gates, rows_at_once):
        found = greedy(config, base, tokens, lengths, lora, gate, stop=stop, new_tokens=new_tokens)
        for index, answer in zip(here, np.asarray(found).tolist(), strict=False):
            answers[index] = answer[: answer.index(stop)] if stop in answer else answer
        advance(len(here))
    return answers


def batches(
    prompts: Sequence[Sequence[int]], gates: np.ndarray | None, rows_at_once: int
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray, np.ndarray | None]]:
    """Right-padded batches of prompts of similar length: which prompts, tokens, lengths, gates.

    Every batch has `rows_at_once` rows; those past the prompts have length 0. Time is a multiple of 64.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for start in range(0, len(order), rows_at_once):
        here = order[start : start + rows_at_once]
        time = -(-len(prompts[here[-1]]) // 64) * 64
        tokens = np.zeros((rows_at_once, time), np.int32)
        lengths = np.zeros(rows_at_once, np.int32)
        for row, index in enumerate(here):
            lengths[row] = len(prompts[index])
            tokens[row, : lengths[row]] = prompts[index]
        gate = None if gates is None else np.pad(gates[here], [(0, rows_at_once - len(here)), (0, 0)])
        yield here, tokens, lengths, gate
