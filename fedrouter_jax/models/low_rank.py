"""The low-rank branch that an adapter adds to a linear module: `((dropout(x) a) * gates) b`.

LoRA (Hu et al., ICLR 2022, arXiv 2106.09685), with the adapters of many slots side by side in the ranks of one. Gates
of the adapters' own, where they have some, make the slots compete for every token (FedLEASE, FedALT).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedrouter_jax.models.config import MODULES
from fedrouter_jax.types import Array, LoRA


class Adapter(NamedTuple):
    """The low-rank branch of one layer, ready to use."""

    lora: LoRA  # leaves without the layer axis
    gates: Array | None  # broadcasts against [*rows, rank]
    keys: Array | None  # one per token, for dropout


@jax.named_scope("adapter")
def low_rank(x: Array, module: str, adapter: Adapter, rate: float) -> Array:
    """The branch of `module` at tokens x [*rows, in]: [*rows, out] in the type of x; `rate` is that of dropout."""
    a, b = adapter.lora.a[module].astype(x.dtype), adapter.lora.b[module].astype(x.dtype)
    gates = adapter.gates
    if module in adapter.lora.gate:
        gates = gates * _compete(x, adapter.lora.gate[module].astype(x.dtype), gates)
    if adapter.keys is None:
        down = x @ a
    else:
        keys = jax.vmap(jax.random.fold_in, (0, None))(adapter.keys.ravel(), MODULES.index(module))
        down = _dropped_product(jax.random.key_data(keys), rate, x, a)
    if gates is not None:
        down = down * gates.astype(x.dtype)
    return down @ b


@partial(jax.checkpoint, prevent_cse=False, static_argnums=1)
def _dropped_product(seeds: Array, rate: float, x: Array, a: Array) -> Array:
    """dropout(x) a, of which the backward pass keeps x, one for all modules, and draws again what was dropped."""
    return _dropout(seeds, rate, x) @ a


def _dropout(seeds: Array, rate: float, x: Array) -> Array:
    """Drop elements of x [*rows, in], whose tokens have `seeds` [row, 2]: the same whatever they are packed with.

    A token's key seeds a hash of the element's number (two multiplications, three shifts: a finaliser of 32 bits); a
    cryptographic generator for every element would take a tenth of a small model's training on a CPU.
    """
    element = jnp.arange(x.shape[-1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    bits = (seeds[..., :1] + element) ^ seeds[..., 1:]
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    kept = bits ^ (bits >> 16) >= threshold
    return jnp.where(kept.reshape(x.shape), x / (1 - rate), 0).astype(x.dtype)


def _compete(x: Array, gate: Array, gates: Array) -> Array:
    """What each rank of `gates` [..., slot * rank] gets of tokens `x` [*rows, in]; `gate` is [in, slot, seat].

    The softmax of the highest scores, as many as there are open slots with a seat; a slot gets what its seats get.
    """
    slots, seats = gate.shape[1:]
    rank = gates.shape[-1] // slots
    taken = (gates.reshape(*gates.shape[:-1], slots, rank)[..., 0] != 0)[..., None]
    if seats > 1:
        taken = taken & jnp.any(gate != 0, axis=0)
    scores = jnp.tensordot(x, gate, 1, preferred_element_type=jnp.float32)
    scores = jnp.where(taken, scores, -1e30)
    if seats > 1:  # with one seat a slot, all that are taken count
        flat = scores.reshape(*scores.shape[:-2], slots * seats)
        mine, others = flat[..., :, None], flat[..., None, :]
        earlier = jnp.tri(slots * seats, k=-1, dtype=bool)  # of equal scores the first comes first
        # How many come before it; by comparing all pairs, for sorting takes several times as long.
        place = jnp.sum((others > mine) | ((others == mine) & earlier), axis=-1).reshape(scores.shape)
        counted = taken.any(-1).sum(-1)[..., None, None]
        scores = jnp.where(place < counted, scores, -1e30)
    mix = nn.softmax(scores, axis=(-2, -1)).sum(-1)
    return jnp.repeat(mix, rank, axis=-1)
