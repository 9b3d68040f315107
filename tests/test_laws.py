"""Laws that every strategy obeys, whatever it computes. One test a law, over all strategies."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    BY_NAME,
    CLIENTS,
    KEY,
    LOCAL,
    LORA,
    OTHERS,
    SLOTS,
    assert_close,
    begin,
    every_strategy,
    fit,
    inputs,
    nudge,
    play,
    rate,
    told,
)

from fedrouter_jax import bank, client, routing
from fedrouter_jax.config import Config
from fedrouter_jax.federation import make_round
from fedrouter_jax.models import Blocks
from fedrouter_jax.strategies import STRATEGIES, feddpa_f
from fedrouter_jax.types import LoRA, Phase, View, one_phase


@pytest.mark.parametrize("strategy", [s for s in OTHERS if s.phases is not one_phase], ids=lambda s: s.name)
@pytest.mark.parametrize("number", [1, 5])
def test_what_no_phase_moves_comes_back_as_it_went(federation, strategy, number):
    """Weight decay and a pull towards what was received do not move it; what some phase moves is moved."""
    local = dataclasses.replace(LOCAL, weight_decay=0.5, proximal=0.1)
    update = client.make_client_update(federation.model.config, LORA, local, optimiser=strategy.optimiser)
    work, batch = inputs(federation, 1)
    asked = jax.tree.map(lambda leaf: leaf[:1], strategy.ask(begin(federation, strategy), work))
    rows, phases = jax.tree.map(lambda leaf: leaf[0], batch), strategy.phases(number, 5)
    found, _ = update(federation.model.params, asked, rows, rate(1), jax.random.split(KEY, 1), phases)
    moves = zip(*(jax.tree.leaves(bank.spread(phase.train, asked)) for phase in phases), strict=True)
    for of_phases, new, old in zip(moves, *map(jax.tree.leaves, (found, asked)), strict=True):
        moved = np.any([np.broadcast_to(move, old.shape) for move in of_phases], axis=0)
        assert (np.asarray(new != old) & moved).any() == moved.any()
        np.testing.assert_array_equal(np.asarray(new)[~moved], np.asarray(old)[~moved])


@every_strategy
def test_the_way_lanes_are_mapped_changes_nothing(federation, strategy):
    """All at once, or one by one in groups that share packs; some also in uneven chunks, and all at once in groups."""
    expected, info = play(federation, strategy, nudge, None)
    more = ((3, 1), (None, 2)) if strategy.name in ("fedrouter", "ifca", "fedalt", "fedex", "clustered") else ()
    for at_once, together in ((1, 3), *more):
        found, other = play(federation, strategy, nudge, at_once, together=together)
        assert_close(found, expected)
        assert_close(other, info)


def test_a_lane_that_fills_the_last_group_up_counts_once(federation):
    """Eight lanes in three groups of three: the last one comes again, without rows."""
    plain, grouped = (
        play(federation, BY_NAME["fedrouter"], nudge, rounds=1, clusters_per_round=0, together=together)[0]
        for together in (1, 3)
    )
    assert_close(grouped, plain)


def test_groups_that_chunks_do_not_divide_all_come_back(federation):
    """Eight lanes, three at once: two chunks of three, and one of two."""
    all_at_once, in_chunks = (
        play(federation, BY_NAME["fedrouter"], nudge, at_once, rounds=1, clusters_per_round=0) for at_once in (None, 3)
    )
    for one, other in zip(in_chunks, all_at_once, strict=True):
        assert_close(one, other)


def test_real_lanes_with_dropout_may_be_mapped_any_way(federation):
    expected, info = play(federation, BY_NAME["fedrouter"], federation.update, 1)
    assert np.isfinite(info.loss).all() and info.loss.shape == (CLIENTS, LOCAL.steps)
    for at_once, together in ((3, 1), (None, 4)):
        found, other = play(federation, BY_NAME["fedrouter"], federation.update, at_once, together=together)
        # Adam divides by the gradient's size: where that is nearly zero, the last digit becomes visible.
        assert_close(found, expected, 5e-4)
        assert_close(other, info)


@pytest.mark.parametrize(
    ("blocks", "packs"), [(Blocks(remat=True), 1), (Blocks(unroll=True), 1), (Blocks(), 3), (Blocks(), 99)]
)
def test_how_gradients_run_blocks_and_packs_changes_nothing(federation, blocks, packs):
    strategy = BY_NAME["fedrouter"]
    update = client.make_client_update(federation.model.config, LORA, LOCAL, blocks, packs)
    expected, _ = play(federation, strategy, federation.update, rounds=1, together=4)
    assert_close(play(federation, strategy, update, rounds=1, together=4)[0], expected, 5e-4)


@pytest.mark.parametrize("name", ["fedrouter", "feddpa-t"])  # one phase, and two
def test_a_jitted_round_is_its_plain_loop(federation, name):
    """The law the round is built on: tell(state, collected [update(lane) for lane in ask(state, work)])."""
    strategy = BY_NAME[name]
    state = begin(federation, strategy)
    work, batch = inputs(federation, 1)
    adapters = strategy.ask(state, work)
    results = []
    for lane in range(len(work.client)):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, 0), work.client[lane]), work.cluster[lane])
        own = jax.tree.map(lambda leaf, lane=lane: leaf[lane : lane + 1], adapters)
        rows = jax.tree.map(lambda leaf, lane=lane: leaf[lane], batch)
        phases = strategy.phases(1, 5)
        results.append(federation.update(federation.model.params, own, rows, rate(1), key[None], phases)[0])
    expected = told(strategy, state, work, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *results))
    assert_close(play(federation, strategy, federation.update, rounds=1, at_once=1)[0], expected, 5e-4)


@pytest.mark.parametrize("name", ["fedrouter", "ifca"])  # ifca asks for losses, too
def test_a_round_of_many_lanes_needs_the_memory_of_few(federation, name):
    strategy, base = BY_NAME[name], federation.model.params
    loss = client.make_client_loss(federation.model.config, LORA)
    run = make_round(strategy, nudge, rate, 5, groups_at_once=1, loss=loss)
    work, batch = inputs(federation, 1)

    def temporary(times):
        inputs = jax.tree.map(lambda leaf: np.concatenate([leaf] * times), (work, batch))
        compiled = run.lower(begin(federation, strategy), base, *inputs, KEY).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    adapter = sum(leaf.nbytes for leaf in jax.tree.leaves(federation.adapters))
    assert temporary(16) - temporary(2) < adapter  # 56 lanes more


@every_strategy
def test_permuting_lanes_changes_nothing(federation, strategy):
    order = np.array([2, 0, 3, 1])
    shuffled, _ = play(federation, strategy, nudge, change=lambda *round: jax.tree.map(lambda x: x[order], round))
    assert_close(shuffled, play(federation, strategy, nudge)[0])


@every_strategy
def test_an_update_that_returns_its_input_leaves_the_bank(federation, strategy):
    """Of a method that averages products alone, these."""

    def idle(base, adapters, batch, lr, keys, phases):
        return adapters, jnp.zeros((len(keys), LOCAL.steps))

    def kept(state):
        whole = strategy.of_products and strategy.base is None
        return jax.tree.map(jnp.matmul, state.bank["main"].a, state.bank["main"].b) if whole else state.bank

    expected = kept(begin(federation, strategy))
    assert_close(kept(play(federation, strategy, idle, clusters_per_round=0)[0]), expected)


@every_strategy
def test_a_lane_of_weight_zero_moves_nothing(federation, strategy):
    def mute(work, batch):
        return work._replace(weight=work.weight * (work.client != 1)), batch

    def leave_out(work, batch):
        return jax.tree.map(lambda x: x[work.client != 1], (work, batch))

    assert_close(
        play(federation, strategy, nudge, change=mute)[0], play(federation, strategy, nudge, change=leave_out)[0]
    )


@every_strategy
def test_a_lane_that_is_not_finite_moves_nothing_and_is_reported(federation, strategy):
    def poison(base, adapters, batch, lr, keys, phases):
        adapters, losses = nudge(base, adapters, batch, lr, keys, phases)
        bad = batch.count[0] < 0
        return jax.tree.map(lambda leaf: jnp.where(bad, jnp.nan, leaf), adapters), losses

    def mark(work, batch):
        count = np.where(work.client[:, None] == 1, -1, batch.count)
        return work, batch._replace(count=count)

    def mute(work, batch):
        return work._replace(weight=work.weight * (work.client != 1)), batch

    found, info = play(federation, strategy, poison, change=mark)
    absent = play(federation, strategy, nudge, change=mute)[0]
    if strategy.choose is not None:  # it chose before it failed
        absent = absent._replace(table=found.table)
    assert_close(found, absent)
    assert info.rejected.tolist() == [False, True, False, False]


@every_strategy
def test_structure_never_changes_and_the_second_round_compiles_nothing(federation, strategy):
    run = make_round(strategy, nudge, rate, 5, loss=fit)
    state = begin(federation, strategy)
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for t in (1, 2, 3):
        state, info = run(state, federation.model.params, *inputs(federation, t, participation=0.75), KEY)
        np.testing.assert_allclose(info.learning_rate, rate(strategy.pace(t, 5)), rtol=1e-6)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == described
    assert run._cache_size() == 1
    assert int(state.round) == 3


@every_strategy
def test_what_a_client_owns_reaches_nobody_else(federation, strategy):
    """Another value of client 1's own leaves as they come back: what others hold and the server knows is the same."""
    state, (work, _) = begin(federation, strategy), inputs(federation, 1)
    asked = strategy.ask(state, work)
    held = {name: asked[name] for name in strategy.owners}
    spread = bank.spread(strategy.owners, held)

    def change(owner, leaf):
        return leaf + 5.0 * bank.expand(work.client == 1, leaf) if owner == "client" else leaf

    after = [
        told(strategy, begin(federation, strategy), work, lanes)
        for lanes in (asked, asked | jax.tree.map(change, spread, held))
    ]

    def others(owner, leaf):
        return jnp.delete(leaf, 1, axis=0) if owner == "client" else leaf

    one, other = ((jax.tree.map(others, spread, state.bank), state.memory) for state in after)
    assert_close(one, other, 0)


@every_strategy
def test_client_owned_leaves_never_travel(federation, strategy):
    """Poison them on the server: what is sent stays clean, and the bytes are those of the rest."""
    state = begin(federation, strategy)
    spread = bank.spread(strategy.owners, state.bank)
    poisoned = jax.tree.map(lambda owner, leaf: leaf * (jnp.nan if owner == "client" else 1), spread, state.bank)
    work, _ = inputs(federation, 1)
    asked = strategy.ask(state._replace(bank=poisoned), work)
    sent = {name: asked[name] for name in strategy.owners}
    sizes = jax.tree.map(
        lambda owner, leaf: 0 if owner in ("client", "fixed", "copied") else leaf[0].nbytes,
        bank.spread(strategy.owners, sent),
        sent,
    )
    clean = jax.tree.map(lambda owner, leaf: owner == "client" or bool(jnp.isfinite(leaf).all()), spread, sent)
    assert all(jax.tree.leaves(clean))
    assert bank.wire_bytes(strategy.owners, state.bank, [Phase(True, {})]) == sum(jax.tree.leaves(sizes))


def test_leaves_of_one_adapter_may_have_different_owners(federation):
    """A shared, B private (FedSA's owners): each half behaves as its owner says."""
    owners = {"main": LoRA(a="shared", b="client")}
    adapters = federation.adapters
    made = bank.create(owners, adapters, {"shared": 1, "cluster": 3, "client": CLIENTS})
    lanes = jax.tree.map(lambda leaf: jnp.stack([leaf * 0 + i for i in (1.0, 2.0, 6.0)]), adapters)
    slots = {"shared": jnp.zeros(3, int), "client": jnp.array([0, 2, 3])}
    weight = jnp.array([1.0, 1.0, 2.0])
    total = bank.totals(owners, made, slots, weight)
    sums = bank.add(owners, bank.nothing(owners, made, total), slots, lanes, weight, total)
    after = bank.means(owners, made, sums)
    for leaf in jax.tree.leaves(after["main"].a):
        np.testing.assert_allclose(leaf, np.full_like(leaf, 3.75))
    for leaf, before in zip(jax.tree.leaves(after["main"].b), jax.tree.leaves(made["main"].b), strict=True):
        assert [float(leaf[i].ravel()[0]) for i in (0, 2, 3)] == [1.0, 2.0, 6.0]
        np.testing.assert_array_equal(leaf[1], before[1])


@pytest.mark.parametrize("name, own", [("fedrouter-sum", "main"), ("fedalt", "own"), ("fedlease", "own")])
def test_weights_of_several_named_adapters_are_in_the_order_they_serve_in(federation, name, own):
    """The adapters that a route opens, by name, are those that answer: after a round, which sorts dicts anew."""
    strategy = BY_NAME[name]
    state, _ = play(federation, strategy, nudge, rounds=1)
    view = View(jax.random.normal(KEY, (CLIENTS, federation.model.config.width)))
    clients = jnp.arange(CLIENTS)
    weights = np.asarray(strategy.route(state, clients, view, "global"))
    if name == "fedrouter-sum":
        slots = routing.nearest(state.memory, view.embeddings)[0]
    else:
        slots = clients if name == "fedalt" else state.table[:, 0]
    others = {"fedrouter-sum": {"common_0"}, "fedalt": {"rest_{}"}}.get(name) or {f"other_{k}_{{}}" for k in (1, 2, 3)}
    names = bank.serving_names(strategy.owners, state.bank)
    for row, slot in zip(weights, np.asarray(slots).tolist(), strict=True):
        opened = {names[i] for i in np.flatnonzero(row)}
        assert opened == {f"{own}_{slot}"} | {other.format(slot) for other in others}


def test_what_no_phase_moves_is_not_sent(federation):
    """FedDPA-F's last rounds are private; FedLEASE's scores rest in the first; of RoLoRA's halves one does."""

    def sent(strategy):
        held = begin(federation, strategy).bank
        return [bank.wire_bytes(strategy.owners, held, strategy.phases(t, 5)) for t in range(1, 6)]

    adapter = sent(BY_NAME["fedit"])[0]
    assert sent(feddpa_f(together=3)) == [adapter] * 3 + [0] * 2
    half = sum(leaf.nbytes for leaf in federation.adapters["main"].b.values())
    assert sent(BY_NAME["rolora"]) == [half, adapter - half] * 2 + [half]
    assert sent(BY_NAME["fedrouter-b"]) == sent(BY_NAME["ffalora"]) == [half] * 5
    first, *later = sent(BY_NAME["fedlease"])
    scores = 7 * 4 * sum(a.shape[0] * a.shape[1] for a in federation.adapters["main"].a.values())  # 2 M - 1, float32
    assert first == adapter and later == [adapter + scores] * 4


def test_the_command_line_offers_every_strategy():
    named = typing.get_args(typing.get_type_hints(Config)["strategy"])[0]
    assert set(typing.get_args(named)) == set(STRATEGIES)
    assert all(make().name == name for name, make in STRATEGIES.items())


@pytest.mark.parametrize("strategy", [s for s in OTHERS if s.enrolling == "clustering"], ids=lambda s: s.name)
def test_a_text_at_a_centroid_is_answered_most_by_its_cluster(federation, strategy):
    """Whatever adapters serve beside those of the clusters."""
    state = begin(federation, strategy)
    (slots,) = bank.of_clusters(strategy.owners, state.bank)
    view = View(federation.enrolment.router.centroids)
    weights = strategy.route(state, jnp.zeros(SLOTS, int), view, "global")
    np.testing.assert_array_equal(weights[:, slots].argmax(axis=1), np.arange(SLOTS))
    assert len(jax.tree.leaves(bank.serving(state.bank))[0]) == weights.shape[1]
