"""Clustered: clients whose first updates point the same way train together.

The baseline of FedRouter's paper (arXiv 2604.00050), after clustered federated learning by cosine similarity of updates
(Sattler et al., arXiv 1910.01991). One round of FedAvg; Ward's clustering of the cosine similarities of the clients'
LoRA-B; then FedAvg inside each cluster. A client that missed the first round is similar to nobody.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from fedrouter_jax.federation import owned
from fedrouter_jax.types import Strategy

OWNERS = {"main": "cluster"}


def clustered() -> Strategy:
    """One slot a cluster of clients. Averaged: A and B inside a cluster. Private: nothing."""
    create, ask, average = owned(OWNERS)

    def init(adapters, enrolment):
        state = create(adapters, enrolment)
        return state._replace(table=jnp.zeros_like(state.table), memory=jnp.eye(len(state.table)))

    def tell(state, work, adapters):
        updates = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(adapters["main"].b)]  # B starts at zero
        flat = jnp.concatenate(updates, axis=1)
        unit = flat / jnp.maximum(jnp.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
        pairs = (work.client[:, None], work.client[None])
        counts = (work.weight > 0)[:, None] & (work.weight > 0)[None]
        similar = state.memory.at[pairs].set(jnp.where(counts, unit @ unit.T, state.memory[pairs]))
        told = average(state, work, adapters)
        return told._replace(memory=jnp.where(state.round == 0, similar, state.memory))

    def regroup(state):
        if int(state.round) != 1:
            return state
        similar = np.clip(np.asarray(state.memory, np.float64), -1, 1)
        distance = np.sqrt(2 - 2 * (similar + similar.T) / 2)  # Euclidean, between unit vectors
        np.fill_diagonal(distance, 0)
        slots = jax.tree.leaves(state.bank)[0].shape[0]
        found = np.ones(1, int)
        if len(distance) > 1:
            found = fcluster(linkage(squareform(distance, checks=False), "ward"), slots, "maxclust")
        first = list(dict.fromkeys(found.tolist()))  # clusters are numbered as clients meet them
        table = jnp.asarray([[first.index(label)] for label in found.tolist()], state.table.dtype)
        bank = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], slots, axis=0), state.bank)
        return state._replace(table=table, bank=bank)

    def route(state, clients, view, mode):
        return jax.nn.one_hot(state.table[clients, 0], jax.tree.leaves(state.bank)[0].shape[0])

    return Strategy("clustered", OWNERS, init, ask, tell, route, regroup=regroup)
