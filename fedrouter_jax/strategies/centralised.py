"""Centralised: all rows in one place, one adapter. What federation is measured against, not a federated method.

One lane takes as many steps in a round as all clients of a federation together.
"""

from fedrouter_jax.federation import only_slot, owned
from fedrouter_jax.types import Strategy

OWNERS = {"main": "shared"}


def centralised() -> Strategy:
    """One slot, one lane. Averaged: nothing. Private: nothing."""
    return Strategy("centralised", OWNERS, *owned(OWNERS), only_slot, pooled=True)
