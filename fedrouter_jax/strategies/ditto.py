"""Ditto: everybody's adapter, and beside it a personal one that is pulled towards it.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, arXiv 2012.04221.

    client   v_i: steps on its loss + pull / 2 |v_i - w|^2, w as it was received;  then w_i: steps on its loss from w
    server   w = mean of w_i, weighted
    answer   v_i

The phases share a client's steps, so it costs what FedIT costs; the paper gives either as many.
"""

import jax
import optax

from fedrouter_jax import bank
from fedrouter_jax.federation import own_slot, owned
from fedrouter_jax.types import Phase, Strategy

OWNERS = {"global": "shared", "own": "client"}


def ditto(pull: float = 0.1) -> Strategy:
    """Averaged: global. Private: own, which answers. Without a pull it is Local's."""

    def optimiser(adamw, rate, local):
        def update(gradients, state, adapters, received):
            given = gradients["own"], adapters["own"], received["global"]
            pulled = jax.tree.map(lambda g, v, w: g + pull * (v - w), *given)
            return adamw.update(gradients | {"own": pulled}, state, adapters)

        return optax.GradientTransformationExtraArgs(adamw.init, update)

    def phases(round, rounds):
        return (
            Phase(train={"global": False, "own": True}, weights={"own": 1.0}),
            Phase(train={"global": True, "own": False}, weights={"global": 1.0}),
        )

    def route(state, clients, view, mode):
        own = own_slot(state, clients, view, mode)
        return bank.weights(state.bank, {"global": 0 * own[:, :1], "own": own})

    return Strategy("ditto", OWNERS, *owned(OWNERS), route, phases=phases, optimiser=optimiser)
