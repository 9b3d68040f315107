"""A round: ask for each lane's adapters, train the lanes, tell the results. Names no algorithm.

A lane is one unit of local work: one local cluster of one client. Lanes never see each other, so how they are
mapped (all at once, in chunks, one by one) changes the speed and the memory, not the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedrouter_jax import bank as bank_lib
from fedrouter_jax.types import (
    Adapters,
    Array,
    ClientUpdate,
    FederationState,
    Losses,
    PyTree,
    RoundInfo,
    Strategy,
    Work,
)


def slots(state: FederationState, work: Work) -> bank_lib.Slots:
    """The slot each lane reads and writes, by owner."""
    return {
        "shared": jnp.zeros_like(work.client),
        "cluster": jnp.maximum(state.table[work.client, work.cluster], 0),
        "client": work.client,
    }


def create_state(owners: PyTree, adapters: Adapters, table: Array, clusters: int, memory: PyTree) -> FederationState:
    """The state before the first round: every slot holds the same fresh adapters.

    Nothing in it is shared with the arguments: rounds donate the state, and with it all its buffers.
    """
    sizes = {"shared": 1, "cluster": clusters, "client": table.shape[0]}
    table, memory = jax.tree.map(jnp.copy, (table, memory))
    return FederationState(jnp.zeros((), jnp.int32), bank_lib.create(owners, adapters, sizes), table, memory)


def owned(owners: PyTree) -> tuple[Callable, Callable]:
    """The `ask` and `tell` that ownership alone defines: read own slots, average back into them."""

    def ask(state: FederationState, work: Work) -> Adapters:
        return bank_lib.gather(owners, state.bank, slots(state, work))

    def tell(state: FederationState, work: Work, adapters: Adapters) -> FederationState:
        bank = bank_lib.scatter_mean(owners, state.bank, slots(state, work), adapters, work.weight)
        return state._replace(bank=bank, round=state.round + 1)

    return ask, tell


def finite_lanes(adapters: Adapters) -> Array:
    """Which lanes hold only finite numbers: bool [lane]."""
    per_leaf = [jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(adapters)]
    return jnp.stack(per_leaf).all(axis=0)


def make_round(
    strategy: Strategy, update: ClientUpdate, schedule: Callable[[Array], Array], lanes_at_once: int | None = None
) -> Callable[..., tuple[FederationState, RoundInfo]]:
    """One federated round as a jitted function `(state, base, work, batches, key) -> (state, info)`.

    `schedule` maps the round's number (1..T) to its learning rate. `batches` has leading axes `[lane, step]`.
    `lanes_at_once` lanes are vmapped at a time (None: all of them; 1: one by one). A lane's key comes from (round,
    client, cluster), never from its position, so permuting or chunking lanes changes nothing. A lane whose result is
    not finite is left out of the averages. The state is donated: use the one that is returned.
    """

    def run(state: FederationState, base: PyTree, work: Work, batches: Any, key: Array):
        rate = schedule(state.round + 1)
        round_key = jax.random.fold_in(key, state.round)

        def lane(inputs):
            client, cluster, adapters, batch = inputs
            lane_key = jax.random.fold_in(jax.random.fold_in(round_key, client), cluster)
            return update(base, adapters, batch, rate, lane_key)

        inputs = (work.client, work.cluster, strategy.ask(state, work), batches)
        adapters, losses = map_lanes(lane, inputs, lanes_at_once)
        finite = finite_lanes(adapters)
        adapters = jax.tree.map(lambda leaf: jnp.where(bank_lib.expand(finite, leaf), leaf, 0), adapters)
        state = strategy.tell(state, work._replace(weight=work.weight * finite), adapters)
        return state, RoundInfo(losses.loss, rate, ~finite)

    return jax.jit(run, donate_argnums=0)


def map_lanes(lane: Callable[[Any], tuple[Adapters, Losses]], inputs: Any, at_once: int | None):
    """Apply `lane` to every entry of the leading axis: all at once, `at_once` at a time, or one by one."""
    lanes = jax.tree.leaves(inputs)[0].shape[0]
    if at_once is None or at_once >= lanes:
        return jax.vmap(lane)(inputs)
    return jax.lax.map(lane, inputs, batch_size=None if at_once == 1 else at_once)
