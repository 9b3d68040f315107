"""Saving and loading the federation's state with Orbax.

Beside it a run needs config.json, and clusters.json for which rows are in which local cluster: batches, keys and lanes
follow from those and (seed, round).
"""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from fedrouter_jax import files, processes
from fedrouter_jax.errors import UserError, one_line
from fedrouter_jax.types import Array, PyTree


def _open(folder: Path) -> ocp.training.Checkpointer:
    keep = ocp.training.preservation_policies.LatestN(2)
    return ocp.training.Checkpointer(folder.absolute(), preservation_policy=keep)


def save(folder: Path, step: int, state: PyTree) -> None:
    """Write the state after `step` rounds; the two latest are kept.

    Raises `UserError` where that fails, which leaves the earlier ones alone.
    """
    try:
        if processes.first():
            folder.mkdir(parents=True, exist_ok=True)
        processes.meet("there is a folder for checkpoints")
        files.appear(folder)
        with _open(folder) as checkpoints:
            checkpoints.save(step, state, overwrite=True, custom_metadata={"crc32": _crc32(state)})
    except Exception as error:  # Orbax and TensorStore raise many kinds for a failed write
        raise UserError(
            f"{folder}: the checkpoint of round {step} could not be written ({one_line(error)}); "
            "is there room, and may it be written? Then resume: rounds that were saved are safe"
        ) from error


def latest(folder: Path) -> int | None:
    """Rounds done at the latest complete checkpoint, None when there is none."""
    if not folder.exists():
        return None
    for again in (True, False):
        try:
            with _open(folder) as checkpoints:
                return None if checkpoints.latest is None else checkpoints.latest.step
        except FileNotFoundError:  # another process, which trains on, has just removed one
            if not again:
                raise


def load_latest(folder: Path, like: PyTree) -> PyTree:
    """The state at the latest checkpoint, as `load` reads it; a process that trains on may remove it meanwhile."""
    for again in (True, True, False):
        step = latest(folder)
        if step is None:
            raise UserError(f"{folder} holds no checkpoint any more; train the run first: fedrouter resume")
        try:
            return load(folder, step, like)
        except UserError:
            if latest(folder) == step or not again:
                raise


def _as_made(leaf: Array) -> Array:
    """On one device what is read is tied to it, and what is made is not, for which JAX would compile all anew."""
    return jnp.asarray(np.asarray(leaf)) if isinstance(leaf.sharding, SingleDeviceSharding) else leaf


def load(folder: Path, step: int, like: PyTree) -> PyTree:
    """The state after `step` rounds, with the structure, shapes, dtypes and placement of `like`.

    Raises `UserError` where it is damaged or another experiment's.
    """

    def describe(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    try:
        with _open(folder) as checkpoints:
            # Asked before, for Orbax says of leaves that do not fit in hundreds of lines which.
            held = Counter(tuple(leaf.shape) for leaf in jax.tree.leaves(checkpoints.metadata(step).metadata))
            wanted = Counter(leaf.shape for leaf in jax.tree.leaves(like))
            if held != wanted:
                odd = next(iter((held - wanted) or (wanted - held)))
                raise ValueError(f"an array of shape {odd} is in one of config.json and the checkpoint only")
            found = jax.tree.map(_as_made, checkpoints.load(step, jax.tree.map(describe, like)))
            noted, here = (checkpoints.metadata(step).custom_metadata or {}).get("crc32"), _crc32(found)
            if None not in (noted, here) and noted != here:
                raise ValueError("its numbers are not those that were written")
            return found
    except Exception as error:  # as in save
        raise UserError(
            f"{folder}: the checkpoint of round {step} could not be read ({one_line(error)}); "
            f"restore config.json if it was changed, or else move folder {step} away to resume from the one before"
        ) from error


def _crc32(state: PyTree) -> int | None:
    """A checksum of all numbers, which Orbax does not keep; None where this process does not hold them all."""
    sums = 0
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return None
        sums = zlib.crc32(np.asarray(leaf).tobytes(), sums)
    return sums
