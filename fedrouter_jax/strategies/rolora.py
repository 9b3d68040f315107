"""RoLoRA: the halves of one adapter take turns, so averages are exact and both halves learn.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS 2025, arXiv 2502.01755.

    odd rounds    A stands still; clients train B, the server averages it
    even rounds   B stands still; clients train A, the server averages it

In a round all clients have the same other half, so the mean of the products A B_k is A times the mean of the B_k, and
the other way round; half the bytes are sent. B is first, for beside a B of zero A has no gradient.
"""

import jax
import jax.numpy as jnp

from fedrouter_jax.federation import only_slot, owned
from fedrouter_jax.types import LoRA, Phase, Strategy

OWNERS = {"main": "shared"}


def rolora() -> Strategy:
    """One slot. Averaged: B in odd rounds, A in even ones. Private: nothing."""
    init, ask, collect, average = owned(OWNERS)

    def moves(round):
        return LoRA(a=round % 2 == 0, b=round % 2 == 1)

    def tell(state, sums):
        told, now = average(state, sums), moves(state.round + 1)
        old, new = state.bank["main"], told.bank["main"]  # a mean of equals may differ in the last digit

        def half(moves, old, new):
            return jax.tree.map(lambda before, after: jnp.where(moves, after, before), old, new)

        return told._replace(bank={"main": new._replace(a=half(now.a, old.a, new.a), b=half(now.b, old.b, new.b))})

    def phases(round, rounds):
        return (Phase(train={"main": moves(round)}, weights={"main": 1.0}),)

    return Strategy("rolora", OWNERS, init, ask, collect, tell, only_slot, phases=phases)
