"""Keys and values of rows that are being answered, and the attention of one more token to them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedrouter_jax.models.attention import product32
from fedrouter_jax.models.config import DecoderConfig
from fedrouter_jax.models.matrices import values
from fedrouter_jax.types import Array


class Cache(NamedTuple):
    """Keys and values already computed: of a row's prompt, and of the tokens written after it.

    Rows may begin at different steps, but every step writes one token in each. So a step writes the same slot of all
    rows, the slots of answers are a ring that holds the last of them, and the prompts, most of what is held, stay in
    the order that is fastest to read: slots last for keys.
    """

    k: Array  # [layer, row, kv_head, head_dim, slot]: position j in slot j, valid when j < length
    v: Array  # [layer, row, kv_head, slot, head_dim]
    length: Array  # int32 [row], of the prompt
    began: Array  # int32 [row], `written` when the row's prompt was read
    new_k: Array  # [layer, row, kv_head, new, head_dim]: the token of step t in slot t mod new, valid from `began` on
    new_v: Array  # [layer, row, kv_head, new, head_dim]
    written: Array  # int32 [], steps so far


def empty_cache(config: DecoderConfig, rows: int, slots: int, new: int, dtype) -> Cache:
    """A cache of `rows` rows that hold nothing yet, with room for prompts of `slots` tokens and `new` tokens more.

    `dtype` is best that of the embedding; uint16 holds bfloat16, as in `as_bits`.
    """
    head = (config.layers, rows, config.kv_heads)
    k, v = jnp.zeros((*head, config.head_dim, slots), dtype), jnp.zeros((*head, slots, config.head_dim), dtype)
    new_k, new_v = jnp.zeros((2, *head, new, config.head_dim), dtype)
    length, began = jnp.zeros((2, rows), jnp.int32)
    return Cache(k, v, length, began, new_k, new_v, jnp.zeros((), jnp.int32))


def stored(part: Array, cache: Cache) -> Array:
    """Keys or values as the cache holds them."""
    if cache.k.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(part.astype(jnp.bfloat16), jnp.uint16)
    return part.astype(cache.k.dtype)


def reuse_rows(cache: Cache, rows: Array) -> Cache:
    """The cache with `rows` (bool [row]) emptied, for other prompts."""
    return cache._replace(length=jnp.where(rows, 0, cache.length), began=jnp.where(rows, cache.written, cache.began))


def select_rows(cache: Cache, rows: Array, slots: int) -> Cache:
    """The cache of these `rows` (int32 [row]) alone, whose prompts are of at most `slots` tokens."""
    return Cache(
        cache.k[:, rows, ..., :slots],
        cache.v[:, rows, :, :slots],
        cache.length[rows],
        cache.began[rows],
        cache.new_k[:, rows],
        cache.new_v[:, rows],
        cache.written,
    )


def attend_cache(config: DecoderConfig, q: Array, k: Array, v: Array, cache: Cache) -> Array:
    """One new token a row: scores against the cache and the new key stay apart, so the cache is only read.

    q [row, head, head_dim], k and v [row, kv_head, head_dim], `cache` without the layer axis.
    """
    rows, _, size = q.shape
    q = (q * size**-0.5).reshape(rows, config.kv_heads, -1, size)
    held_k, held_v, new_k, new_v = (values(part) for part in (cache.k, cache.v, cache.new_k, cache.new_v))
    rounded = q.astype(held_k.dtype)
    slots, new = (jnp.arange(count) for count in (cache.k.shape[-1], cache.new_k.shape[-2]))
    length, own = cache.length[:, None], (cache.written - cache.began)[:, None]
    ago = 1 + (cache.written - 1 - new) % len(new)  # steps since a slot of the ring was written
    in_prompt, in_answer = slots < length, ago <= own
    if config.sliding_window is not None:
        in_prompt &= length + own - slots < config.sliding_window
        in_answer &= ago < config.sliding_window
    prompt = jnp.where(in_prompt[:, None, None], product32("rkgd,rkds->rkgs", rounded, held_k), -jnp.inf)
    answer = jnp.where(in_answer[:, None, None], product32("rkgd,rksd->rkgs", rounded, new_k), -jnp.inf)
    itself = product32("rkgd,rkd->rkg", q, k)[..., None]
    top = jnp.maximum(itself, jnp.maximum(*(jnp.max(part, axis=-1, keepdims=True) for part in (prompt, answer))))
    prompt, answer, itself = (jnp.exp(part - top) for part in (prompt, answer, itself))
    total = jnp.sum(prompt, axis=-1, keepdims=True) + jnp.sum(answer, axis=-1, keepdims=True) + itself
    mixed = product32("rkgs,rksd->rkgd", prompt.astype(held_v.dtype), held_v)
    mixed += product32("rkgs,rksd->rkgd", answer.astype(held_v.dtype), new_v)
    mixed += itself * v[:, :, None].astype(jnp.float32)
    return (mixed / total).astype(v.dtype).reshape(rows, -1)
