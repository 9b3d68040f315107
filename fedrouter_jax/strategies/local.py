"""Local: every client trains alone, nothing is exchanged. The lower bound of collaboration."""

from fedrouter_jax.federation import own_slot, owned
from fedrouter_jax.types import Strategy

OWNERS = {"main": "client"}


def local() -> Strategy:
    """One slot a client. Averaged: nothing. Private: everything."""
    return Strategy("local", OWNERS, *owned(OWNERS), own_slot)
