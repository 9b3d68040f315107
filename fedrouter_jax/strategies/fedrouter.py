"""FedRouter: one adapter per task, found by clustering.

Talasso et al., "Task-Centric Personalized Federated Fine-Tuning of Language Models", ICANN 2026, arXiv 2604.00050.

    once     client i:  K-Means of its embedded rows -> centres c[i, 1..n_l], a local cluster per row
             server:    K-Means of all centres -> global centroids G;  slot(i, c) = nearest centroid of c[i, c]
    round t  client i:  one of its local clusters c: train the adapter of slot(i, c) on that cluster's rows
             server:    per slot, average the returned adapters; a slot nobody trained keeps its adapter
    answer   the adapter of the centroid nearest to the embedded text: among all ("global"), or among the slots of
             the client's own local clusters ("local")

The clustering is `routing.enroll`; the round is `federation.make_round` with cluster-owned adapters.
"""

import jax

from fedrouter_jax import routing
from fedrouter_jax.federation import create_state, owned
from fedrouter_jax.types import Strategy

OWNERS = {"main": "cluster"}


def fedrouter() -> Strategy:
    """One slot a global cluster. Averaged: A and B inside a cluster. Private: the client's rows and its row labels."""

    def init(adapters, enrolment):
        return create_state(OWNERS, adapters, enrolment.table, enrolment.clusters, enrolment.router)

    def route(state, clients, embeddings, mode):
        candidates = routing.candidates(state.table, clients, len(state.memory.centroids), mode)
        nearest, _ = routing.nearest(state.memory, embeddings, candidates)
        return jax.nn.one_hot(nearest, len(state.memory.centroids))

    ask, tell = owned(OWNERS)
    return Strategy("fedrouter", OWNERS, True, init, ask, tell, route)
