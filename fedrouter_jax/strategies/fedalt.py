"""FedALT: an adapter of one's own beside a frozen one of the rest of the world, mixed for every token.

Bian et al., "FedALT: Federated Fine-Tuning through Adaptive Local Training with Rest-of-World LoRA", AAAI 2026,
arXiv 2503.11880.

    client   h = W0 x + g(x) own(x) + (1 - g(x)) rest(x),  g a softmax of two learned scores of x, in every module;
             trains own and the scores, never rest, and goes on from its own adapter of the round before
    server   rest of client i = mean of the own adapters of all others, A and B separately

The others are those that have trained so far. The scores stay at home. An adapter goes up and another one comes down.
"""

import jax
import jax.numpy as jnp

from fedrouter_jax import bank
from fedrouter_jax.federation import own_slot, owned
from fedrouter_jax.types import LoRA, Phase, Strategy

# `rest` comes down in place of one's own, and is never sent up.
OWNERS = {"own": LoRA(a="public", b="public", gate="client"), "rest": LoRA(a="client", b="client", gate="client")}


def fedalt() -> Strategy:
    """Two slots a client. Averaged: everybody's own adapters, for the others. Private: the scores that mix."""
    create, ask, collect, write = owned(OWNERS)

    def init(adapters, enrolment):
        scores = {module: jnp.zeros((*a.shape[:-1], 1)) for module, a in adapters["own"].a.items()}
        state = create({name: adapter._replace(gate=scores) for name, adapter in adapters.items()}, enrolment)
        return state._replace(memory=jnp.zeros(len(state.table)))  # 1: the client has trained

    def tell(state, sums):
        told = write(state, sums)
        met = jnp.maximum(state.memory, sums.weight["public"] > 0)

        def others(leaf):
            known = leaf * bank.expand(met, leaf)
            return (known.sum(axis=0, keepdims=True) - known) / bank.expand(jnp.maximum(met.sum() - met, 1), leaf)

        own, rest = told.bank["own"], told.bank["rest"]
        rest = rest._replace(a=jax.tree.map(others, own.a), b=jax.tree.map(others, own.b))
        return told._replace(bank={"own": own, "rest": rest}, memory=met)

    def phases(round, rounds):
        moves = {"own": True, "rest": LoRA(a=False, b=False, gate=True)}
        return (Phase(train=moves, weights={"own": 1.0, "rest": 1.0}),)

    def route(state, clients, view, mode):
        here = own_slot(state, clients, view, mode)
        return bank.weights(state.bank, {"own": here, "rest": here})

    return Strategy("fedalt", OWNERS, init, ask, collect, tell, route, phases=phases)
