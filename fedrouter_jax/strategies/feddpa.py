"""FedDPA: a global adapter for what is common, a local one for what is one's own, mixed per text.

Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024, arXiv 2403.19211.

    FedDPA-T  every round:  train the local adapter under  W0 x + a local + (1 - a) stop_gradient(global received);
                            train the global one alone, from what was received, and send it
    FedDPA-F  first FedIT; then every client copies the global adapter into its local one and trains that privately,
              with learning rates from the peak on again
    answer    w local + (1 - w) global,  w = scale * mean over S training prompts of cos(f(x), f(x_s)),
              f: the last token's last hidden state under the base model with the local adapter

The phases share a client's steps, so both cost what FedIT costs; the paper's FedDPA-T takes twice as many. The released
code puts w on the global adapter (`weight_on="global"`).
"""

from typing import Literal

import jax
import jax.numpy as jnp

from fedrouter_jax.federation import owned
from fedrouter_jax.types import Phase, Strategy

OWNERS = {"global": "shared", "local": "client"}
REFERENCES = 5  # S: training prompts of a client, with which a text is compared
WeightOn = Literal["local", "global"]


def feddpa_t(mix: float = 0.5, scale: float = 0.5, weight_on: WeightOn = "local") -> Strategy:
    """Both adapters from the first round on. Averaged: global. Private: local."""

    def phases(round, rounds):
        return (
            Phase(train={"global": False, "local": True}, weights={"global": 1 - mix, "local": mix}),
            Phase(train={"global": True, "local": False}, weights={"global": 1.0}),
        )

    route = _instance_wise(scale, weight_on)
    return Strategy("feddpa-t", OWNERS, *owned(OWNERS), route, phases=phases, references=REFERENCES)


def shared_rounds(rounds: int) -> int:
    """How many of the rounds FedDPA-F shares: all but the last fifth, of which one or more are private, never all."""
    return max(1, rounds - max(1, rounds // 5))


def feddpa_f(together: int = 20, scale: float = 0.5, weight_on: WeightOn = "local") -> Strategy:
    """The rounds after round `together` are private. Averaged: global. Private: local.

    A run takes `shared_rounds` of its rounds; in fewer than `together` none would be private, and this would be FedIT.
    A client that no private round draws (`--participation` below 1) answers with its copy of the global adapter.
    """

    def pace(round, rounds):
        """Either part goes through the whole schedule, the private one by the middles of its rounds."""
        alone = (round - together - 0.5) * rounds / max(1, rounds - together)
        return jnp.where(round > together, alone, round * rounds / together)

    def phases(round, rounds):
        alone = round > together
        shared = jnp.logical_not(alone)
        return (
            Phase(train={"global": shared, "local": alone}, weights={"global": shared * 1.0, "local": alone * 1.0}),
        )

    init, ask, collect, average = owned(OWNERS)

    def tell(state, sums):
        """In a private round the global adapter stays as it is."""
        told = average(state, sums)
        main = _pick(told.round > together, state.bank["global"], told.bank["global"])
        return told._replace(bank=told.bank | {"global": main})

    def follow(state):
        """After a shared one the local adapters are copies of it."""
        local = _pick(state.round > together, state.bank["local"], state.bank["global"])
        return state._replace(bank=state.bank | {"local": local})

    def traffic(state, lanes, size):
        """What clients go on from alone comes down in the first private round."""
        leaves = jax.tree.leaves(state.bank["global"])
        first = int(state.round) == together + 1
        return size, sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) if first else size

    return Strategy(
        "feddpa-f", OWNERS, init, ask, collect, tell, _instance_wise(scale, weight_on),
        phases=phases, pace=pace, derive=follow, traffic=traffic, references=REFERENCES,
    )  # fmt: skip


def _pick(which, new, old):
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), new, old)


def _instance_wise(scale: float, weight_on: WeightOn):
    def route(state, clients, view, mode):
        count = state.table.shape[0]
        own = jax.nn.one_hot(1 + clients, 1 + count)  # slot 0 is the global adapter
        here = _unit(view.hidden(own))
        known = _unit(view.references(jnp.eye(count, 1 + count, k=1)))[clients]
        w = scale * jnp.einsum("rw,rsw->rs", here, known, precision="highest").mean(axis=1, keepdims=True)
        local = w if weight_on == "local" else 1 - w
        return local * own + (1 - local) * jax.nn.one_hot(jnp.zeros_like(clients), 1 + count)

    return route


def _unit(vectors):
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
