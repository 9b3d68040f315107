"""Strategies that make a lane's steps in a way of their own: SCAFFOLD, Ditto, and what any of them is told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import BY_NAME, LOCAL, LORA, assert_close, begin, play

from fedrouter_jax import bank, client
from fedrouter_jax.strategies import ditto, fedit, scaffold
from fedrouter_jax.types import View


def test_scaffold_with_one_client_is_fedit(federation):
    """Its own control variate is everybody's: nothing is taken out of its steps."""
    alone = federation._replace(
        enrolment=federation.enrolment._replace(table=federation.enrolment.table[:1]), members=federation.members[:1]
    )
    local = dataclasses.replace(LOCAL, proximal=0.5, weight_decay=0.1)  # both are the adapter's alone
    update, plain = (
        client.make_client_update(federation.model.config, LORA, local, optimiser=optimiser)
        for optimiser in (scaffold().optimiser, None)
    )
    state, _ = play(alone, scaffold(), update)
    assert_close(state.bank, play(alone, BY_NAME["fedit"], plain)[0].bank)
    assert all(leaf.any() for leaf in jax.tree.leaves(state.memory))


def test_newcomers_are_not_among_those_whose_steps_scaffold_compares(federation):
    """Three of four clients train: as in a federation of three."""
    update = client.make_client_update(federation.model.config, LORA, LOCAL, optimiser=scaffold().optimiser)
    three = federation.members[:3]
    table = federation.enrolment.table
    banks = [
        play(
            federation._replace(enrolment=federation.enrolment._replace(table=table[:clients]), members=three),
            scaffold(told),
            update,
        )[0].bank
        for clients, told in ((4, 3), (3, None))
    ]
    assert_close(*banks)
    assert scaffold().traffic(None, 3, 100) == (200, 200)


def test_a_lanes_optimiser_is_told_what_the_round_began_with(federation):
    """In every phase, whose steps it is told: each step goes to that and one beyond."""
    steps = []

    def optimiser(adamw, rate, local):
        steps.append(local.steps)

        def update(gradients, state, adapters, received):
            return jax.tree.map(lambda start, now: start + 1 - now, received, adapters), state

        return optax.GradientTransformationExtraArgs(adamw.init, update)

    (phase,) = fedit().phases(1, 5)
    twice = fedit()._replace(phases=lambda round, rounds: (phase, phase), optimiser=optimiser)
    update = client.make_client_update(federation.model.config, LORA, LOCAL, optimiser=optimiser)
    after = play(federation, twice, update, rounds=1)[0].bank
    assert steps[:2] == [LOCAL.steps // 2, LOCAL.steps - LOCAL.steps // 2]
    assert_close(after, jax.tree.map(lambda leaf: leaf + 1, begin(federation, twice).bank))


def test_dittos_clients_are_answered_by_their_own_adapter(federation):
    state = begin(federation, ditto())
    weights = np.asarray(ditto().route(state, jnp.array([2, 0]), View(), "local"))
    names = bank.serving_names(ditto().owners, state.bank)
    assert [[names[i] for i in np.flatnonzero(row)] for row in weights] == [["own_2"], ["own_0"]]


def test_the_personal_adapters_of_ditto_are_locals_without_a_pull(federation):
    """In their half of the steps, the first of two."""

    def first_step(work, batch):
        return work, jax.tree.map(lambda leaf: leaf[:, :1], batch)

    def own(pull):
        update = client.make_client_update(federation.model.config, LORA, LOCAL, optimiser=ditto(pull).optimiser)
        return play(federation, ditto(pull), update)[0].bank["own"]

    local = play(federation, BY_NAME["local"], federation.update, change=first_step)[0].bank["main"]
    assert_close(own(0.0), local)
    pulled = zip(*map(jax.tree.leaves, (own(1.0), local)), strict=True)
    assert any((abs(one - other) > 1e-4).any() for one, other in pulled)
