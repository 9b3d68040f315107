"""Keys and values of rows that are being answered, and the attention of one more token to them."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from fedrouter_jax.models.attention import product32
from fedrouter_jax.models.config import DecoderConfig
from fedrouter_jax.models.matrices import values
from fedrouter_jax.types import Array

PAGE = 64  # slots: few enough that little of a row's last page is empty, enough for a product worth its name


class Cache(NamedTuple):
    """Keys and values already computed: of rows' prompts, and of the tokens written after them.

    Prompts lie in pages, as many to a row as its prompt needs (PagedAttention, Kwon et al., SOSP 2023, arXiv
    2309.06180): tasks differ several times over in the length of their prompts, and slots for the longest in every row
    would be mostly empty. Rows may begin at different steps, but every step writes one token in each. So a step writes
    the same slot of all rows, the slots of answers are a ring that holds the last of them, and the prompts, most of
    what is held, stay in the order that is fastest to read: slots last for keys.
    """

    k: Array  # [layer, page, kv_head, head_dim, PAGE]: position start + j in slot j, valid below the row's length
    v: Array  # [layer, page, kv_head, PAGE, head_dim]
    owner: Array  # int32 [page]: the row, past the last for a page that is free
    start: Array  # int32 [page], a multiple of PAGE
    length: Array  # int32 [row], of the prompt
    began: Array  # int32 [row], `written` when the row's prompt was read
    new_k: Array  # [layer, row, kv_head, new, head_dim]: the token of step t in slot t mod new, valid from `began` on
    new_v: Array  # [layer, row, kv_head, new, head_dim]
    written: Array  # int32 [], steps so far


def empty_cache(
    config: DecoderConfig, rows: int, owner: Array, start: Array, new: int, dtype, where: Sharding | None = None
) -> Cache:
    """A cache of `rows` rows that hold nothing yet, with room for `new` tokens more than their prompts.

    `owner` and `start` int32 [page] deal the pages to rows; `dtype` is best that of the embedding; uint16 holds
    bfloat16, as in `as_bits`. It is made `where` it will be used: it may take much of a device.
    """
    zeros = jnp.zeros if where is None else partial(_zeros, where=where)
    pages, answers = (config.layers, len(owner), config.kv_heads), (config.layers, rows, config.kv_heads, new)
    deal = (jax.device_put(np.asarray(part, np.int32), where) for part in (owner, start))
    return Cache(
        zeros((*pages, config.head_dim, PAGE), dtype),
        zeros((*pages, PAGE, config.head_dim), dtype),
        *deal,
        *(zeros(rows, jnp.int32) for _ in range(2)),
        *(zeros((*answers, config.head_dim), dtype) for _ in range(2)),
        zeros((), jnp.int32),
    )


@partial(jax.jit, static_argnames=("shape", "dtype", "where"))
def _zeros(shape: tuple[int, ...], dtype, where: Sharding) -> Array:
    """Zeros that are made where they will lie: `jnp.zeros(..., device=where)` makes them on the first device."""
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), where)


def pages_of(cache: Cache, owner: Array, positions: Array) -> Array:
    """The page of each token from its row and position, past the last page for what has none; all of one shape."""
    rows, pages = len(cache.length), len(cache.owner)
    table = jnp.full((rows, pages), pages)
    table = table.at[cache.owner, cache.start // PAGE].set(jnp.arange(pages), mode="drop")
    return table.at[owner, positions // PAGE].get(mode="fill", fill_value=pages)


def stored(part: Array, cache: Cache) -> Array:
    """Keys or values as the cache holds them."""
    if cache.k.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(part.astype(jnp.bfloat16), jnp.uint16)
    return part.astype(cache.k.dtype)


def reuse_rows(cache: Cache, rows: Array, owner: Array, start: Array) -> Cache:
    """The cache with `rows` (bool [row]) emptied, for other prompts, and pages dealt anew."""
    length, began = jnp.where(rows, 0, cache.length), jnp.where(rows, cache.written, cache.began)
    return cache._replace(length=length, began=began, owner=owner, start=start)


def select_rows(cache: Cache, rows: Array, pages: Array, owner: Array, start: Array) -> Cache:
    """The cache of these `rows` (int32 [row]) and `pages` (int32 [page]) alone; `owner` and `start` are the pages'."""
    return Cache(
        cache.k[:, pages],
        cache.v[:, pages],
        owner,
        start,
        cache.length[rows],
        cache.began[rows],
        cache.new_k[:, rows],
        cache.new_v[:, rows],
        cache.written,
    )


@jax.named_scope("attention")
def attend_cache(config: DecoderConfig, q: Array, k: Array, v: Array, cache: Cache) -> Array:
    """One new token a row: scores against the cache and the new key stay apart, so the cache is only read.

    q [row, head, head_dim], k and v [row, kv_head, head_dim], `cache` without the layer axis.
    """
    rows, _, size = q.shape
    q = (q * size**-0.5).reshape(rows, config.kv_heads, -1, size)
    held_k, held_v, new_k, new_v = (values(part) for part in (cache.k, cache.v, cache.new_k, cache.new_v))
    rounded = q.astype(held_k.dtype)
    own = cache.written - cache.began

    # Of a free page, which the first row seems to own, nothing is seen.
    owns = cache.owner == jnp.arange(rows)[:, None]  # [row, page]
    owner = jnp.where(cache.owner < rows, cache.owner, 0)
    place = cache.start[:, None] + jnp.arange(PAGE)
    in_prompt = (place < cache.length[owner][:, None]) & (cache.owner < rows)[:, None]
    new = jnp.arange(cache.new_k.shape[-2])
    ago = 1 + (cache.written - 1 - new) % len(new)  # steps since a slot of the ring was written
    in_answer = ago <= own[:, None]
    if config.sliding_window is not None:
        in_prompt &= (cache.length + own)[owner][:, None] - place < config.sliding_window
        in_answer &= ago < config.sliding_window
    prompt = jnp.where(in_prompt[:, None, None], product32("pkgd,pkds->pkgs", rounded[owner], held_k), -jnp.inf)
    answer = jnp.where(in_answer[:, None, None], product32("rkgd,rksd->rkgs", rounded, new_k), -jnp.inf)
    itself = product32("rkgd,rkd->rkg", q, k)[..., None]

    highest = jnp.where(owns[..., None, None], jnp.max(prompt, axis=-1), -jnp.inf).max(axis=1)[..., None]
    top = jnp.maximum(itself, jnp.maximum(highest, jnp.max(answer, axis=-1, keepdims=True)))
    prompt, answer, itself = jnp.exp(prompt - top[owner]), jnp.exp(answer - top), jnp.exp(itself - top)

    def of_rows(parts):  # a row's sum over its pages; as a product, for scattering takes longer
        return jnp.einsum("rp,p...->r...", owns.astype(jnp.float32), parts, precision="highest")

    total = of_rows(jnp.sum(prompt, axis=-1, keepdims=True)) + jnp.sum(answer, axis=-1, keepdims=True) + itself
    mixed = of_rows(product32("pkgs,pksd->pkgd", prompt.astype(held_v.dtype), held_v))
    mixed += product32("rkgs,rksd->rkgd", answer.astype(held_v.dtype), new_v)
    mixed += itself * v[:, :, None].astype(jnp.float32)
    return (mixed / total).astype(v.dtype).reshape(rows, -1)
