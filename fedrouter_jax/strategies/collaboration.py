"""FedRouter whose adapters learn or answer otherwise: five ways that could be better than the plain method.

FedRouter's paper (arXiv 2604.00050) names collaboration across tasks as open; the first four are of that kind.

    fedrouter-warm   the first third of the rounds averages over everybody: all tasks start from one that has seen them
    fedrouter-a      one A for all tasks, a B for each: A averaged over everybody, as in FedSA-LoRA (arXiv 2410.01463)
    fedrouter-sum    an adapter of all tasks plus one of the text's own, trained together as their sum
    fedrouter-soft   trained as FedRouter; a text is answered by its two nearest adapters, mixed by their distances
    fedrouter-b      one A as it was drawn, a B for each: averages inside a task are exact, as in FFA-LoRA (2403.12313)
"""

import jax
import jax.numpy as jnp

from fedrouter_jax import bank, routing
from fedrouter_jax.federation import owned
from fedrouter_jax.strategies.fedrouter import OWNERS, fedrouter, nearest_slot
from fedrouter_jax.strategies.ffalora import b_alone
from fedrouter_jax.types import LoRA, Phase, Strategy

SHARED_A = {"main": LoRA(a="shared", b="cluster")}
FIXED_A = {"main": LoRA(a="fixed", b="cluster")}
SUM = {"main": "cluster", "common": "shared"}


def fedrouter_warm(together: int = 2) -> Strategy:
    """FedRouter whose slots are one until round `together` is over. Averaged: A and B, over all, then in a cluster."""
    *_, average = owned(OWNERS)

    def tell(state, sums):
        apart = average(state, sums)
        weight, share = sums.weight["cluster"], sums.share["cluster"]
        heavy = weight / jnp.maximum(share, 1e-12)  # of a slot's sum, by which it counts among all
        back = jnp.sum(weight)
        first = (state.round < together) & (back > 0)

        def of_leaf(own, total):
            mean = jnp.tensordot(heavy, total, 1, precision="highest") / jnp.where(back > 0, back, 1)
            return jnp.where(first, mean, own)

        return apart._replace(bank=jax.tree.map(of_leaf, apart.bank, sums.bank))

    return fedrouter()._replace(name="fedrouter-warm", tell=tell)


def fedrouter_a() -> Strategy:
    """One A, a B for every global cluster. Averaged: A over all, B inside a cluster. Private: rows and their labels."""
    return Strategy("fedrouter-a", SHARED_A, *owned(SHARED_A), nearest_slot, enrolling="clustering")


def fedrouter_b() -> Strategy:
    """One fixed A, a B for every global cluster. Averaged: B inside a cluster. Private: rows and their labels."""
    return Strategy("fedrouter-b", FIXED_A, *owned(FIXED_A), nearest_slot, enrolling="clustering", phases=b_alone)


def fedrouter_sum() -> Strategy:
    """One slot for every global cluster and a shared one. Averaged: both. Private: rows and their labels."""
    init, *rest = owned(SUM)

    def apart(adapters, enrolment):
        # From the same A and B the two would have the same gradients, and be one adapter at twice the rate.
        a = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=-2), adapters["common"].a)
        return init(adapters | {"common": adapters["common"]._replace(a=a)}, enrolment)

    def phases(round, rounds):
        return (Phase(train={"common": True, "main": True}, weights={"common": 1.0, "main": 1.0}),)

    def route(state, clients, view, mode):
        own = nearest_slot(state, clients, view, mode)
        return bank.weights(state.bank, {"main": own, "common": jnp.ones((len(own), 1))})

    return Strategy("fedrouter-sum", SUM, apart, *rest, route, enrolling="clustering", phases=phases)


def fedrouter_soft(nearest: int = 2, temperature: float = 0.1) -> Strategy:
    """FedRouter with gates: a softmax of minus the distance over `temperature`, among the `nearest` candidates."""

    def route(state, clients, view, mode):
        if mode == "oracle":
            return nearest_slot(state, clients, view, mode)
        allowed = routing.candidates(state.table, clients, len(state.memory.centroids), mode)
        distances = jnp.where(allowed, routing.nearest(state.memory, view.embeddings)[1], jnp.inf)
        last = jnp.sort(distances, axis=1)[:, min(nearest, distances.shape[1]) - 1]
        return jax.nn.softmax(jnp.where(distances <= last[:, None], -distances / temperature, -jnp.inf), axis=1)

    return fedrouter()._replace(name="fedrouter-soft", route=route)
