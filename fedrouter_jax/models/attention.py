"""Attention among packed tokens, with a backward pass of its own: on a CPU several times as fast as
`jax.nn.dot_product_attention`, against which it is tested. On an NVIDIA GPU cuDNN's kernel takes its place in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from fedrouter_jax.models.config import DecoderConfig
from fedrouter_jax.types import Array

_QUERIES = 64  # of one tile
product32 = partial(jnp.einsum, preferred_element_type=jnp.float32)


def attention_mask(config: DecoderConfig, segments: Array) -> Array:
    """Which index sees which: bool [batch, 1, time, time] from segments int [batch, time].

    Causal, inside one segment and inside the sliding window. Every index sees itself, padding too, so that no row
    of the softmax is empty.
    """
    time = jnp.arange(segments.shape[1])
    ago = time[:, None] - time[None, :]
    near = ago >= 0 if config.sliding_window is None else (ago >= 0) & (ago < config.sliding_window)
    return (near & (segments[:, :, None] == segments[:, None, :]))[:, None]


@jax.named_scope("attention")
def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Causal attention [batch, time, head * head_dim] of q [batch, time, head, head_dim] over k, v [.., kv_head, ..].

    Queries go by in tiles, each against the keys up to its own end: that skips the keys a causal mask hides anyway,
    and a tile's scores stay in cache. Products are of operands in the dtype of q, k and v, summed in float32.
    """
    batch, time, heads, size = q.shape
    fits = q.dtype == jnp.bfloat16 and time % 8 == 0 and size % 8 == 0 and size <= 128
    if fits and by_cudnn():  # one kernel, where tiles are ninety
        return _fused(q, k, v, mask).reshape(batch, time, -1)
    kv_heads = k.shape[2]
    q = q.reshape(batch, time, kv_heads, -1, size).transpose(0, 2, 3, 1, 4)
    mixed = _attention(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads * size)


def compute_capability() -> str:
    """A version of NVIDIA's for their devices, a name for AMD's, nothing for others."""
    return str(getattr(jax.local_devices()[0], "compute_capability", ""))


def by_cudnn() -> bool:
    """Whether the device has cuDNN's attention: an NVIDIA GPU of compute capability 8.0 or more.

    Where JAX's partitioner has a part of a round (`mesh.by_hand`), it cannot divide the kernel.
    """
    capability = compute_capability().split(".")[0]
    return capability.isdigit() and int(capability) >= 8 and not jax.sharding.get_abstract_mesh().auto_axes


def _tiles(time: int) -> list[tuple[int, int]]:
    return [(start, min(start + _QUERIES, time)) for start in range(0, time, _QUERIES)]


def _scores(q: Array, k: Array, mask: Array) -> Array:
    """Masked scores (float32) of a tile of queries against the keys up to its end."""
    scores = product32("bkgqd,bksd->bkgqs", q, k) * q.shape[-1] ** -0.5
    return jnp.where(mask[:, :, None], scores, -jnp.inf)


def _add(total: Array, part: Array) -> Array:
    """A part of the first keys added to the sum of all."""
    return jax.lax.dynamic_update_slice(total, total[:, :, : part.shape[2]] + part, (0, 0, 0, 0))


@jax.custom_vjp
def _attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """q, result [batch, kv_head, group, time, head_dim]; k, v [batch, kv_head, time, head_dim]."""
    return _attention_forward(q, k, v, mask)[0]


def _attention_forward(q, k, v, mask):
    # A column of ones beside the values sums the softmax in the same product, so that scores are divided after mixing,
    # head_dim numbers a query and not one a key.
    ones = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    outputs, sums = [], []
    for start, end in _tiles(q.shape[3]):
        scores = _scores(q[:, :, :, start:end], k[:, :, :end], mask[:, :, start:end, :end])
        top = jnp.max(scores, axis=-1, keepdims=True)
        mixed = product32("bkgqs,bksd->bkgqd", jnp.exp(scores - top).astype(v.dtype), ones[:, :, :end])
        outputs.append(mixed[..., :-1] / mixed[..., -1:])
        sums.append(top + jnp.log(mixed[..., -1:]))
    return jnp.concatenate(outputs, axis=3).astype(v.dtype), (q, k, v, mask, sums)


@jax.named_scope("attention")
def _attention_backward(kept, gradient):
    """As in FlashAttention (Dao et al., NeurIPS 2022, arXiv 2205.14135): the softmax again, from the sums it had."""
    q, k, v, mask, sums = kept
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for (start, end), total in zip(_tiles(q.shape[3]), sums, strict=True):
        tile, above = q[:, :, :, start:end], gradient[:, :, :, start:end]
        weights = jnp.exp(_scores(tile, k[:, :, :end], mask[:, :, start:end, :end]) - total)
        dv = _add(dv, product32("bkgqs,bkgqd->bksd", weights.astype(v.dtype), above))
        slopes = weights * product32("bkgqd,bksd->bkgqs", above, v[:, :, :end])
        level = jnp.sum(slopes, axis=-1, keepdims=True)  # that of gradient * output, which need not be kept for it
        slopes = ((slopes - weights * level) * q.shape[-1] ** -0.5).astype(k.dtype)
        dk = _add(dk, product32("bkgqs,bkgqd->bksd", slopes, tile))
        dq.append(product32("bkgqs,bksd->bkgqd", slopes, k[:, :, :end]))
    return jnp.concatenate(dq, axis=3).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


def _kernel(q: Array, k: Array, v: Array, mask: Array) -> Array:
    # The mask says that it is causal, but only the flag lets the kernel skip what lies above the diagonal.
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def _merging(function: Callable) -> Callable:
    """`function` of arrays [batch, ...], which under vmap is called once, for the batches of all.

    JAX's own rule for cuDNN's attention would want a mask for every head.
    """
    merged = jax.custom_batching.custom_vmap(function)

    @merged.def_vmap
    def rule(size, batched, *arrays):
        whole = (x if own else jnp.broadcast_to(x, (size, *x.shape)) for x, own in zip(arrays, batched, strict=True))
        found = merged(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        found = jax.tree.map(lambda leaf: leaf.reshape(size, -1, *leaf.shape[1:]), found)
        return found, jax.tree.map(lambda _: True, found)

    return merged


@jax.custom_vjp
def _fused(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """cuDNN's attention, whose result is not kept for the way back but made again: as many bytes moved, fewer held."""
    return _merging(lambda *given: _kernel(*given))(q, k, v, mask)


@jax.named_scope("attention")
def _fused_backward(kept, gradient):
    def slopes(q, k, v, mask, gradient):
        return jax.vjp(lambda *qkv: _kernel(*qkv, mask), q, k, v)[1](gradient)

    return *_merging(slopes)(*kept, gradient), None


_fused.defvjp(lambda *given: (_fused(*given), given), _fused_backward)
