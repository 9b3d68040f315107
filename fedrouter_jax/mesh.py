"""Many devices: lanes over one axis of a mesh, the frozen weights over the other.

    clients   groups of lanes: every device trains its own, with no word to the others until they are averaged
    model     the base's matrices (Megatron-LM, arXiv 1909.08053): the products into a block by their outputs, those out
              of it by their inputs, embedding and head by the vocabulary; what does not divide evenly is everywhere

What clients own lies with the lanes, slot by slot; all other adapters are everywhere. Over the clients a round is
divided by hand (`federation.make_round`), over the model by JAX's partitioner.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedrouter_jax import bank
from fedrouter_jax.data.packing import Batch
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import on_device
from fedrouter_jax.types import OWNERSHIP, Array, FederationState, PyTree, RoundInfo, Strategy

CLIENTS, MODEL = "clients", "model"
INTO = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def make(model_parallel: int = 1, devices: list | None = None) -> Mesh:
    """The mesh of all devices, `model_parallel` of which share one copy of the base; `UserError` where they do not."""
    devices = jax.devices() if devices is None else devices
    several = jax.process_count() > 1  # each of which embeds and answers by itself, with a whole base
    count = jax.local_device_count() if several else len(devices)
    if count % model_parallel:
        raise UserError(
            f"--model-parallel is {model_parallel}, but there are {count} devices{' a process' if several else ''}; "
            "choose a divisor of that"
        )
    return Mesh(np.array(devices).reshape(-1, model_parallel), (CLIENTS, MODEL))


def several(mesh: Mesh) -> Mesh | None:
    """The mesh, where it is of several devices."""
    return mesh if mesh.size > 1 else None


def placing(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    """What puts a base on a mesh; where that is one device, on it."""
    return partial(place_base, mesh) if several(mesh) else on_device


def by_hand(mesh: Mesh) -> set[str]:
    """The axes over which work is divided by hand; a base that devices share is left to JAX's partitioner."""
    return {CLIENTS} if mesh.shape[MODEL] > 1 else {CLIENTS, MODEL}


def put(leaf: Array, sharding: NamedSharding) -> Array:
    """An array of this process where the sharding says; of several processes each gives its devices' parts.

    An abstract array is one that lies there.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(sharding=sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    # `device_put` of an array on one device to one device each of several processes leaves an unusable array (0.10).
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def place_base(mesh: Mesh, params: PyTree) -> PyTree:
    """The base's parameters, or their codes, spread over the model axis."""

    def place(path, leaf):
        names = [entry.key for entry in path]
        if names[0] in ("embedding", "head"):
            axis = 0
        elif names[-1] in ("kernel", "codes", "scales", "bias") and names[1] in INTO:
            axis = leaf.ndim - 1
        elif names[-1] in ("kernel", "codes", "scales"):
            axis = leaf.ndim - 2
        else:
            axis = None
        spec = [None] * leaf.ndim
        if axis is not None and leaf.shape[axis] % mesh.shape[MODEL] == 0:
            spec[axis] = MODEL
        return put(leaf, NamedSharding(mesh, P(*spec)))

    return jax.tree_util.tree_map_with_path(place, params)


def copies(params: PyTree) -> list[PyTree]:
    """The base's parameters once for each row of devices, which holds all of them; nothing is moved.

    The arrays must be this process's own; those that lie on no mesh are the one copy there is.
    """
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding):
        return [params]

    def of_row(devices):
        row = Mesh(devices[None], (CLIENTS, MODEL))

        def leaf_of_row(leaf):
            parts = {shard.device: shard.data for shard in leaf.addressable_shards}
            here = NamedSharding(row, leaf.sharding.spec)
            return jax.make_array_from_single_device_arrays(leaf.shape, here, [parts[device] for device in devices])

        return jax.tree.map(leaf_of_row, params)

    return [of_row(devices) for devices in sharding.mesh.devices]


def row_of(params: PyTree) -> NamedSharding | None:
    """Whole on every device of the row that holds these parameters; None where they lie on no mesh."""
    sharding = jax.tree.leaves(params)[0].sharding
    return NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else None


def beside(params: PyTree, tree: PyTree) -> PyTree:
    """Arrays, whole, on every device of the row that holds these parameters."""
    return tree if (row := row_of(params)) is None else jax.device_put(tree, row)


def known(params: PyTree) -> AbstractContextManager:
    """What is traced in here knows whether devices share the base: then attention takes no kernel of one device."""
    sharding = jax.tree.leaves(params)[0].sharding
    shared = isinstance(sharding, NamedSharding) and sharding.mesh.shape[MODEL] > 1
    return jax.set_mesh(sharding.mesh) if shared else nullcontext()


def state_shardings(mesh: Mesh, strategy: Strategy, state: FederationState) -> FederationState:
    """Where every leaf of a state lies."""
    everywhere = NamedSharding(mesh, P())

    def of_leaf(owner, leaf):
        apart = OWNERSHIP[owner].slot_per == "client" and leaf.shape[0] % mesh.shape[CLIENTS] == 0
        return NamedSharding(mesh, P(CLIENTS)) if apart else everywhere

    shardings = jax.tree.map(lambda leaf: everywhere, state)
    return shardings._replace(bank=jax.tree.map(of_leaf, bank.spread(strategy.owners, state.bank), state.bank))


def after_round(
    mesh: Mesh, strategy: Strategy, state: FederationState, info: RoundInfo
) -> tuple[FederationState, RoundInfo]:
    """The state where it was, or the next round would be another program; every process may read what is reported."""
    return jax.lax.with_sharding_constraint(
        (state, info), (state_shardings(mesh, strategy, state), NamedSharding(mesh, P()))
    )


def place_state(mesh: Mesh, strategy: Strategy, state: FederationState) -> FederationState:
    """A state on the mesh."""
    return jax.tree.map(put, state, state_shardings(mesh, strategy, state))


def place_batches(mesh: Mesh, batches: Batch) -> Batch:
    """The batches of a round, leaves `[group, ...]`, each group where it is trained.

    Where devices share a base, all visit as many packs in a step: their products are one program's.
    """
    if mesh.shape[MODEL] > 1:
        batches = batches._replace(count=np.broadcast_to(batches.count.max(axis=0), batches.count.shape))
    return jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, P(CLIENTS))), batches)
