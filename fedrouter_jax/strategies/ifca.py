"""IFCA: K adapters; a client trains the one that fits its rows best.

Ghosh et al., "An Efficient Framework for Clustered Federated Learning", NeurIPS 2020, arXiv 2006.04088; here with
adapters in place of models.

    round t   client i:  of all K adapters take the one of least loss on the rows of this round, and train it
              server:    per slot, average the adapters that came back

With B = 0 all K adapters are the base model: in the first round clients are dealt to slots at random. A round costs K
forward passes over its rows beside the training, and after the first K adapters on the way down. To answer, a client
that the last round did not draw, or that joins later, takes the slot of least loss, too.
"""

import jax
import jax.numpy as jnp

from fedrouter_jax.bank import slots_of
from fedrouter_jax.federation import cluster_slot, owned
from fedrouter_jax.types import Strategy

OWNERS = {"main": "cluster"}


def ifca() -> Strategy:
    """One slot a cluster of clients. Averaged: A and B inside a cluster. Private: rows and losses."""

    def choose(state, work, losses):
        def of_slot(slot):
            found = losses(jax.tree.map(lambda leaf: leaf[slot], state.bank))
            return jnp.where(jnp.isfinite(found), found, jnp.inf)  # or argmin would take what is no number

        here = state.table[work.client, work.cluster]

        def best():  # the first round keeps what was dealt: no loss is computed
            return jnp.argmin(jax.lax.map(of_slot, jnp.arange(slots_of(state.bank))), axis=0).astype(here.dtype)

        chosen = jnp.where(work.weight > 0, jax.lax.cond(state.round > 0, best, lambda: here), here)
        return state._replace(table=state.table.at[work.client, work.cluster].set(chosen))

    def traffic(state, lanes, size):
        return size, (slots_of(state.bank) if state.round > 1 else 1) * size  # in the first round nobody chooses

    return Strategy("ifca", OWNERS, *owned(OWNERS), cluster_slot, enrolling="random", choose=choose, traffic=traffic)
