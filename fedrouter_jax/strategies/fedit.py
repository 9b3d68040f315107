"""FedIT: one adapter for everybody.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024, arXiv 2305.05644.
Every client trains the global adapter on all its rows; the server averages A and B separately.
"""

from fedrouter_jax.federation import only_slot, owned
from fedrouter_jax.types import Strategy

OWNERS = {"main": "shared"}


def fedit() -> Strategy:
    """One shared slot. Averaged: A and B. Private: nothing."""
    return Strategy("fedit", OWNERS, *owned(OWNERS), only_slot)
