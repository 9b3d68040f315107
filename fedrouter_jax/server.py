"""The server's optimiser: what becomes of the averaged adapters. Combines with any strategy.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295; FedAvgM: Hsu et al., arXiv 1909.06335.
The difference between a slot's adapter and the average that came back is taken as a gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from fedrouter_jax import bank as bank_lib
from fedrouter_jax.types import Adapters, PyTree, Server


def optimiser(name: Server, rate: float) -> optax.GradientTransformation | None:
    """FedAvg (None), FedAvgM, FedAdam or FedYogi with the paper's constants; `rate` is the server's learning rate."""
    return {
        "average": None,
        "momentum": optax.sgd(rate, momentum=0.9),
        "adam": optax.adam(rate, b1=0.9, b2=0.99, eps=1e-3),
        "yogi": optax.yogi(rate, b1=0.9, b2=0.99, eps=1e-3),
    }[name]


def init(server: optax.GradientTransformation | None, bank: Adapters) -> PyTree:
    """Optimiser states `[slot, ...]`, one for every slot of every leaf, so that each slot counts its own updates."""
    return () if server is None else [jax.vmap(server.init)(leaf) for leaf in jax.tree.leaves(bank)]


def step(
    server: optax.GradientTransformation | None, owners: PyTree, before: Adapters, averaged: Adapters, states: PyTree
) -> tuple[Adapters, PyTree]:
    """The new bank and optimiser states. Slots that did not move, and leaves that the server does not own, are left."""
    if server is None:
        return averaged, states
    leaves, structure = jax.tree.flatten(before)
    spread = jax.tree.leaves(bank_lib.spread(owners, before))
    made = []
    for owner, old, new, state in zip(spread, leaves, jax.tree.leaves(averaged), states, strict=True):
        moved = jnp.any((old != new).reshape(len(old), -1), axis=1) & (owner in ("shared", "cluster"))
        update, fresh = jax.vmap(server.update)(old - new, state, old)
        kept = jax.tree.map(lambda a, b, moved=moved: jnp.where(bank_lib.expand(moved, a), a, b), fresh, state)
        made.append((jnp.where(bank_lib.expand(moved, old), old + update, new), kept))
    return jax.tree.unflatten(structure, [leaf for leaf, _ in made]), [state for _, state in made]
