"""FedEx-LoRA: FedIT whose averages are exact.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models",
ACL 2025, arXiv 2410.09432.

    server   A, B = mean A_k, mean B_k                                   as FedIT
             W0  <- W0 + (alpha / r) (mean (A_k B_k) - A B)              what those two means lose

What was added to W0 is kept in the memory of the state. Every client can compute it from the adapters of the round, so
it costs as many adapters on the way down as there are lanes. (Where clients miss rounds, those of the missed ones would
come on top, which is not counted.)
"""

import jax.numpy as jnp

from fedrouter_jax import shift
from fedrouter_jax.federation import only_slot, owned
from fedrouter_jax.types import Strategy

OWNERS = {"main": "shared"}


def fedex(scale: float = 2.0) -> Strategy:
    """One shared slot and a shared shift of W0; `scale` is alpha / r. Averaged: A, B and A B. Private: nothing."""
    create, ask, halves, average = owned(OWNERS)

    def init(adapters, enrolment):
        return create(adapters, enrolment)._replace(memory=shift.none(adapters["main"]))

    def collect(state, work):
        """Beside the sums of A and B, those of A B."""
        (nothing, add), (none, add_products) = halves(state, work), shift.collect(state, work)

        def added(sums, lanes, adapters):
            return add(sums[0], lanes, adapters), add_products(sums[1], lanes, adapters)

        return (nothing, none), added

    def tell(state, sums):
        halves, (share, products) = sums
        told = average(state, halves)
        mean = told.bank["main"]
        kept = {m: shift.exact("ldr,lro->ldo", mean.a[m][0], mean.b[m][0]) for m in products}
        memory = {m: state.memory[m] + jnp.where(share > 0, products[m] / share - kept[m], 0) for m in products}
        return told._replace(memory=memory)

    moved = {"base": shift.base(scale), "traffic": shift.traffic, "of_products": True}
    return Strategy("fedex", OWNERS, init, ask, collect, tell, only_slot, **moved)
