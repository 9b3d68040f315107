"""SCAFFOLD: what a client's steps tend to beyond everybody's is taken out of them.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, arXiv 1910.06378,
with option II for the control variates; for adapters as in OpenFedLLM (Ye et al., KDD 2024, arXiv 2402.06954), where a
local step is AdamW's, so a control variate is a mean step, in units of the learning rate.

    client   y = x;  K times:  y <- y + u - lr (c - c_i),  u the step of AdamW at y
             c_i <- c_i - c + (x - y) / (K lr),  which is the mean of -u / lr
    server   x = mean of y, weighted;  c = mean of all clients' c_i

A client that does not take part keeps its c_i. Twice the bytes of FedIT: the change of c_i goes up, c comes down.
"""

import jax
import jax.numpy as jnp
import optax

from fedrouter_jax.bank import expand
from fedrouter_jax.federation import only_slot, owned
from fedrouter_jax.types import Phase, Strategy

OWNERS = {"main": "shared"}


def scaffold(clients: int | None = None) -> Strategy:
    """One slot. Averaged: A, B, and control variates, which the server keeps by client. Private: nothing.

    `clients` train at all (None: everybody; newcomers never do).
    """
    create, read, collect, average = owned(OWNERS)

    def init(adapters, enrolment):
        state = create(adapters, enrolment)
        variates = jax.tree.map(lambda leaf: jnp.zeros((len(state.table), *leaf.shape)), adapters["main"])
        return state._replace(memory=variates)

    def ask(state, work):
        drift = jax.tree.map(lambda own: own.sum(axis=0) / (clients or len(own)) - own[work.client], state.memory)
        return read(state, work) | {"drift": drift}

    def optimiser(adamw, rate, local):
        """The lane's drift becomes its new control variate in the course of its steps."""

        def update(gradients, state, adapters, received):
            steps, state = adamw.update(gradients, state, adapters)
            drift, steps = received["drift"], steps["main"]
            noted = jax.tree.map(lambda u, d: (-u / jnp.maximum(rate, 1e-12) - d) / local.steps, steps, drift)
            return {"main": jax.tree.map(lambda u, d: u - rate * d, steps, drift), "drift": noted}, state

        return optax.GradientTransformationExtraArgs(adamw.init, update)

    def phases(round, rounds):
        return (Phase(train={"main": True, "drift": True}, weights={"main": 1.0}),)

    def with_variates(state, work):
        """Beside the sums, the change of each client's control variate [client, ...]."""
        nothing, add = collect(state, work)

        def added(sums, lanes, adapters):
            def changed(total, new, old):
                here = expand(lanes.weight > 0, new)
                return total.at[lanes.client].add(jnp.where(here, new - old[lanes.client], 0))

            change = jax.tree.map(changed, sums[1], adapters["drift"], state.memory)
            return add(sums[0], lanes, adapters), change

        return (nothing, jax.tree.map(jnp.zeros_like, state.memory)), added

    def tell(state, sums):
        averages, change = sums
        return average(state, averages)._replace(memory=jax.tree.map(jnp.add, state.memory, change))

    def traffic(state, lanes, size):
        return 2 * size, 2 * size

    return Strategy(
        "scaffold", OWNERS, init, ask, with_variates, tell, only_slot,
        phases=phases, optimiser=optimiser, traffic=traffic,
    )  # fmt: skip
