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
WeightOn = Literal["local", "global"]


def feddpa_t(mix: float = 0.5, scale: float = 0.5, weight_on: WeightOn = "local") -> Strategy:
    """Both adapters from the first round on. Averaged: global. Private: local."""

    def phases(round, rounds):
        return (
            Phase(train={"global": False, "local": True}, weights={"global": 1 - mix, "local": mix}),
            Phase(train={"global": True, "local": False}, weights={"global": 1.0, "local": 0.0}),
        )

    route = _instance_wise(scale, weight_on)
    return Strategy("feddpa-t", OWNERS, *owned(OWNERS), route, phases=phases, references=True)


def feddpa_f(private: float = 0.2, scale: float = 0.5, weight_on: WeightOn = "local") -> Strategy:
    """The last `private` share of the rounds is private: one or more, never all. Averaged: global. Private: local.

    A client that no private round draws (`--participation` below 1) answers with its copy of the global adapter.
    """

    def shared_of(rounds):
        return max(1, rounds - max(1, int(private * rounds)))

    def pace(round, rounds):
        """Either part goes through the whole schedule, the private one by the middles of its rounds."""
        shared = shared_of(rounds)
        alone = (round - shared - 0.5) * rounds / max(1, rounds - shared)
        return jnp.where(round > shared, alone, round * rounds / shared)

    def phases(round, rounds):
        alone = round > shared_of(rounds)
        shared = jnp.logical_not(alone)
        return (
            Phase(train={"global": shared, "local": alone}, weights={"global": shared * 1.0, "local": alone * 1.0}),
        )

    create, ask, collect, average = owned(OWNERS)

    def init(adapters, enrolment):
        return create(adapters, enrolment)._replace(memory=jnp.zeros((), jnp.int32))  # private rounds so far

    def note(state, work):
        """Beside the sums: in how many lanes the global adapter has moved."""
        nothing, add = collect(state, work)

        def noted(sums, lanes, adapters):
            received = ask(state, lanes)["global"]
            differ = [
                jnp.any(new != old, axis=tuple(range(1, old.ndim)))
                for new, old in zip(jax.tree.leaves(adapters["global"]), jax.tree.leaves(received), strict=True)
            ]
            moved = jnp.sum(jnp.any(jnp.stack(differ), axis=0) & (lanes.weight > 0))
            return add(sums[0], lanes, adapters), sums[1] + moved

        return (nothing, jnp.zeros((), jnp.int32)), noted

    def tell(state, sums):
        """In a private round the global adapter stays as it is."""
        averages, moved = sums
        told = average(state, averages)
        main = _pick(moved > 0, told.bank["global"], state.bank["global"])
        return told._replace(bank=told.bank | {"global": main}, memory=jnp.where(moved > 0, 0, state.memory + 1))

    def follow(state):
        """After a shared one the local adapters are copies of it."""
        return state._replace(
            bank=state.bank | {"local": _pick(state.memory == 0, state.bank["global"], state.bank["local"])}
        )

    def traffic(state, lanes, size):
        """What clients go on from alone comes down in the first private round."""
        last = state.memory == 1
        return size, sum(leaf.nbytes for leaf in jax.tree.leaves(state.bank["global"])) if last else size

    return Strategy(
        "feddpa-f", OWNERS, init, ask, note, tell, _instance_wise(scale, weight_on),
        phases=phases, pace=pace, derive=follow, traffic=traffic, references=True,
    )  # fmt: skip


def _pick(which, new, old):
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), new, old)


def _instance_wise(scale: float, weight_on: WeightOn):
    def route(state, clients, view, mode):
        count = state.table.shape[0]
        own = jax.nn.one_hot(1 + clients, 1 + count)  # slot 0 is the global adapter
        here = _unit(view.hidden(own))
        known = _unit(view.references(jnp.eye(count, 1 + count, k=1)))[clients]
        w = scale * jnp.einsum("rw,rsw->rs", here, known).mean(axis=1, keepdims=True)
        local = w if weight_on == "local" else 1 - w
        return local * own + (1 - local) * jax.nn.one_hot(jnp.zeros_like(clients), 1 + count)

    return route


def _unit(vectors):
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
