"""FedRouter: one adapter per task, found by clustering.

Talasso et al., "Task-Centric Personalized Federated Fine-Tuning of Language Models", ICANN 2026, arXiv 2604.00050.

    once     client i:  K-Means of its embedded rows -> centres c[i, 1..n_l], a local cluster per row
             server:    K-Means of all centres -> global centroids G;  slot(i, c) = nearest centroid of c[i, c]
    round t  client i:  one of its local clusters c: train the adapter of slot(i, c) on that cluster's rows
             server:    per slot, average the returned adapters; a slot nobody trained keeps its adapter
    answer   the adapter of the centroid nearest to the embedded text: among all ("global"), or among the slots of
             the client's own local clusters ("local"); or the one of its true task ("oracle")

The clustering is `routing.enroll`; the round is `federation.make_round` with cluster-owned adapters.
"""

import jax

from fedrouter_jax import routing
from fedrouter_jax.federation import owned
from fedrouter_jax.types import Strategy

OWNERS = {"main": "cluster"}


def fedrouter() -> Strategy:
    """One slot a global cluster. Averaged: A and B inside a cluster. Private: the client's rows and its row labels."""
    return Strategy("fedrouter", OWNERS, *owned(OWNERS), nearest_slot, enrolling="clustering")


def nearest_slot(state, clients, view, mode):
    """The `route` of one adapter a task: that of the nearest centroid."""
    slots = len(state.memory.centroids)
    if mode == "oracle":
        return jax.nn.one_hot(view.task_slots, slots)
    candidates = routing.candidates(state.table, clients, slots, mode)
    return jax.nn.one_hot(routing.nearest(state.memory, view.embeddings, candidates)[0], slots)
