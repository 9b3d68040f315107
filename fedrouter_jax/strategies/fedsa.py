"""FedSA-LoRA: A is everybody's, B is one's own.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025, arXiv 2410.01463.
Both halves are trained; only A is sent and averaged. A client that never trained has B = 0, the base model.
"""

from fedrouter_jax.federation import own_slot, owned
from fedrouter_jax.types import LoRA, Strategy

OWNERS = {"main": LoRA(a="shared", b="client")}


def fedsa() -> Strategy:
    """One A, a B for every client. Averaged: A. Private: B."""
    return Strategy("fedsa", OWNERS, *owned(OWNERS), own_slot)
