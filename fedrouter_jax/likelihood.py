"""How likely the model finds given responses: the cross-entropy of their tokens, in packs of many rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedrouter_jax.data import packing
from fedrouter_jax.data.tokens import Tokens
from fedrouter_jax.models import LOOP, Blocks, DecoderConfig, hidden_states, logits
from fedrouter_jax.types import Advance, Array, LoRA, PyTree, unseen

ROWS = 32  # that are packed together, for each pack of those that are read at once


def of_packs(
    config: DecoderConfig,
    base: PyTree,
    rows: packing.Rows,
    lora: LoRA | None,
    gates: Array | None,
    *,
    dropout: float = 0.0,
    keys: Array | None = None,
    blocks: Blocks = LOOP,
) -> Array:
    """Cross-entropy of each response token of some packs (float32 [pack, predicted], nats), 0 where none is predicted.

    `gates` [pack, time, rank] and `keys` [pack, time] are as for `hidden_states`. Only positions that predict a
    response token reach the head: with short answers that saves most of the head's work, a fifth of a small model's.
    """
    hidden = hidden_states(config, base, *rows.packs, lora, gates, dropout=dropout, keys=keys, blocks=blocks)
    with jax.named_scope("loss"):
        scores = logits(config, base, hidden.reshape(-1, config.width)[flat(rows)])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(scores, jnp.maximum(rows.labels, 0))
        return losses * (rows.labels >= 0)


def flat(rows: packing.Rows) -> Array:
    """`rows.where` counted through all packs: int32 [pack, predicted]."""
    packs, time = rows.lane.shape
    return rows.where + time * jnp.arange(packs)[:, None]


def fold(
    rows: packing.Rows, count: Array, at_once: int, visit: Callable[[PyTree, packing.Rows], PyTree], start: PyTree
):
    """`visit(total, packs) -> total` over the first `count` (int32 []) packs of `rows`, `at_once` at a time.

    Empty packs after the last one are visited with it.
    """
    packs = rows.lane.shape[0]
    size = min(at_once, packs)
    if missing := -packs % size:
        labels = rows.labels
        rows = jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)), rows)
        rows = rows._replace(labels=jnp.pad(labels, ((0, missing), (0, 0)), constant_values=-1))

    def turn(index, total):
        here = (jax.lax.dynamic_slice_in_dim(leaf, index * size, size) for leaf in leaves)
        return visit(total, jax.tree.unflatten(tree, here))

    leaves, tree = jax.tree.flatten(rows)
    return jax.lax.fori_loop(0, -(-count // size), turn, start)


@partial(jax.jit, static_argnames=("config", "packs_at_once"))
def _summed(
    config: DecoderConfig,
    base: PyTree,
    batch: packing.Batch,
    lora: LoRA | None,
    gates: Array | None,
    packs_at_once: int,
) -> Array:
    """The cross-entropy of each row of one lane's `batch`, summed over its response (float32 [row])."""
    count = batch.rows.lane.shape[0]  # every row may need a pack

    def visit(total, rows):
        losses = of_packs(config, base, rows, lora, None if gates is None else gates[rows.row])
        return total + jax.ops.segment_sum(losses.ravel(), jnp.take_along_axis(rows.row, rows.where, 1).ravel(), count)

    return fold(batch.rows, batch.count, packs_at_once, visit, jnp.zeros(count))


def losses(
    config: DecoderConfig,
    base: PyTree,
    rows: Sequence[Tokens],
    lora: LoRA | None,
    gates: np.ndarray | None,
    packs_at_once: int = 1,
    advance: Advance = unseen,
) -> np.ndarray:
    """The mean cross-entropy of the response tokens of each row, in nats a token: float32 [row].

    `gates` [row, rank] open adapters of `lora`; `advance` is called with the number of rows done; `packs_at_once` packs
    go through the model together.
    """
    found = np.zeros(len(rows), np.float32)
    if not len(rows):
        return found
    size = ROWS * packs_at_once
    time, predicted = packing.shape([rows], size, 1)
    for start in range(0, len(rows), size):
        here = rows[start : start + size]
        opened = None
        if gates is not None:
            opened = np.zeros((size, gates.shape[1]), np.float32)
            opened[: len(here)] = gates[start : start + size]
        batch = packing.batch([here], size, time, predicted)
        summed = np.asarray(_summed(config, base, batch, lora, opened, packs_at_once))[: len(here)]
        found[start : start + size] = summed / [len(row.response) for row in here]
        advance(len(here))
    return found
