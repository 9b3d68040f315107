"""The bank: every adapter of the federation in one pytree, each leaf with a leading slot axis.

A leaf's owner alone decides how many slots it has, how it is averaged, and whether it crosses the wire.
Owners are a prefix tree of the adapters, as optax.partition labels are: {"main": "cluster"}, or
{"main": LoRA(a="shared", b="client")}.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrouter_jax import lora
from fedrouter_jax.errors import UserError
from fedrouter_jax.types import OWNERSHIP, Adapters, Array, LoRA, Owner, Phase, PyTree

Slots = dict[Owner, Array]  # int32 [lane] for each owner: the slot that a lane reads and writes


class Sums(NamedTuple):
    """What has come back of a round so far; sums of several parts of it add up, leaf by leaf."""

    weight: dict[Owner, Array]  # float32 [slot]: of the lanes that came back
    share: dict[Owner, Array]  # float32 [slot]: that weight as a part of all lanes'; 1 once all are back
    bank: Adapters  # leaves [slot, ...]: the sum of what has come back, each lane by its share; none if no lane writes


def spread(owners: PyTree, adapters: Adapters) -> PyTree:
    """The owner of every leaf: the prefix tree `owners` broadcast to the structure of `adapters`.

    Raises `UserError` where it is no prefix.
    """
    try:
        return jax.tree.broadcast(owners, adapters, is_leaf=lambda node: isinstance(node, str))
    except ValueError as error:
        parts = [f"{name}: {', '.join(k for k in LoRA._fields if getattr(of, k, ()))}" for name, of in adapters.items()]
        raise UserError(
            f"{owners!r} does not fit the adapters ({'; '.join(parts)}); say one thing of each adapter, or of "
            "each of its parts (a gate, where there is one, is a part, too)"
        ) from error


def create(owners: PyTree, adapters: Adapters, sizes: dict[Owner, int]) -> Adapters:
    """A bank whose every slot holds `adapters`; `sizes` gives the slots of each owner."""
    return jax.tree.map(
        lambda owner, leaf: jnp.repeat(leaf[None], sizes[owner], axis=0), spread(owners, adapters), adapters
    )


def gather(owners: PyTree, bank: Adapters, slots: Slots) -> Adapters:
    """Each lane's adapters, leaves `[lane, ...]`."""
    return jax.tree.map(lambda owner, leaf: leaf[slots[owner]], spread(owners, bank), bank)


def totals(owners: PyTree, bank: Adapters, slots: Slots, weight: Array) -> dict[Owner, Array]:
    """What all lanes of a round weigh, `weight [lane]`, by the slots they write: float32 [slot] for each owner."""
    sizes = dict(zip(jax.tree.leaves(spread(owners, bank)), map(len, jax.tree.leaves(bank)), strict=True))
    return {owner: jax.ops.segment_sum(weight, slots[owner], size) for owner, size in sizes.items()}


def nothing(owners: PyTree, bank: Adapters, total: dict[Owner, Array]) -> Sums:
    """Where nothing has come back yet: zeros."""
    empty = jax.tree.map(
        lambda owner, leaf: jnp.zeros(leaf.shape if OWNERSHIP[owner].trained else 0, jnp.float32),
        spread(owners, bank),
        bank,
    )
    zeros = jax.tree.map(jnp.zeros_like, total)
    return Sums(zeros, zeros, empty)


def add(owners: PyTree, sums: Sums, slots: Slots, lanes: Adapters, weight: Array, total: dict[Owner, Array]) -> Sums:
    """The sums after some lanes `[lane, ...]` have come back, in any order; one of weight 0 changes nothing.

    What lanes bring beside the bank's adapters is not summed.
    """
    # Normalise first: a slot with one lane then receives exactly that lane.
    share = {owner: weight / jnp.where(whole > 0, whole, 1)[slots[owner]] for owner, whole in total.items()}

    def added(owner, sum, new):
        return sum.at[slots[owner]].add(new * expand(share[owner], new)) if OWNERSHIP[owner].trained else sum

    return Sums(
        {owner: sum.at[slots[owner]].add(weight) for owner, sum in sums.weight.items()},
        {owner: sum.at[slots[owner]].add(share[owner]) for owner, sum in sums.share.items()},
        jax.tree.map(added, spread(owners, sums.bank), sums.bank, {name: lanes[name] for name in sums.bank}),
    )


def means(owners: PyTree, bank: Adapters, sums: Sums) -> Adapters:
    """The bank after a round: each slot the average of what came back, or as it was where nothing did.

    A and B are averaged separately.
    """

    def mean(owner, old, total):
        if not OWNERSHIP[owner].trained:
            return old
        share = expand(sums.share[owner], old)
        return jnp.where(share > 0, (total / jnp.where(share > 0, share, 1)).astype(old.dtype), old)

    return jax.tree.map(mean, spread(owners, bank), bank, sums.bank)


def expand(values: Array, like: Array) -> Array:
    """`values [n]` with trailing axes added, to broadcast against `like [n, ...]`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def wire_bytes(owners: PyTree, bank: Adapters, phases: Sequence[Phase]) -> int:
    """Bytes one lane sends in a round: of the leaves whose owner has them sent, what a phase moves of them."""

    def moves(train):
        return spread({name: train[name] for name in bank} if isinstance(train, dict) else train, bank)

    def size(owner, leaf, *trains):
        moved = reduce(np.logical_or, map(np.asarray, trains))
        part = np.count_nonzero(moved) / moved.size if OWNERSHIP[owner].sent else 0
        return round(part * math.prod(leaf.shape[1:])) * leaf.dtype.itemsize

    moved = [moves(phase.train) for phase in phases]
    return sum(jax.tree.leaves(jax.tree.map(size, spread(owners, bank), bank, *moved)))


def slots_of(adapters: PyTree) -> int:
    """The slots of an adapter in the bank, or of all there: as many as the leaf has that has most."""
    return max(leaf.shape[0] for leaf in jax.tree.leaves(adapters))


def serving(bank: Adapters) -> LoRA:
    """All adapters that can answer, leaves `[slot, ...]`: what the weights of a router are over.

    The named adapters one after the other. Where the halves of an adapter have different owners, the one with a single
    slot is repeated for every slot of the other.
    """

    def whole(adapter: LoRA) -> LoRA:
        slots = slots_of(adapter)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (slots, *leaf.shape[1:])), adapter)

    return lora.stack(whole(adapter) for adapter in bank.values())


def weights(bank: Adapters, by_name: dict[str, Array]) -> Array:
    """Weights [row, slot] over `serving`, from those over the slots of each named adapter."""
    return jnp.concatenate([by_name[name] for name in bank], axis=1)


def of_clusters(owners: PyTree, bank: Adapters) -> np.ndarray:
    """Where `serving` has the slots of clusters: int [adapter, cluster], a row for each named adapter they own."""
    found, start = [], 0
    for name, adapter in bank.items():
        slots = slots_of(adapter)
        if "cluster" in jax.tree.leaves(spread(owners, bank)[name]):
            found.append(range(start, start + slots))
        start += slots
    return np.array(found, int)


def serving_names(owners: PyTree, bank: Adapters) -> list[str]:
    """A name for every slot of `serving`: by its finest owner, "cluster_0", or, of several adapters, "local_0"."""
    rank, names = list(OWNERSHIP), []
    for name, adapter in bank.items():
        finest = max(jax.tree.leaves(spread(owners, bank)[name]), key=rank.index)
        names += [f"{finest if len(bank) == 1 else name}_{slot}" for slot in range(slots_of(adapter))]
    return names
