"""A round: ask for each lane's adapters, train the lanes, collect what comes back, tell. Names no algorithm.

A lane is one unit of local work: one local cluster of one client. Lanes never see each other, so how they are run
(in groups that share packs; groups all at once, in chunks, one by one) changes the speed and the memory, not the
result, except that a lane whose numbers overflow takes its group with it. What a lane sends is added up at once, so a
round of any number of lanes holds the adapters of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedrouter_jax import bank as bank_lib
from fedrouter_jax import mesh as mesh_lib
from fedrouter_jax import server as server_lib
from fedrouter_jax.types import (
    OWNERSHIP,
    Adapters,
    Array,
    ClientLoss,
    ClientUpdate,
    FederationState,
    PyTree,
    RoundInfo,
    Strategy,
    View,
    Work,
)


def slots(state: FederationState, work: Work) -> bank_lib.Slots:
    """The slot each lane reads and writes, by owner."""
    at = {
        "federation": jnp.zeros_like(work.client),
        "cluster": jnp.maximum(state.table[work.client, work.cluster], 0),
        "client": work.client,
    }
    return {owner: at[ownership.slot_per] for owner, ownership in OWNERSHIP.items()}


def owned(owners: PyTree) -> tuple[Callable, Callable, Callable, Callable]:
    """The `init`, `ask`, `collect` and `tell` of ownership alone: equal slots; read own ones, average back."""

    def init(adapters: Adapters, enrolment: Any) -> FederationState:
        table = enrolment.table
        count = {"federation": 1, "cluster": enrolment.clusters, "client": table.shape[0]}
        sizes = {owner: count[ownership.slot_per] for owner, ownership in OWNERSHIP.items()}
        # Nothing may be shared with the arguments: rounds donate the state, and with it all its buffers.
        table, memory = jax.tree.map(jnp.copy, (table, enrolment.router))
        return FederationState(jnp.zeros((), jnp.int32), bank_lib.create(owners, adapters, sizes), table, memory)

    def ask(state: FederationState, work: Work) -> Adapters:
        return bank_lib.gather(owners, state.bank, slots(state, work))

    def collect(state: FederationState, work: Work) -> tuple[bank_lib.Sums, Callable]:
        total = bank_lib.totals(owners, state.bank, slots(state, work), work.weight)

        def add(sums: bank_lib.Sums, lanes: Work, adapters: Adapters) -> bank_lib.Sums:
            return bank_lib.add(owners, sums, slots(state, lanes), adapters, lanes.weight, total)

        return bank_lib.nothing(owners, state.bank, total), add

    def tell(state: FederationState, sums: bank_lib.Sums) -> FederationState:
        return state._replace(bank=bank_lib.means(owners, state.bank, sums), round=state.round + 1)

    return init, ask, collect, tell


def only_slot(state: FederationState, clients: Array, view: View, mode: str) -> Array:
    """The `route` of strategies with one adapter for everybody."""
    return jnp.ones((len(clients), 1))


def own_slot(state: FederationState, clients: Array, view: View, mode: str) -> Array:
    """The `route` of strategies with one adapter for each client."""
    return jax.nn.one_hot(clients, state.table.shape[0])


def cluster_slot(state: FederationState, clients: Array, view: View, mode: str) -> Array:
    """The `route` of strategies that put whole clients into clusters: the slot of a client's own."""
    return jax.nn.one_hot(state.table[clients, 0], bank_lib.slots_of(state.bank))


def finite_lanes(adapters: Adapters) -> Array:
    """Which lanes hold only finite numbers: bool [lane]."""
    per_leaf = [jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(adapters)]
    return jnp.stack(per_leaf).all(axis=0)


def make_round(
    strategy: Strategy,
    update: ClientUpdate,
    schedule: Callable[[Array], Array],
    rounds: int,
    groups_at_once: int | None = None,
    server: optax.GradientTransformation | None = None,
    loss: ClientLoss | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., tuple[FederationState, RoundInfo]]:
    """One federated round as a jitted function `(state, base, work, batches, key) -> (state, info)`.

    `schedule` maps the round's number (1..`rounds`) to its learning rate. `batches` has leading axes `[group, step]`;
    the lanes, in order, fill the groups evenly. `groups_at_once` groups are vmapped at a time (None: all of them; 1:
    one by one). A lane's key comes from (round, client, cluster), never from its position, so permuting, grouping or
    chunking lanes changes nothing. A lane whose result is not finite is left out of the averages. `server` is the
    server's optimiser (None: plain averages); `loss` serves strategies that choose by it. On a `mesh` (`mesh.make`)
    each row of devices trains its own groups, whose number its rows divide. The state is donated: use the one returned.
    """

    def run(state: FederationState, base: PyTree, work: Work, batches: Any, key: Array):
        number = state.round + 1
        rate, phases = schedule(strategy.pace(number, rounds)), strategy.phases(number, rounds)
        keys = lane_keys(key, state.round, work)
        if strategy.base is not None:
            base = strategy.base(state, base)
        if strategy.choose is not None:

            def losses(adapters):
                return map_losses(loss, base, adapters, work, batches, groups_at_once, mesh)

            state = strategy.choose(state, work, losses)
        filled, keys = fill(work, keys, jax.tree.leaves(batches)[0].shape[0])
        # On a mesh what a client owns lies with its lanes; elsewhere a chunk asks for its own.
        lanes = Lanes(filled, keys, None if mesh is None else strategy.ask(state, filled))
        train = partial(train_lanes, strategy, update, groups_at_once, mesh)
        by_row = over_clients(mesh, train, (P(), P(mesh_lib.CLIENTS)))
        sums, reports = by_row((state, base, work, rate, phases), lanes, batches)
        loss_of, rejected = jax.tree.map(lambda leaf: leaf[: len(work.client)], reports)
        told = strategy.tell(state, sums)
        bank, states = server_lib.step(server, strategy.owners, state.bank, told.bank, state.server)
        told = told._replace(bank=bank, server=states)
        if strategy.derive is not None:
            told = strategy.derive(told)
        info = RoundInfo(loss_of, rate, rejected)
        return (told, info) if mesh is None else mesh_lib.after_round(mesh, strategy, told, info)

    return jax.jit(run, donate_argnums=0)


def lane_keys(key: Array, round: Array, work: Work) -> Array:
    """A key [lane] for every lane of a round, by its client and local cluster."""
    fold = jax.vmap(jax.random.fold_in)
    of_round = jnp.repeat(jax.random.fold_in(key, round), len(work.client))
    return fold(fold(of_round, work.client), work.cluster)


class Lanes(NamedTuple):
    """Some lanes of a round: leaves `[lane, ...]`."""

    work: Work
    keys: Array
    asked: Adapters | None  # None: they are yet to be asked for


def train_lanes(
    strategy: Strategy,
    update: ClientUpdate,
    at_once: int | None,
    mesh: Mesh | None,
    given: tuple,
    lanes: Lanes,
    batches: Any,
) -> tuple[PyTree, tuple[Array, Array]]:
    """The sums of all lanes, and of those here the losses [lane, step] and rejections [lane].

    `given` are the state, the base, the round's work, its learning rate and phases.
    """
    state, base, work, rate, phases = given
    nothing, add = strategy.collect(state, work)

    def group(given, asked_with_keys, batch):
        (base, rate, phases), (asked, keys) = given, asked_with_keys
        return update(base, asked, batch, rate, keys, phases)

    def chunk(sums, lanes, batches):
        asked = strategy.ask(state, lanes.work) if lanes.asked is None else lanes.asked
        adapters, losses = all_groups(group, (base, rate, phases), (asked, lanes.keys), batches)
        finite = finite_lanes(adapters)
        adapters = jax.tree.map(lambda leaf: jnp.where(bank_lib.expand(finite, leaf), leaf, 0), adapters)
        back = lanes.work._replace(weight=lanes.work.weight * finite)
        return add(sums, back, adapters), (losses, ~finite)

    sums, reports = fold_groups(chunk, nothing, lanes, batches, at_once)
    if mesh is not None and mesh.shape[mesh_lib.CLIENTS] > 1:  # XLA does not compile a sum over one row of GPUs
        sums = jax.lax.psum(sums, mesh_lib.CLIENTS)
    return sums, reports


def map_losses(loss, base, adapters, work, batches, at_once=None, mesh=None) -> Array:
    """The loss [lane] of each lane's rows under the same adapters (no lane axis), of which a group makes its copies."""

    def group(given, lanes, batch):
        base, adapters = given
        copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(lanes.client), *leaf.shape)), adapters)
        return loss(base, copies, batch)

    def row(given, lanes, batches):
        def chunk(nothing, lanes, batches):
            return nothing, all_groups(group, given, lanes, batches)

        return fold_groups(chunk, (), lanes, batches, at_once)[1]

    groups = jax.tree.leaves(batches)[0].shape[0]
    here, _ = fill(jax.tree.map(jnp.asarray, work), (), groups)
    return over_clients(mesh, row, P(mesh_lib.CLIENTS))((base, adapters), here, batches)[: len(work.client)]


def fill(work: Work, keys: Array, groups: int) -> tuple[Work, Array]:
    """The lanes of full groups: where they do not fill the last one, the last lane comes again with weight 0."""
    count = len(work.client)
    index = jnp.arange(groups * -(-count // groups))
    filled, keys = jax.tree.map(lambda leaf: leaf[jnp.minimum(index, count - 1)], (work, keys))
    return filled._replace(weight=jnp.where(index < count, filled.weight, 0)), keys


def even_chunk(groups: int, most: int) -> int:
    """The size of chunks of groups, at most `most` each: as few chunks as can be, as even as can be."""
    return -(-groups // -(-groups // most))


def fold_groups(
    chunk: Callable[..., tuple[PyTree, PyTree]], start: PyTree, lanes: PyTree, batches: Any, at_once: int | None
) -> tuple[PyTree, PyTree]:
    """`chunk(sums, lanes, batches) -> (sums, report)` over even chunks of up to `at_once` groups: all sums and reports.

    `lanes` has leaves `[lane, ...]`, as many in every group, and so have the reports.
    """
    groups = jax.tree.leaves(batches)[0].shape[0]
    each = jax.tree.leaves(lanes)[0].shape[0] // groups
    size = even_chunk(groups, at_once or groups)
    whole = groups // size

    def at(sums, first, count):
        """The chunk of so many groups; cut out here, for a scan would copy all batches."""

        def cut(tree, each):
            return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first * each, count * each), tree)

        return chunk(sums, cut(lanes, each), cut(batches, 1))

    if whole == 1:  # a loop of one turn is compiled, and run, twice for several TPUs (docs/log.md)
        sums, reports = at(start, 0, size)
    else:
        sums, reports = jax.lax.scan(lambda sums, i: at(sums, i * size, size), start, jnp.arange(whole))
        reports = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), reports)
    if groups > whole * size:
        sums, last = at(sums, whole * size, groups - whole * size)
        reports = jax.tree.map(lambda *parts: jnp.concatenate(parts), reports, last)
    return sums, reports


def all_groups(group: Callable[..., PyTree], given: PyTree, lanes: PyTree, batches: Any) -> PyTree:
    """`group(given, lanes, batch)` for every entry of `batches` and its lanes, all at once: leaves `[lane, ...]`."""
    groups = jax.tree.leaves(batches)[0].shape[0]
    if groups == 1:
        return group(given, lanes, jax.tree.map(lambda leaf: leaf[0], batches))
    apart = jax.tree.map(lambda leaf: leaf.reshape(groups, -1, *leaf.shape[1:]), lanes)
    found = jax.vmap(group, (None, 0, 0))(given, apart, batches)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)


def over_clients(mesh: Mesh | None, run: Callable[..., PyTree], out_specs: PyTree) -> Callable[..., PyTree]:
    """`run(given, lanes, batches)` by each row of devices, with its own lanes and groups; as it is without a mesh.

    By hand over the clients, so that nobody waits for another's packs; over the model it is the partitioner's.
    """
    if mesh is None:
        return run
    spec = P(mesh_lib.CLIENTS)
    return jax.shard_map(
        run, mesh=mesh, in_specs=(P(), spec, spec), out_specs=out_specs, axis_names=mesh_lib.by_hand(mesh),
        check_vma=False,
    )  # fmt: skip
