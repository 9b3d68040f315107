"""FFA-LoRA: A stays as it was drawn, so averages are exact.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313.
The mean of the products A B_k is A times the mean of the B_k; half the bytes are sent.
"""

from fedrouter_jax.federation import only_slot, owned
from fedrouter_jax.types import LoRA, Phase, Strategy

OWNERS = {"main": LoRA(a="fixed", b="shared")}


def ffalora() -> Strategy:
    """One fixed A, one B. Averaged: B. Private: nothing."""
    return Strategy("ffalora", OWNERS, *owned(OWNERS), only_slot, phases=b_alone)


def b_alone(round, rounds):
    """The `phases` of an adapter whose A stands still."""
    return (Phase(train={"main": LoRA(a=False, b=True)}, weights={"main": 1.0}),)
