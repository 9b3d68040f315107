"""The server's optimiser: what becomes of the averaged adapters. Combines with any strategy.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295; FedAvgM: Hsu et al., arXiv 1909.06335.
The difference between a slot's adapter and the average that came back is taken as a gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedrouter_jax import bank as bank_lib
from fedrouter_jax.types import OWNERSHIP, Adapters, Array, PyTree, Server

# The owners whose adapters are the server's.
OWN = {owner for owner, ownership in OWNERSHIP.items() if ownership.sent and ownership.slot_per != "client"}


def moves(owners: PyTree) -> bool:
    """Whether a strategy with these owners has adapters that the server's optimiser moves."""
    return any(owner in OWN for owner in jax.tree.leaves(owners))


def optimiser(name: Server, rate: float) -> optax.GradientTransformation | None:
    """FedAvg (None), FedAvgM, FedAdagrad, FedAdam or FedYogi with the papers' constants at a learning rate."""
    return {
        "average": None,
        "momentum": optax.sgd(rate, momentum=0.9),
        "adagrad": adaptive(rate, lambda v, square: v + square, first=0.0),
        "adam": adaptive(rate, lambda v, square: 0.99 * v + 0.01 * square),
        "yogi": adaptive(rate, lambda v, square: v - 0.01 * square * jnp.sign(v - square)),
    }[name]


def adaptive(rate: float, second: Callable[[Array, Array], Array], first: float = 0.9) -> optax.GradientTransformation:
    """Algorithm 2 of Reddi et al.: m <- .9 m + .1 g; v <- second(v, g^2); a step of -rate m / (sqrt(v) + tau).

    `first` is the .9, 0 for FedAdagrad as in the paper's experiments. Unlike optax's, without bias correction, and v
    starts at tau^2: the averages of adapters move by about tau, and the correction would make first steps ten times as
    long.
    """
    tau = 1e-3

    def init(x):
        return jax.tree.map(jnp.zeros_like, x), jax.tree.map(lambda leaf: jnp.full_like(leaf, tau**2), x)

    def update(gradient, state, x=None):
        m = jax.tree.map(lambda m, g: first * m + (1 - first) * g, state[0], gradient)
        v = jax.tree.map(lambda v, g: second(v, g**2), state[1], gradient)
        return jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + tau), m, v), (m, v)

    return optax.GradientTransformation(init, update)


def init(server: optax.GradientTransformation | None, owners: PyTree, bank: Adapters) -> PyTree:
    """Optimiser states `[slot, ...]` of every leaf that is the server's, so that each slot counts its own updates."""
    if server is None:
        return ()
    spread = jax.tree.leaves(bank_lib.spread(owners, bank))
    pairs = zip(spread, jax.tree.leaves(bank), strict=True)
    return [jax.vmap(server.init)(leaf) if owner in OWN else () for owner, leaf in pairs]


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
        if owner not in OWN:
            made.append((new, state))
            continue
        moved = jnp.any((old != new).reshape(len(old), -1), axis=1)
        update, fresh = jax.vmap(server.update)(old - new, state, old)
        kept = jax.tree.map(lambda a, b, moved=moved: jnp.where(bank_lib.expand(moved, a), a, b), fresh, state)
        made.append((jnp.where(bank_lib.expand(moved, old), old + update, new), kept))
    return jax.tree.unflatten(structure, [leaf for leaf, _ in made]), [state for _, state in made]
