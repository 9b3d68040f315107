"""FedEx-LoRA: FedIT whose averages are exact.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models",
ACL 2025, arXiv 2410.09432.

    server   A, B = mean A_k, mean B_k                                   as FedIT
             W0  <- W0 + (alpha / r) (mean (A_k B_k) - A B)              what those two means lose

What was added to W0 is kept in the memory of the state. Every client can compute it from the adapters of the round, so
it costs as many adapters on the way down as there are lanes.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from fedrouter_jax.bank import expand
from fedrouter_jax.federation import only_slot, owned
from fedrouter_jax.models import values
from fedrouter_jax.types import Array, FederationState, LoRA, PyTree, Strategy

OWNERS = {"main": "shared"}
# What is kept is a small difference of products: rounded operands, an accelerator's default, would leave little of it.
exact = partial(jnp.einsum, precision="highest")


def unshifted(lora: LoRA) -> dict[str, Array]:
    """The memory of a base that is as it came: zeros {module: [layer, in, out]}."""
    return {m: jnp.zeros((*lora.a[m].shape[:-1], lora.b[m].shape[-1])) for m in lora.a}


def shifted(scale: float) -> Callable[[FederationState, PyTree], PyTree]:
    """`Strategy.base` of methods that add to W0: `scale` times what the memory has of each module."""

    def base(state, params):
        blocks = dict(params["blocks"])
        for module, delta in state.memory.items():
            kernel = values(blocks[module]["kernel"]).astype(jnp.float32)  # bfloat16 would round the shift away
            blocks[module] = {**blocks[module], "kernel": kernel + scale * delta}
        return {**params, "blocks": blocks}

    return base


def fedex(scale: float = 2.0) -> Strategy:
    """One shared slot and a shared shift of W0; `scale` is alpha / r. Averaged: A, B and A B. Private: nothing."""
    create, ask, halves, average = owned(OWNERS)

    def init(adapters, enrolment):
        return create(adapters, enrolment)._replace(memory=unshifted(adapters["main"]))

    def collect(state, work):
        """Beside the sums of A and B, those of A B."""
        nothing, add = halves(state, work)

        def added(sums, lanes, adapters):
            share, lora = lanes.weight / jnp.maximum(jnp.sum(work.weight), 1e-12), adapters["main"]
            products = {
                m: total + exact("kldr,klro->ldo", lora.a[m] * expand(share, lora.a[m]), lora.b[m])
                for m, total in sums[1].items()
            }
            return add(sums[0], lanes, adapters), products

        return (nothing, jax.tree.map(jnp.zeros_like, state.memory)), added

    def tell(state, sums):
        halves, products = sums
        told, share = average(state, halves), halves.share["shared"]
        mean = told.bank["main"]
        kept = {m: exact("ldr,lro->ldo", mean.a[m][0], mean.b[m][0]) for m in products}
        memory = {m: state.memory[m] + jnp.where(share > 0, products[m] / share - kept[m], 0) for m in products}
        return told._replace(memory=memory)

    return Strategy(
        "fedex",
        OWNERS,
        init,
        ask,
        collect,
        tell,
        only_slot,
        base=shifted(scale),
        traffic=lambda state, lanes, size: (size, lanes * size),
    )
