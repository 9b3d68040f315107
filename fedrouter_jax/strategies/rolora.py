"""RoLoRA: the halves of one adapter take turns, so averages are exact and both halves learn.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS 2025, arXiv 2502.01755.

    odd rounds    A stands still; clients train B, the server averages it
    even rounds   B stands still; clients train A, the server averages it

In a round all clients have the same other half, so the mean of the products A B_k is A times the mean of the B_k, and
the other way round; half the bytes are sent. B is first, for beside a B of zero A has no gradient.
"""

from fedrouter_jax.federation import only_slot, owned
from fedrouter_jax.types import LoRA, Phase, Strategy

OWNERS = {"main": "shared"}


def rolora() -> Strategy:
    """One slot. Averaged: B in odd rounds, A in even ones. Private: nothing."""

    def phases(round, rounds):
        return (Phase(train={"main": LoRA(a=round % 2 == 0, b=round % 2 == 1)}, weights={"main": 1.0}),)

    return Strategy("rolora", OWNERS, *owned(OWNERS), only_slot, phases=phases)
