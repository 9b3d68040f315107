"""Several processes that run one experiment together (`jax.distributed`), the same program on every host.

All decide alike, for they have the same config and rows, and as the first does where the last bit of a sum may decide
(clusters, routes). What divides (texts to embed, prompts to answer) each does a share of, and all then hold everything.
The first writes the files; checkpoints are written by all. With one process nothing here does anything.
"""

from __future__ import annotations

import os
import re

import jax
import numpy as np
from jax.experimental import multihost_utils

from fedrouter_jax.errors import UserError, one_line
from fedrouter_jax.types import PyTree


def join(coordinator: str | None, count: int | None, number: int | None) -> None:
    """Wait for the other processes; to be called before JAX sees a device. Nothing to do without a coordinator.

    `coordinator` is HOST:PORT of the first of `count` processes, or "auto" where JAX finds all three by itself.
    Raises `UserError` where they do not find each other.
    """
    given = (count, number)
    if coordinator is None:
        if given != (None, None):
            raise UserError("--num-processes and --process-id need --coordinator HOST:PORT (or auto)")
        return
    if coordinator == "auto":
        coordinator = None
    elif not re.fullmatch(r".+:\d{1,5}", coordinator) or int(coordinator.rpartition(":")[2]) >= 2**16:
        raise UserError(f"--coordinator is {coordinator}; give HOST:PORT of the first process, such as 10.0.0.1:1234")
    elif None in given or not 0 <= number < count:
        raise UserError(
            f"--coordinator {coordinator} needs --num-processes N and --process-id 0 to N-1, found {count} and {number}"
        )
    # Its handler of SIGTERM only notes that a cluster wants the machine back: `kill` would end nothing.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, count, number)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes did not find each other ({one_line(error)}); "
            "give --coordinator HOST:PORT of the first, --num-processes and --process-id"
        ) from error


def joined() -> bool:
    """Whether there are others."""
    return jax.distributed.is_initialized()


def leave(code: int) -> None:
    """End this process at once if there are others: at its exit JAX would wait minutes for them, and then abort."""
    if joined():
        os._exit(code)


def first() -> bool:
    """Whether this is the process that writes files and talks to the user."""
    return jax.process_index() == 0


def meet(where: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def agreed(number: int) -> int:
    """The first process's number."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def of_first(tree: PyTree) -> PyTree:
    """The first process's arrays and numbers, whatever the shapes of this one's; as many dimensions."""
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    shapes = multihost_utils.broadcast_one_to_all([np.array([0, *leaf.shape]) for leaf in leaves])
    fitting = [
        leaf if leaf.shape == tuple(shape[1:]) else np.zeros(shape[1:], leaf.dtype)
        for leaf, shape in zip(leaves, shapes, strict=True)
    ]
    return jax.tree.unflatten(structure, multihost_utils.broadcast_one_to_all(fitting))


def share() -> slice:
    """What this process does of a list that divides."""
    return slice(jax.process_index(), None, jax.process_count())


def together(mine: np.ndarray, total: int) -> np.ndarray:
    """All `total` rows, on every process, of which each did its `share`, `mine` [row, ...]."""
    count = jax.process_count()
    if count == 1:
        return mine
    padded = np.zeros((-(-total // count), *mine.shape[1:]), mine.dtype)
    padded[: len(mine)] = mine
    return multihost_utils.process_allgather(padded).swapaxes(0, 1).reshape(-1, *mine.shape[1:])[:total]


def whole(tree: PyTree) -> PyTree:
    """Arrays that lie on several processes' devices, whole on this one's."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(jax.numpy.asarray, multihost_utils.process_allgather(tree, tiled=True))


def own(tree: PyTree) -> PyTree:
    """The copy of arrays spread over a mesh that this process's devices hold (`mesh.make`: each holds a whole one)."""

    def local(leaf):
        if leaf.is_fully_addressable:
            return leaf
        return multihost_utils.global_array_to_host_local_array(leaf, leaf.sharding.mesh, leaf.sharding.spec)

    return jax.tree.map(local, tree)
