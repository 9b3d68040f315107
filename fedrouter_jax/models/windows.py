"""Attention that visits what its mask leaves: for each tile of queries, the keys from the first that any of them sees.

In a pack of many short texts that is half of what lies below the diagonal, or less (block-sparse attention, as in Dao
et al., "FlashAttention", NeurIPS 2022, arXiv 2205.14135). How many keys a tile needs is known only while the program
runs, so tiles go by one after the other, sorted by a few widths of windows. That suits a CPU; devices that want large
products have no use for it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedrouter_jax.models.matrices import product32
from fedrouter_jax.types import Array, PyTree

TILE = 32  # queries


@jax.custom_vjp
def attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Softmax attention of q over k, v [batch, kv_head, time, head_dim]; q and the result have a group axis.

    q [batch, kv_head, group, time, head_dim], mask bool [batch, 1, time, time]: causal, every index sees itself, and
    `TILE` divides the time.
    """
    return _forward(q, k, v, mask)[0]


def _visit(mask: Array, step: Callable[..., PyTree], total: PyTree) -> PyTree:
    """`step(pack, first query, first key, keys, total)` for every tile; how many keys is the same number for many."""
    batch, _, time, _ = mask.shape
    count = time // TILE
    sees = mask.reshape(batch, count, TILE, count, TILE).any(axis=(2, 4))
    needed = jnp.arange(1, count + 1) - jnp.argmax(sees, axis=-1)  # tiles of keys, up to the queries' own
    widths = [width for n in range(count.bit_length() + 1) for width in (2**n, 3 * 2**n // 2) if width < count]
    widths = sorted({*widths, count})
    which = jnp.searchsorted(jnp.array(widths), needed.ravel())
    order, ends = jnp.argsort(which), jnp.cumsum(jnp.bincount(which, length=len(widths)))
    for number, width in enumerate(widths):

        def turn(place, total, width=width):
            pack, tile = order[place] // count, order[place] % count
            return step(pack, tile * TILE, jnp.maximum(tile + 1 - width, 0) * TILE, width * TILE, total)

        total = jax.lax.fori_loop(ends[number - 1] if number else 0, ends[number], turn, total)
    return total


def _take(x: Array, pack: Array, first: Array, size: int) -> Array:
    """`size` of the indices of x [batch, ..., time, number] along its time, without the batch."""
    middle = x.ndim - 3
    starts, sizes = (pack, *[0] * middle, first, 0), (1, *x.shape[1:-2], size, x.shape[-1])
    return jax.lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)[0]


def _put(x: Array, part: Array, pack: Array, first: Array) -> Array:
    """x with `part` in the place that `_take` reads."""
    starts = (pack, *[0] * (x.ndim - 3), first, 0)
    return jax.lax.dynamic_update_slice(x, part[None].astype(x.dtype), starts, allow_negative_indices=False)


def _scores(q: Array, k: Array, mask: Array, pack: Array, first: Array, start: Array) -> Array:
    """Masked scores (float32 [kv_head, group, query, key]) of a tile against a window of keys."""
    sees = jax.lax.dynamic_slice(mask, (pack, 0, first, start), (1, 1, q.shape[-2], k.shape[-2]))[0]
    return jnp.where(sees, product32("kgqd,ksd->kgqs", q, k) * q.shape[-1] ** -0.5, -jnp.inf)


def _forward(q, k, v, mask):
    ones = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)  # as in attention.py: sums of the softmax

    def step(pack, first, start, size, total):
        output, sums = total
        scores = _scores(_take(q, pack, first, TILE), _take(k, pack, start, size), mask, pack, first, start)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top).astype(v.dtype)
        mixed = product32("kgqs,ksd->kgqd", weights, _take(ones, pack, start, size))
        output = _put(output, mixed[..., :-1] / mixed[..., -1:], pack, first)
        return output, _put(sums, top + jnp.log(mixed[..., -1:]), pack, first)

    empty = (jnp.zeros(q.shape, v.dtype), jnp.zeros((*q.shape[:-1], 1), jnp.float32))
    output, sums = _visit(mask, step, empty)
    return output, (q, k, v, mask, sums)


def _backward(kept, gradient):
    """The softmax again from the sums it had."""
    q, k, v, mask, sums = kept

    def step(pack, first, start, size, total):
        dq, dk, dv = total
        tile, above, norm = (_take(x, pack, first, TILE) for x in (q, gradient, sums))
        keys = _take(k, pack, start, size)
        weights = jnp.exp(_scores(tile, keys, mask, pack, first, start) - norm)
        of_v = product32("kgqs,kgqd->ksd", weights.astype(v.dtype), above)
        slopes = weights * product32("kgqd,ksd->kgqs", above, _take(v, pack, start, size))
        level = jnp.sum(slopes, axis=-1, keepdims=True)
        slopes = ((slopes - weights * level) * q.shape[-1] ** -0.5).astype(k.dtype)
        of_k = product32("kgqs,kgqd->ksd", slopes, tile)
        dk = _put(dk, _take(dk, pack, start, size) + of_k, pack, start)
        dv = _put(dv, _take(dv, pack, start, size) + of_v, pack, start)
        return _put(dq, product32("kgqs,ksd->kgqd", slopes, keys), pack, first), dk, dv

    nothing = (jnp.zeros_like(q), jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    dq, dk, dv = _visit(mask, step, nothing)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


attention.defvjp(_forward, jax.named_scope("attention")(_backward))
