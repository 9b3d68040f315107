"""FLoRA: what clients learn is stacked and goes into the frozen weights, and every round starts a fresh adapter.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", NeurIPS 2024,
arXiv 2409.05976.

    client   A, B <- a fresh adapter of its own (A drawn, B zero); trains it
    server   W0  <- W0 + (alpha / r) sum_k p_k A_k B_k      the product of the stacked A_k and the stacked p_k B_k

Nothing is lost, as in FedEx-LoRA, but no adapter outlives its round. A client receives the stack of all and adds it to
its own W0; the sum is kept in the memory of the state. (Where clients miss rounds, the stacks of those would come on
top, which is not counted.) Ranks are the same for all clients here.
"""

import jax
import jax.numpy as jnp

from fedrouter_jax import shift
from fedrouter_jax.federation import only_slot, owned
from fedrouter_jax.keys import key_of
from fedrouter_jax.lora import draw
from fedrouter_jax.types import Strategy

OWNERS = {"main": "shared"}


def flora(scale: float = 2.0, seed: int = 0) -> Strategy:
    """A shared shift of W0; `scale` is alpha / r, `seed` that of fresh adapters. Averaged: A B. Private: nothing."""
    create = owned(OWNERS)[0]
    drawn = jax.random.fold_in(key_of(seed), 0xF1)  # apart from the keys of enrolment and rounds

    def init(adapters, enrolment):
        return create(adapters, enrolment)._replace(memory=shift.none(adapters["main"]))

    def ask(state, work):
        """Every lane draws an A of its own, or the stack of all would hardly have more directions than one of them."""
        empty = state.bank["main"]  # as in the beginning

        def fresh(client):
            key = jax.random.fold_in(jax.random.fold_in(drawn, state.round), client)
            return {
                m: draw(jax.random.fold_in(key, n), a.shape[1:]) for n, (m, a) in enumerate(sorted(empty.a.items()))
            }

        b = {m: jnp.repeat(leaf, len(work.client), axis=0) for m, leaf in empty.b.items()}
        return {"main": empty._replace(a=jax.vmap(fresh)(work.client), b=b)}

    def tell(state, sums):
        share, products = sums
        memory = {m: state.memory[m] + jnp.where(share > 0, total / share, 0) for m, total in products.items()}
        return state._replace(round=state.round + 1, memory=memory)

    moved = {"base": shift.base(scale), "traffic": shift.traffic, "of_products": True}
    return Strategy("flora", OWNERS, init, ask, shift.collect, tell, only_slot, **moved)
