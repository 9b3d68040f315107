"""Oracle router: FedRouter told the true tasks, in training and at inference: what clustering and routing can reach.

As in FedRouter's paper (arXiv 2604.00050). FedRouter itself with `--personalised-routing oracle` is something else: it
clusters as usual and is told the task of a test row only.
"""

import jax

from fedrouter_jax.bank import slots_of
from fedrouter_jax.federation import owned
from fedrouter_jax.types import Strategy

OWNERS = {"main": "cluster"}


def oracle() -> Strategy:
    """One slot a task. Averaged: A and B of a task. Private: rows only; everybody knows the task of every text."""

    def route(state, clients, view, mode):
        return jax.nn.one_hot(view.task_slots, slots_of(state.bank))

    return Strategy("oracle", OWNERS, *owned(OWNERS), route, enrolling="tasks")
