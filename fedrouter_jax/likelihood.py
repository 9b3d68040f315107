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
from fedrouter_jax.models import DecoderConfig, hidden_states, logits
from fedrouter_jax.types import Array, LoRA, PyTree

ROWS = 32  # that are packed together


def of_pack(
    config: DecoderConfig,
    base: PyTree,
    pack: packing.Rows,
    lora: LoRA | None,
    gates: Array | None,
    *,
    dropout: float = 0.0,
    keys: Array | None = None,
    remat: bool = False,
) -> Array:
    """Cross-entropy of each response token of one pack (float32 [predicted], nats), 0 where `pack` predicts none.

    `pack` is one pack of `Rows`, without the pack axis; `gates` [time, rank] and `keys` [time] as for `hidden_states`.
    Only positions that predict a response token reach the head: with short answers that saves most of the head's work,
    a fifth of a small model's.
    """
    tokens, positions, segments, gates, keys = (
        None if field is None else field[None] for field in (*pack.packs, gates, keys)
    )
    hidden = hidden_states(
        config, base, tokens, positions, segments, lora, gates, dropout=dropout, keys=keys, remat=remat
    )[0]
    scores = logits(config, base, hidden[pack.where])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(scores, jnp.maximum(pack.labels, 0))
    return losses * (pack.labels >= 0)


@partial(jax.jit, static_argnames="config")
def _summed(config: DecoderConfig, base: PyTree, batch: packing.Batch, lora: LoRA | None, gates: Array | None) -> Array:
    """The cross-entropy of each row of one lane's `batch`, summed over its response (float32 [ROWS])."""

    def visit(index, total):
        pack = jax.tree.map(lambda field: field[index], batch.rows)
        losses = of_pack(config, base, pack, lora, None if gates is None else gates[pack.row])
        return total + jax.ops.segment_sum(losses, pack.row[pack.where], ROWS)

    return jax.lax.fori_loop(0, batch.count, visit, jnp.zeros(ROWS))


def losses(
    config: DecoderConfig,
    base: PyTree,
    rows: Sequence[Tokens],
    lora: LoRA | None,
    gates: np.ndarray | None,
    advance: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """The mean cross-entropy of the response tokens of each row, in nats a token: float32 [row].

    `gates` [row, rank] open adapters of `lora`; `advance` is called with the number of rows done.
    """
    found = np.zeros(len(rows), np.float32)
    if not len(rows):
        return found
    time, predicted = packing.shape([rows], ROWS, 1)
    for start in range(0, len(rows), ROWS):
        here = rows[start : start + ROWS]
        opened = None
        if gates is not None:
            opened = np.zeros((ROWS, gates.shape[1]), np.float32)
            opened[: len(here)] = gates[start : start + ROWS]
        batch = packing.batch([here], ROWS, time, predicted)
        summed = np.asarray(_summed(config, base, batch, lora, opened))[: len(here)]
        found[start : start + ROWS] = summed / [len(row.response) for row in here]
        advance(len(here))
    return found
