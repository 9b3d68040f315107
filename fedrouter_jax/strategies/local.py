"""Local: every client trains alone, nothing is exchanged. The lower bound of collaboration."""

import jax

from fedrouter_jax.federation import create_state, owned
from fedrouter_jax.types import Strategy

OWNERS = {"main": "client"}


def local() -> Strategy:
    """One slot a client. Averaged: nothing. Private: everything."""

    def init(adapters, enrolment):
        return create_state(OWNERS, adapters, enrolment.table, enrolment.clusters, ())

    def route(state, clients, embeddings, mode):
        return jax.nn.one_hot(clients, state.table.shape[0])

    ask, tell = owned(OWNERS)
    return Strategy("local", OWNERS, False, init, ask, tell, route)
