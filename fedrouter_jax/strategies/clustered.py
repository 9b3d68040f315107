"""Clustered: clients whose first updates point the same way train together.

The baseline of FedRouter's paper (arXiv 2604.00050), after clustered federated learning by cosine similarity of updates
(Sattler et al., arXiv 1910.01991). One round of FedAvg; Ward's clustering of the cosine similarities of the clients'
LoRA-B; then FedAvg inside each cluster. A client that missed the first round joins the largest one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedrouter_jax.bank import slots_of
from fedrouter_jax.federation import cluster_slot, owned
from fedrouter_jax.types import Strategy

OWNERS = {"main": "cluster"}


def clustered() -> Strategy:
    """One slot a cluster of clients. Averaged: A and B inside a cluster. Private: nothing."""
    create, ask, collect, average = owned(OWNERS)

    def init(adapters, enrolment):
        state, clients = create(adapters, enrolment), len(enrolment.table)
        similar, met = jnp.eye(clients), jnp.zeros(clients, jnp.int32)
        return state._replace(table=jnp.zeros_like(state.table), memory=(similar, met))

    def with_directions(state, work):
        """Beside the sums, each client's direction [client, number]: its B, which starts at zero, at unit length."""
        nothing, add = collect(state, work)
        size = sum(leaf[0].size for leaf in jax.tree.leaves(state.bank["main"].b))

        def added(sums, lanes, adapters):
            flat = jnp.concatenate([b.reshape(len(b), -1) for b in jax.tree.leaves(adapters["main"].b)], axis=1)
            unit = flat / jnp.maximum(jnp.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
            here = (lanes.weight > 0).astype(jnp.int32)
            met, directions = sums[1].at[lanes.client].add(here), sums[2].at[lanes.client].add(unit * here[:, None])
            return add(sums[0], lanes, adapters), met, directions

        met = jnp.zeros_like(state.memory[1])
        return (nothing, met, jnp.zeros((len(met), size))), added

    def tell(state, sums):
        averages, met, directions = sums

        def similar():
            return jnp.matmul(directions, directions.T, precision="highest"), met

        memory = jax.lax.cond(state.round == 0, similar, lambda: state.memory)  # later rounds have no use for it
        return average(state, averages)._replace(memory=memory)

    def regroup(state):
        if int(state.round) != 1:
            return state
        # Here, for it takes half a second, and every command loads the strategies.
        from scipy.cluster.hierarchy import fcluster, linkage
        from scipy.spatial.distance import squareform

        slots = slots_of(state.bank)
        present = np.asarray(state.memory[1]) > 0
        similar = np.clip(np.asarray(state.memory[0], np.float64), -1, 1)[present][:, present]
        distance = np.sqrt(2 - 2 * (similar + similar.T) / 2)  # Euclidean, between unit vectors
        np.fill_diagonal(distance, 0)
        found = np.ones(len(distance), int)
        if len(distance) > 1:
            found = fcluster(linkage(squareform(distance, checks=False), "ward"), slots, "maxclust")
        first = list(dict.fromkeys(found.tolist()))  # clusters are numbered as clients meet them
        table = np.full(present.shape, np.bincount(found).argmax() if len(found) else 0)
        table[present] = found
        table = [[first.index(label) if label in first else 0] for label in table.tolist()]
        everywhere = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], slots, axis=0), (state.bank, state.server))
        return state._replace(table=jnp.asarray(table, state.table.dtype), bank=everywhere[0], server=everywhere[1])

    return Strategy("clustered", OWNERS, init, ask, with_directions, tell, cluster_slot, regroup=regroup)
