"""FedEx-LoRA: FedIT whose averages are exact.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models",
ACL 2025, arXiv 2410.09432.

    server   A, B = mean A_k, mean B_k                                   as FedIT
             W0  <- W0 + (alpha / r) (mean (A_k B_k) - A B)              what those two means lose

What was added to W0 is kept in the memory of the state. Every client can compute it from the adapters of the round, so
it costs as many adapters on the way down as there are lanes.
"""

import jax.numpy as jnp

from fedrouter_jax.bank import expand
from fedrouter_jax.federation import only_slot, owned
from fedrouter_jax.types import Strategy

OWNERS = {"main": "shared"}


def fedex(scale: float = 2.0) -> Strategy:
    """One shared slot and a shared shift of W0; `scale` is alpha / r. Averaged: A, B and A B. Private: nothing."""
    create, ask, average = owned(OWNERS)

    def init(adapters, enrolment):
        lora = adapters["main"]
        nothing = {m: jnp.zeros((*lora.a[m].shape[:-1], lora.b[m].shape[-1])) for m in lora.a}
        return create(adapters, enrolment)._replace(memory=nothing)

    def tell(state, work, adapters):
        told = average(state, work, adapters)
        share = work.weight / jnp.maximum(work.weight.sum(), 1e-12)
        came_back = work.weight.sum() > 0

        def lost(a, b, mean_a, mean_b):
            exact = jnp.einsum("kldr,klro->ldo", a * expand(share, a), b)
            return jnp.where(came_back, exact - mean_a[0] @ mean_b[0], 0)

        mean = told.bank["main"]
        lora = adapters["main"]
        memory = {m: state.memory[m] + lost(lora.a[m], lora.b[m], mean.a[m], mean.b[m]) for m in lora.a}
        return told._replace(memory=memory)

    def base(state, params):
        blocks = dict(params["blocks"])
        for module, delta in state.memory.items():
            kernel = blocks[module]["kernel"]
            blocks[module] = {**blocks[module], "kernel": (kernel + scale * delta).astype(kernel.dtype)}
        return {**params, "blocks": blocks}

    return Strategy("fedex", OWNERS, init, ask, tell, only_slot, base=base, received=lambda lanes, slots: lanes)
