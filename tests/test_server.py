"""The server's optimiser: what it moves, what it remembers, and its formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BY_NAME, KEY, assert_close, begin, every_strategy, inputs, nudge, play, rate

from fedrouter_jax import bank
from fedrouter_jax import server as server_lib
from fedrouter_jax.federation import make_round
from fedrouter_jax.strategies import fedrouter
from fedrouter_jax.types import LoRA


@pytest.mark.parametrize("name", ["feddpa-f", "fedlease"])
def test_copies_are_of_what_the_servers_optimiser_made(federation, name):
    strategy, server = BY_NAME[name], server_lib.optimiser("adam", 0.01)
    run = make_round(strategy, nudge, rate, 5, server=server)
    state = begin(federation, strategy)
    state = state._replace(server=server_lib.init(server, strategy.owners, state.bank))
    state, _ = run(state, federation.model.params, *inputs(federation, 1), KEY)
    plain, _ = play(federation, strategy, nudge, rounds=1)
    own, copy = ("global", "local") if name == "feddpa-f" else ("own", "other_1")
    for side in ("a", "b"):
        made = (state.bank[own], state.bank[copy], plain.bank[own])
        for leaf, copied, other in zip(*(getattr(adapter, side).values() for adapter in made), strict=True):
            np.testing.assert_array_equal(copied[0], leaf[0])
            assert (leaf[0] != other[0]).any()  # or the server's step would not show


@pytest.mark.parametrize("name", ["momentum", "adagrad", "adam", "yogi"])
def test_the_servers_optimiser_moves_only_slots_that_came_back(federation, name):
    """Only client 0 trains, so only its slot moves; momentum's first step is the plain average."""
    server = server_lib.optimiser(name, 1.0 if name == "momentum" else 0.01)
    run = make_round(fedrouter(), nudge, rate, 5, server=server)
    start = begin(federation, fedrouter())
    bank = jax.tree.map(np.asarray, start.bank)
    state = start._replace(server=server_lib.init(server, fedrouter().owners, start.bank))
    work, batch = inputs(federation, 1)
    work = work._replace(weight=work.weight * (work.client == 0))
    state, _ = run(state, federation.model.params, work, batch, KEY)
    slot = int(federation.enrolment.table[0, work.cluster[0]])
    for leaf, old in zip(*map(jax.tree.leaves, (state.bank, bank)), strict=True):
        others = np.arange(len(old)) != slot
        np.testing.assert_array_equal(leaf[others], old[others])
        assert (leaf[slot] != old[slot]).any()
    if name == "momentum":
        plain, _ = make_round(fedrouter(), nudge, rate, 5)(
            begin(federation, fedrouter()), federation.model.params, work, batch, KEY
        )
        assert_close(state.bank, plain.bank)


@pytest.mark.parametrize("name", ["adagrad", "adam", "yogi"])
def test_adaptive_servers_are_algorithm_2_of_reddi_et_al(name):
    """Three steps by hand in numpy: no bias correction, and v starts at tau squared."""
    server, rng = server_lib.optimiser(name, 0.01), np.random.default_rng(0)
    x, m, v = rng.normal(size=5), np.zeros(5), np.full(5, 1e-6)
    found = jnp.asarray(x, jnp.float32)
    state = server.init(found)
    for _ in range(3):
        moved = rng.normal(size=5) * 10.0 ** rng.integers(-5, 0, 5)
        update, state = server.update(jnp.asarray(-moved, jnp.float32), state, found)
        found = found + update
        m = moved if name == "adagrad" else 0.9 * m + 0.1 * moved
        v = {
            "adagrad": v + moved**2,
            "adam": 0.99 * v + 0.01 * moved**2,
            "yogi": v - 0.01 * moved**2 * np.sign(v - moved**2),
        }[name]
        x = x + 0.01 * m / (np.sqrt(v) + 1e-3)
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-6)


@every_strategy
def test_the_servers_optimiser_remembers_nothing_of_what_is_not_the_servers(federation, strategy):
    held = begin(federation, strategy).bank
    states = server_lib.init(server_lib.optimiser("adam", 0.01), strategy.owners, held)
    owners = jax.tree.leaves(bank.spread(strategy.owners, held))
    for owner, leaf, state in zip(owners, jax.tree.leaves(held), states, strict=True):
        sizes = [part.shape for part in jax.tree.leaves(state)]
        assert sizes == ([leaf.shape] * 2 if owner in ("shared", "cluster") else [])


def test_momentum_is_fedavgm():
    """Hsu et al.: m <- 0.9 m + d, a step of rate m."""
    server, rng = server_lib.optimiser("momentum", 0.5), np.random.default_rng(0)
    x, m, found = np.ones(4), np.zeros(4), jnp.ones(4)
    state = server.init(found)
    for _ in range(3):
        moved = rng.normal(size=4)
        update, state = server.update(jnp.asarray(-moved, jnp.float32), state, found)
        found, m = found + update, 0.9 * m + moved
        x = x + 0.5 * m
    np.testing.assert_allclose(found, x, rtol=1e-5)


@pytest.mark.parametrize("name", ["momentum", "adagrad", "adam", "yogi"])
def test_a_slot_that_did_not_move_keeps_its_optimisers_state(name):
    server, owners = server_lib.optimiser(name, 0.1), {"main": "cluster"}
    before = {"main": LoRA({"q": jnp.zeros((2, 3))}, {"q": jnp.zeros((2, 3))})}
    states = server_lib.init(server, owners, before)
    for averaged in (1.0, jnp.array([[2.0], [0.0]])):  # both slots; then the first alone
        after = jax.tree.map(lambda leaf, to=averaged: leaf + to, before)
        last, (before, states) = states, server_lib.step(server, owners, before, after, states)
    for new, old in zip(*map(jax.tree.leaves, (states, last)), strict=True):
        np.testing.assert_array_equal(new[1], old[1])
        assert (new[0] != old[0]).all()


def test_a_slot_that_moved_in_one_number_moves_by_the_servers_optimiser():
    server, before = server_lib.optimiser("momentum", 0.5), {"main": jnp.zeros((2, 3))}
    states = server_lib.init(server, {"main": "shared"}, before)
    after, _ = server_lib.step(server, {"main": "shared"}, before, {"main": before["main"].at[0, 1].set(1.0)}, states)
    assert after["main"].tolist() == [[0, 0.5, 0], [0, 0, 0]]
