"""Methods whose averages are of products, FedEx-LoRA, FlexLoRA and FLoRA, and those that need none."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    BY_NAME,
    CLIENTS,
    KEY,
    LORA,
    assert_close,
    begin,
    inputs,
    nudge,
    play,
    rate,
    told,
)

from fedrouter_jax import bank
from fedrouter_jax import federation as federation_lib
from fedrouter_jax.strategies import (
    fedex,
    fedrouter_b,
    flexlora,
    flora,
    rolora,
)
from fedrouter_jax.strategies.flexlora import nearest


def test_fedex_loses_nothing_of_the_mean_of_the_products(federation):
    """W0's shift and the averaged adapter together are the mean over clients of alpha / r times A B, every round."""
    strategy, work = fedex(scale=LORA.scale), inputs(federation, 1)[0]
    state = begin(federation, strategy)
    share = work.weight / work.weight.sum()
    for round in (1, 2):
        before = state.memory["q_proj"]
        asked, key = strategy.ask(state, work), jax.random.key(round)
        lanes = jax.tree.map(lambda leaf, key=key: jax.random.normal(key, leaf.shape), asked)
        state, lora = told(strategy, state, work, lanes), lanes["main"]
        exact = sum(share[k] * lora.a["q_proj"][k] @ lora.b["q_proj"][k] for k in range(CLIENTS))
        own = state.bank["main"].a["q_proj"][0] @ state.bank["main"].b["q_proj"][0]
        assert_close(state.memory["q_proj"] - before + own, exact, 1e-4)
    params = federation.model.params
    shifted = strategy.base(state, params)["blocks"]["q_proj"]
    assert_close(shifted["shift"], LORA.scale * state.memory["q_proj"])
    assert shifted["kernel"] is params["blocks"]["q_proj"]["kernel"]


@pytest.mark.parametrize("strategy", [rolora(), fedrouter_b()], ids=lambda s: s.name)
def test_where_one_half_stands_still_averages_are_exact(federation, strategy):
    """A slot becomes the mean of the products that its clients trained, whichever half it was."""
    state, params = begin(federation, strategy), federation.model.params
    for t in (1, 2):
        work, batch = inputs(federation, t, together=CLIENTS)
        group, keys = jax.tree.map(lambda leaf: leaf[0], batch), jax.random.split(KEY, CLIENTS)
        slots = np.asarray(federation_lib.slots(state, work)[jax.tree.leaves(strategy.owners)[-1]])
        lanes = federation.update(params, strategy.ask(state, work), group, rate(t), keys, strategy.phases(t, 5))[0]
        before, state, trained = state.bank["main"], told(strategy, state, work, lanes), lanes["main"]
        after, moves = bank.serving(state.bank), strategy.name == "rolora" and t == 2
        stands = [bool((after.a[module] == a).all()) for module, a in before.a.items()]
        assert not any(stands) if moves else all(stands)
        assert len(set(slots.tolist())) < CLIENTS  # some meet
        for slot in set(slots.tolist()):
            weight = work.weight * (slots == slot)
            for module, a in trained.a.items():
                mean = jnp.einsum("k,kldr,klro->ldo", weight / weight.sum(), a, trained.b[module])
                assert_close(after.a[module][slot] @ after.b[module][slot], mean)


def test_lanes_of_later_rounds_see_what_the_base_has_become(federation):
    strategy, params = fedex(LORA.scale), federation.model.params

    def weigh(base, adapters, batch, lr, keys, phases):
        adapters, losses = nudge(base, adapters, batch, lr, keys, phases)
        return adapters, losses * 0 + jnp.abs(base["blocks"]["q_proj"]["shift"]).sum()

    state, seen = begin(federation, strategy), []
    run = federation_lib.make_round(strategy, weigh, rate, 5)
    for t in (1, 2):
        expected = float(jnp.abs(strategy.base(state, params)["blocks"]["q_proj"]["shift"]).sum())
        state, info = run(state, params, *inputs(federation, t), KEY)
        np.testing.assert_allclose(info.loss, expected, rtol=1e-5)
        seen.append(expected)
    assert seen[0] == 0 < seen[1]


def test_fedex_with_one_client_is_fedit(federation):
    def alone(work, batch):
        return work._replace(weight=work.weight * (work.client == 2)), batch

    found = play(federation, fedex(LORA.scale), federation.update, change=alone)[0]
    assert_close(found.bank, play(federation, BY_NAME["fedit"], federation.update, change=alone)[0].bank, 5e-4)
    assert max(float(jnp.abs(delta).max()) for delta in found.memory.values()) < 1e-6


def test_flora_puts_the_mean_of_the_products_into_the_weights_and_begins_anew(federation):
    strategy, work = flora(scale=LORA.scale), inputs(federation, 1)[0]
    state = start = begin(federation, strategy)
    share, drawn = work.weight / work.weight.sum(), []
    for round in (1, 2):
        before, asked, key = state.memory["q_proj"], strategy.ask(state, work), jax.random.key(round)
        drawn += list(asked["main"].a["q_proj"])
        assert_close(asked["main"].b["q_proj"][1], start.bank["main"].b["q_proj"][0])
        lanes = jax.tree.map(lambda leaf, key=key: jax.random.normal(key, leaf.shape), asked)
        state, lora = told(strategy, state, work, lanes), lanes["main"]
        exact = sum(share[k] * lora.a["q_proj"][k] @ lora.b["q_proj"][k] for k in range(CLIENTS))
        assert_close(state.memory["q_proj"] - before, exact, 1e-4)
    assert_close(state.bank, start.bank)
    assert (asked["main"].a["q_proj"] != asked["main"].a["v_proj"]).mean() > 0.99  # each module its own
    bound = drawn[0].shape[-2] ** -0.5
    assert all(0.9 * bound < float(jnp.abs(a).max()) <= bound for a in drawn)
    for one, other in itertools.combinations(drawn, 2):  # of every client and round
        assert np.isclose(one, other, atol=1e-5).mean() < 0.01


def test_flexlora_is_the_nearest_adapter_to_the_mean_of_the_products(federation):
    """Beside NumPy's decomposition of the whole in float64, where the mean has the rank of all clients together."""
    strategy, work = flexlora(), inputs(federation, 1)[0]
    state = begin(federation, strategy)
    share = np.asarray(work.weight / work.weight.sum(), np.float64)
    asked = strategy.ask(state, work)
    lanes = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), asked)
    found = told(strategy, state, work, lanes).bank["main"]
    for module, a in lanes["main"].a.items():
        trained = zip(share, np.asarray(a, np.float64), np.asarray(lanes["main"].b[module], np.float64), strict=True)
        u, s, vt = np.linalg.svd(sum(weight * a @ b for weight, a, b in trained))
        rank = a.shape[-1]
        assert (s[:, CLIENTS * rank - 1] > 1e3 * s[:, CLIENTS * rank]).all()
        assert_close(found.a[module][0] @ found.b[module][0], u[..., :rank] * s[:, None, :rank] @ vt[:, :rank], 1e-4)
        assert_close(
            np.swapaxes(found.a[module][0], -1, -2) @ found.a[module][0], np.tile(np.eye(rank), (len(u), 1, 1))
        )


def test_a_rank_beyond_the_side_of_a_matrix_holds_all_of_it():
    matrix = jax.random.normal(jax.random.key(0), (6, 3))
    a, b = nearest(matrix, 5, 20)
    assert a.shape == (6, 5) and b.shape == (5, 3)
    assert_close(a @ b, matrix)


def test_flexlora_with_one_client_is_fedit_but_for_how_products_are_parted(federation):
    def alone(work, batch):
        return work._replace(weight=work.weight * (work.client == 2)), batch

    one, other = (
        play(federation, strategy, federation.update, change=alone, rounds=1)[0].bank["main"]
        for strategy in (flexlora(), BY_NAME["fedit"])
    )
    for module in one.a:
        assert_close(one.a[module] @ one.b[module], other.a[module] @ other.b[module], 5e-4)


def test_a_round_of_flora_with_one_client_is_fedits(federation):
    def alone(work, batch):
        return work._replace(weight=work.weight * (work.client == 2)), batch

    strategy, work = flora(LORA.scale), inputs(federation, 1)[0]
    lane = int(np.flatnonzero(work.client == 2)[0])
    begun = jax.tree.map(lambda leaf: leaf[lane], strategy.ask(begin(federation, strategy), work))
    found = play(federation, strategy, federation.update, change=alone, rounds=1)[0].memory
    same = federation._replace(adapters=begun)
    lora = play(same, BY_NAME["fedit"], federation.update, change=alone, rounds=1)[0].bank["main"]
    assert_close(found, {m: (lora.a[m] @ lora.b[m])[0] for m in lora.a}, 5e-4)
