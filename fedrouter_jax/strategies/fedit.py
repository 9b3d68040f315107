"""FedIT: one adapter for everybody.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024, arXiv 2305.05644.
Every client trains the global adapter on all its rows; the server averages A and B separately.
"""

import jax.numpy as jnp

from fedrouter_jax.federation import create_state, owned
from fedrouter_jax.types import Strategy

OWNERS = {"main": "shared"}


def fedit() -> Strategy:
    """One shared slot. Averaged: A and B. Private: nothing."""

    def init(adapters, enrolment):
        return create_state(OWNERS, adapters, enrolment.table, enrolment.clusters, ())

    def route(state, clients, embeddings, mode):
        return jnp.ones((len(clients), 1))

    ask, tell = owned(OWNERS)
    return Strategy("fedit", OWNERS, False, init, ask, tell, route)
