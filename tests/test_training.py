"""Local steps and the server's: what the laws cannot see, for both of their sides use the same functions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KEY, LOCAL, LORA, assert_close, begin, inputs, nudge, play, rate

from fedrouter_jax import client, likelihood, lora
from fedrouter_jax.data import packing, tokens
from fedrouter_jax.federation import make_round
from fedrouter_jax.models import decoder, hidden_states, low_rank
from fedrouter_jax.strategies import fedit, ffalora
from fedrouter_jax.types import LoRA, Phase, one_phase


def test_the_learning_rate_ends_at_its_least_and_is_halfway_in_the_middle():
    config = client.LocalConfig(learning_rate=3.0, min_learning_rate=1.0)
    np.testing.assert_allclose([float(client.learning_rate(config, 4, t)) for t in (2, 4)], [2.0, 1.0])


def test_a_fresh_adapter_is_drawn_as_pefts(tiny):
    """Uniform within 1 / sqrt(in), each module and layer its own; B zero."""
    fresh = lora.init(jax.random.key(0), tiny.config, LORA)
    bound = tiny.config.width**-0.5
    for a in fresh.a.values():
        assert 0.98 * bound < float(jnp.abs(a).max()) <= bound
    assert (fresh.a["q_proj"] != fresh.a["v_proj"]).mean() > 0.99
    assert (fresh.a["q_proj"][0] != fresh.a["q_proj"][1]).mean() > 0.99
    assert not any(b.any() for b in fresh.b.values())


def test_every_lane_row_token_and_step_drops_other_inputs(federation):
    """Keys of a pack's tokens differ wherever lane, row or position do, and a step's rows see others in the next."""
    _, batch = inputs(federation, 1, together=2)
    count = int(batch.count[0, 0])
    packs = [jax.tree.map(lambda leaf, i=i: leaf[0, 0, i : i + 1], batch.rows) for i in range(count)]
    lanes = jax.random.split(KEY, 2)
    keys = [jax.random.key_data(client.token_keys(lanes, pack)) for pack in packs]
    found = np.concatenate([key[pack.packs.segments > 0] for key, pack in zip(keys, packs, strict=True)])
    assert count > 1 and len(np.unique(found, axis=0)) == len(found)
    twice = jax.tree.map(lambda leaf: np.repeat(leaf[0, :1], 2, axis=0), batch)  # one step's rows, two steps
    adapters = jax.tree.map(lambda leaf: leaf[:2], fedit().ask(begin(federation, fedit()), inputs(federation, 1)[0]))
    loss = federation.update(federation.model.params, adapters, twice, 0.0, lanes, one_phase(1, 1))[1]
    assert (loss[:, 0] != loss[:, 1]).all()


def test_every_step_of_every_phase_drops_other_inputs(federation, monkeypatch):
    """Three steps on the same rows, one of the first phase and two of the second; a draw from its key for a loss."""
    monkeypatch.setattr(client, "response_losses", lambda *given: jax.vmap(jax.random.uniform)(given[6]))
    update = jax.jit(client.make_client_update(federation.model.config, LORA, LOCAL))
    work, batch = inputs(federation, 1, together=2)
    adapters = jax.tree.map(lambda leaf: leaf[:2], fedit().ask(begin(federation, fedit()), work))
    thrice = jax.tree.map(lambda leaf: np.repeat(leaf[0, :1], 3, axis=0), batch)
    loss = update(federation.model.params, adapters, thrice, 0.0, jax.random.split(KEY, 2), 2 * one_phase(1, 1))[1]
    assert len(set(loss.ravel().tolist())) == 6


def test_every_layer_drops_other_inputs(tiny, monkeypatch):
    seen, real = [], decoder.low_rank

    def note(keys):
        seen.append(str(keys))
        return np.float32(0)

    def spy(x, module, adapter, rate):  # no debug callback: with JAX 0.12 Flax's scan takes no effects
        nothing = jax.ShapeDtypeStruct((), jnp.float32)
        return real(x, module, adapter, rate) + jax.pure_callback(note, nothing, jax.random.key_data(adapter.keys))

    monkeypatch.setattr(decoder, "low_rank", spy)
    lora = LoRA({"q_proj": jnp.ones((2, 64, 1))}, {"q_proj": jnp.ones((2, 1, 64))})
    text, keys = jnp.arange(3)[None], jax.random.split(KEY, (1, 3))
    hidden = hidden_states(tiny.config, tiny.params, text, text, None, lora, jnp.ones(1), dropout=0.5, keys=keys)
    jax.block_until_ready(hidden)
    assert len(set(seen)) == tiny.config.layers


def test_every_module_drops_other_inputs():
    x = jnp.ones((1, 64))
    a, b = {m: jnp.eye(64) for m in ("q_proj", "v_proj")}, {m: jnp.eye(64) for m in ("q_proj", "v_proj")}
    keys = jax.random.split(jax.random.key(0), 1)
    adapter = low_rank.Adapter(LoRA(a, b), None, keys)
    q, v = (low_rank.low_rank(x, m, adapter, 0.5) for m in ("q_proj", "v_proj"))
    assert 0.2 < float(jnp.mean(q != v)) < 0.8


def test_a_lane_draws_anew_in_every_round(federation):
    run = make_round(fedit(), nudge, rate, 5)
    state, inputs_of = begin(federation, fedit()), inputs(federation, 1)
    losses = []
    for _ in range(2):
        state, info = run(state, federation.model.params, *inputs_of, KEY)
        losses.append(np.asarray(info.loss))
    assert (losses[0] != losses[1]).all()  # the same rows: only the keys differ


def test_slots_are_chosen_without_dropout(federation):
    decoder, params = federation.model.config, federation.model.params
    work, batch = inputs(federation, 1, together=2)
    group = jax.tree.map(lambda leaf: leaf[0, :1], batch)
    adapters = jax.tree.map(lambda leaf: leaf[:2], fedit().ask(begin(federation, fedit()), work))
    plain = dataclasses.replace(LORA, dropout=0.0)
    found, expected = (client.make_client_loss(decoder, c)(params, adapters, group) for c in (LORA, plain))
    assert_close(found, expected)


def test_weight_decay_and_clip_are_those_of_the_config(federation):
    """Clipped to nothing, Adam's epsilon is all there is, and only decay moves B."""
    local = dataclasses.replace(LOCAL, clip=1e-14, weight_decay=0.5)
    update = client.make_client_update(federation.model.config, LORA, local)
    before = begin(federation, ffalora()).bank["main"]
    after = play(federation, ffalora(), update, rounds=1)[0].bank["main"]
    shrunk = (1 - float(rate(1)) * 0.5) ** LOCAL.steps
    assert_close(after.b, jax.tree.map(lambda b: b * shrunk, before.b))
    assert_close(after.a, before.a, 0)  # of FFA-LoRA's server


def test_fedprox_is_pulled_back_all_the_way(federation):
    """A strong pull: the second step undoes most of the first, where a push would leave it all."""

    def distance(proximal):
        local = dataclasses.replace(LOCAL, proximal=proximal, learning_rate=1e-3, min_learning_rate=1e-3)
        update = client.make_client_update(federation.model.config, LORA, local)
        after, before = play(federation, fedit(), update, rounds=1)[0].bank, begin(federation, fedit()).bank
        return sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(*map(jax.tree.leaves, (after, before)), strict=True))

    assert distance(100.0) < 0.2 * distance(0.0)


@pytest.mark.parametrize("names", [("main",), ("global", "local")])
def test_fedprox_pulls_by_mu_times_the_distance(federation, names, monkeypatch):
    """Two steps of plain descent on a loss of constant slope: the second is shorter by rate times mu, everywhere."""
    monkeypatch.setattr(client.optax, "adamw", lambda rate, weight_decay: client.optax.sgd(rate))
    slope = lambda *given: sum(jax.vmap(jnp.sum)(leaf) for leaf in jax.tree.leaves(given[3]))  # noqa: E731
    monkeypatch.setattr(client, "response_losses", slope)
    work, batch = inputs(federation, 1)
    (given,) = jax.tree.map(lambda leaf: leaf[:1], fedit().ask(begin(federation, fedit()), work)).values()
    asked, rows = dict.fromkeys(names, given), jax.tree.map(lambda leaf: leaf[0], batch)
    phases = (Phase(dict.fromkeys(names, True), dict.fromkeys(names, 1.0)),)

    def moved(proximal):
        local = dataclasses.replace(LOCAL, clip=1e9, proximal=proximal)
        update = jax.jit(client.make_client_update(federation.model.config, LORA, local))
        after = update(federation.model.params, asked, rows, 0.5, jax.random.split(KEY, 1), phases)[0]
        return jax.tree.map(jnp.subtract, after, asked)

    first, second = 1 / 2, (1 - 0.5 * 0.4) / 2
    assert_close(moved(0.4), jax.tree.map(lambda leaf: leaf * (first + second), moved(0.0)))


def test_the_last_phase_takes_the_steps_that_are_left_over(federation, monkeypatch):
    """Of seven steps two each, and three; a loss that says how much the phase's adapter counts."""
    monkeypatch.setattr(client, "response_losses", lambda *given: given[4]["main"] * jnp.ones(1))
    update = jax.jit(client.make_client_update(federation.model.config, LORA, LOCAL))
    work, batch = inputs(federation, 1)
    adapters = jax.tree.map(lambda leaf: leaf[:1], fedit().ask(begin(federation, fedit()), work))
    seven = jax.tree.map(lambda leaf: np.repeat(leaf[0, :1], 7, axis=0), batch)
    phases = tuple(one_phase(1, 1)[0]._replace(weights={"main": weight}) for weight in (1.0, 2.0, 3.0))
    loss = update(federation.model.params, adapters, seven, 0.0, jax.random.split(KEY, 1), phases)[1][0]
    np.testing.assert_allclose(loss / loss[0], [1, 1, 2, 2, 3, 3, 3], rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 8])
def test_packs_are_visited_once_in_any_number(at_once):
    """Five packs of a row each, all of them full: what fills the last turn predicts nothing."""
    batch = packing.batch([[tokens.Tokens([1, 2], [3], False)] * 5], packs=5, time=3, predicted=1)
    assert batch.count == 5

    def visit(total, rows):
        return total + jnp.array([jnp.sum(rows.labels >= 0), jnp.sum(rows.packs.tokens)])

    rows = jax.tree.map(jnp.asarray, batch.rows)
    assert likelihood.fold(rows, batch.count, at_once, visit, jnp.zeros(2)).tolist() == [5, 30]
