"""Laws that every strategy obeys, whatever it computes. One test a law, over all strategies."""

import dataclasses
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CLIENTS,
    CLUSTERS,
    KEY,
    LOCAL,
    LORA,
    SLOTS,
    assert_close,
    begin,
    fit,
    inputs,
    nudge,
    play,
    rate,
    told,
)

from fedrouter_jax import bank, client, routing
from fedrouter_jax import server as server_lib
from fedrouter_jax.config import Config
from fedrouter_jax.federation import make_round
from fedrouter_jax.models import Blocks
from fedrouter_jax.strategies import (
    STRATEGIES,
    clustered,
    feddpa_f,
    feddpa_t,
    fedex,
    fedit,
    fedrouter,
    fedrouter_a,
    fedrouter_soft,
    fedrouter_warm,
    ffalora,
    flora,
    ifca,
)
from fedrouter_jax.types import FederationState, LoRA, Losses, View

# The rounds of these are FedRouter's and FedIT's, function for function: only routes and what they are given differ.
OTHERS = [make() for name, make in STRATEGIES.items() if name not in ("oracle", "centralised", "fedrouter-soft")]
BY_NAME = {strategy.name: strategy for strategy in OTHERS}
every_strategy = pytest.mark.parametrize("strategy", OTHERS, ids=lambda s: s.name)


@every_strategy
def test_the_way_lanes_are_mapped_changes_nothing(federation, strategy):
    """All at once, in chunks that do not divide the lanes, one by one, in groups that share packs."""
    expected, info = play(federation, strategy, nudge, None)
    for at_once, together in ((3, 1), (None, 2), (1, 3)):
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
    expected, info = play(federation, BY_NAME["fedrouter"], federation.update, None)
    assert np.isfinite(info.loss).all() and info.loss.shape == (CLIENTS, LOCAL.steps)
    for at_once, together in ((3, 1), (1, 4)):
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


@pytest.mark.parametrize("strategy", [fedrouter(), feddpa_t()], ids=lambda s: s.name)  # one phase, and two
def test_a_jitted_round_is_its_plain_loop(federation, strategy):
    """The law the round is built on: tell(state, collected [update(lane) for lane in ask(state, work)])."""
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
    def idle(base, adapters, batch, lr, keys, phases):
        return adapters, Losses(jnp.zeros((len(keys), LOCAL.steps)))

    state = begin(federation, strategy)
    assert_close(play(federation, strategy, idle, clusters_per_round=0)[0].bank, state.bank)


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
        state, _ = run(state, federation.model.params, *inputs(federation, t, participation=0.5), KEY)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == described
    assert run._cache_size() == 1
    assert int(state.round) == 3


@every_strategy
def test_what_a_client_owns_reaches_nobody_else(federation, strategy):
    """Another value of client 1's own leaves as they come back: what others hold and the server knows is the same."""
    state, (work, _) = begin(federation, strategy), inputs(federation, 1)
    asked = strategy.ask(state, work)
    spread = bank.spread(strategy.owners, asked)

    def change(owner, leaf):
        return leaf + 5.0 * bank.expand(work.client == 1, leaf) if owner == "client" else leaf

    after = [
        told(strategy, begin(federation, strategy), work, lanes)
        for lanes in (asked, jax.tree.map(change, spread, asked))
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
    sent = strategy.ask(state._replace(bank=poisoned), work)
    sizes = jax.tree.map(
        lambda owner, leaf: 0 if owner in ("client", "fixed", "copied") else leaf[0].nbytes,
        bank.spread(strategy.owners, sent),
        sent,
    )
    clean = jax.tree.map(lambda owner, leaf: owner == "client" or bool(jnp.isfinite(leaf).all()), spread, sent)
    assert all(jax.tree.leaves(clean))
    assert bank.wire_bytes(strategy.owners, state.bank) == sum(jax.tree.leaves(sizes))


def test_fedrouter_with_one_cluster_is_fedit(federation):
    one = federation.enrolment._replace(table=jnp.zeros_like(federation.enrolment.table), clusters=1)
    alone = federation._replace(enrolment=one)
    found = play(alone, BY_NAME["fedrouter"], nudge)[0].bank
    assert_close(found, play(alone, BY_NAME["fedit"], nudge)[0].bank)


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


def test_one_cluster_of_clients_is_fedit_and_one_each_is_local_after_the_first_round(federation):
    """Clustered, in its two extremes."""
    pooled = federation._replace(enrolment=federation.enrolment._replace(clusters=1))
    assert_close(play(pooled, clustered(), nudge)[0].bank, play(federation, BY_NAME["fedit"], nudge)[0].bank)
    each = federation._replace(enrolment=federation.enrolment._replace(clusters=CLIENTS))
    state = play(each, clustered(), nudge, rounds=1)[0]
    state = clustered().regroup(state._replace(memory=(jnp.eye(CLIENTS), jnp.ones(CLIENTS))))
    assert state.table[:, 0].tolist() == list(range(CLIENTS))
    assert all(bool((leaf == leaf[:1]).all()) for leaf in jax.tree.leaves(state.bank))


def test_clients_that_move_alike_are_one_cluster():
    similar = jnp.array([[1, 0.1, 0.9, 0], [0.1, 1, 0.2, 0.8], [0.9, 0.2, 1, 0.1], [0, 0.8, 0.1, 1]])
    bank = {"main": LoRA({"q": jnp.arange(2.0)[:, None]}, {"q": jnp.arange(2.0)[:, None]})}
    state = FederationState(jnp.ones((), int), bank, jnp.zeros((4, 1), int), (similar, jnp.ones(4)))
    assert clustered().regroup(state).table[:, 0].tolist() == [0, 1, 0, 1]
    # Who sent nothing takes no cluster of its own, however unlike it is to all: it joins the largest.
    late = jnp.eye(6).at[jnp.array([0, 2, 3, 5])[:, None], jnp.array([0, 2, 3, 5])].set(similar)
    met = jnp.array([1, 0, 1, 1, 0, 1])
    state = state._replace(table=jnp.zeros((6, 1), int), memory=(late, met))
    assert clustered().regroup(state).table[:, 0].tolist() == [0, 0, 1, 0, 0, 1]
    later = state._replace(round=jnp.full((), 2))
    assert clustered().regroup(later) is later


def test_feddpa_f_is_fedit_until_its_private_rounds(federation):
    """Three of five rounds are shared; then the global adapter stays, and the local ones start from it."""
    strategy = feddpa_f(private=0.4)
    fedit = BY_NAME["fedit"]._replace(pace=strategy.pace)  # whose schedule ends with the shared rounds
    shared = play(federation, fedit, federation.update, rounds=3)[0].bank["main"]
    bank = play(federation, strategy, federation.update, rounds=3)[0].bank
    assert_close(bank["global"], shared, 5e-4)
    for leaf, source in zip(*map(jax.tree.leaves, (bank["local"], bank["global"])), strict=True):
        np.testing.assert_array_equal(leaf, jnp.broadcast_to(source, leaf.shape))
    after = play(federation, strategy, federation.update, rounds=5)[0].bank
    for leaf, source in zip(*map(jax.tree.leaves, (after["global"], bank["global"])), strict=True):
        np.testing.assert_array_equal(leaf, source)
    assert any(bool((leaf[0] != leaf[1]).any()) for leaf in jax.tree.leaves(after["local"]))


def test_collaborating_tasks_in_their_extremes_are_fedrouter_and_fedit(federation):
    """One cluster with a shared A is FedIT, as is a start that never ends; gates of one nearest adapter are hard."""
    one = federation.enrolment._replace(table=jnp.zeros((CLIENTS, CLUSTERS), jnp.int32), clusters=1)
    found = play(federation._replace(enrolment=one), fedrouter_a(), nudge)[0].bank
    assert_close(found, play(federation, BY_NAME["fedit"], nudge)[0].bank)
    warm = play(federation, fedrouter_warm(together=2), nudge)[0].bank
    alike = jax.tree.map(lambda leaf: jnp.repeat(leaf, SLOTS, axis=0), found)
    assert_close(warm, alike)
    assert_close(play(federation, fedrouter_warm(together=0), nudge)[0], play(federation, fedrouter(), nudge)[0])
    state, clients = begin(federation, fedrouter()), jnp.array([0, 1, 2, 3])
    view = View(jax.random.normal(KEY, (CLIENTS, federation.model.config.width)))
    for mode in ("local", "global"):
        hard = fedrouter().route(state, clients, view, mode)
        np.testing.assert_array_equal(fedrouter_soft(nearest=1).route(state, clients, view, mode), hard)
        soft = fedrouter_soft(nearest=2, temperature=10.0).route(state, clients, view, mode)
        np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-6)
        np.testing.assert_array_equal(soft.argmax(axis=1), hard.argmax(axis=1))
        allowed = routing.candidates(state.table, clients, SLOTS, mode)
        np.testing.assert_array_equal((soft > 0).sum(axis=1), np.minimum(allowed.sum(axis=1), 2))
        assert not (soft[~allowed] > 0).any()


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


def test_fedalt_mixes_its_own_with_the_mean_of_the_others(federation):
    """After a round: rest is the others' mean; own and both gates have moved, each client its own way."""
    state, info = play(federation, BY_NAME["fedalt"], federation.update, rounds=1)
    own, rest = state.bank["own"], state.bank["rest"]
    for side in ("a", "b"):
        for leaf, mean in zip(getattr(own, side).values(), getattr(rest, side).values(), strict=True):
            for c in range(CLIENTS):
                others = jnp.stack([leaf[o] for o in range(CLIENTS) if o != c]).mean(axis=0)
                np.testing.assert_allclose(mean[c], others, rtol=1e-5, atol=1e-6)
    assert all(bool((leaf[0] != leaf[1]).any()) for leaf in jax.tree.leaves((own, rest.gate)))
    together, _ = play(federation, BY_NAME["fedalt"], federation.update, rounds=1, together=4)
    assert_close(together, state, 5e-4)


def test_the_rest_of_the_world_is_those_who_have_trained(federation):
    """Of four clients two train, the others come later: who has trained sees the other, the others both.

    When they have come, the first two are of the world as before.
    """
    strategy = BY_NAME["fedalt"]

    def absent(work, batch):
        return work._replace(weight=work.weight * (work.client < 2)), batch

    state, _ = play(federation, strategy, nudge, rounds=1, change=absent)
    for side in ("a", "b"):
        for leaf, rest in zip(*(getattr(state.bank[name], side).values() for name in ("own", "rest")), strict=True):
            mean = (leaf[0] + leaf[1]) / 2
            for who, expected in enumerate((leaf[1], leaf[0], mean, mean)):
                np.testing.assert_allclose(rest[who], expected, rtol=1e-5, atol=1e-6)
    work = inputs(federation, 2)[0]
    late = work._replace(weight=work.weight * (work.client >= 2))
    after = told(strategy, state, late, strategy.ask(state, late)).bank
    for leaf, rest in zip(after["own"].a.values(), after["rest"].a.values(), strict=True):
        np.testing.assert_allclose(rest[0], leaf[1:].mean(axis=0), rtol=1e-5, atol=1e-6)


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


def test_what_no_phase_moves_is_not_sent(federation):
    """FedDPA-F's last rounds are private; FedLEASE's scores rest in the first."""

    def sent(strategy):
        held = begin(federation, strategy).bank
        return [bank.wire_bytes(strategy.owners, held, strategy.phases(t, 5)) for t in range(1, 6)]

    adapter = sent(BY_NAME["fedit"])[0]
    assert sent(feddpa_f(private=0.4)) == [adapter] * 3 + [0] * 2
    first, *later = sent(BY_NAME["fedlease"])
    scores = 7 * 4 * sum(a.shape[0] * a.shape[1] for a in federation.adapters["main"].a.values())  # 2 M - 1, float32
    assert first == adapter and later == [adapter + scores] * 4


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
    old, new = (tree["blocks"]["q_proj"]["kernel"] for tree in (params, strategy.base(state, params)))
    assert_close(new, old + LORA.scale * state.memory["q_proj"])


def test_fedex_with_one_client_is_fedit(federation):
    def alone(work, batch):
        return work._replace(weight=work.weight * (work.client == 2)), batch

    found = play(federation, fedex(LORA.scale), federation.update, change=alone)[0]
    assert_close(found.bank, play(federation, BY_NAME["fedit"], federation.update, change=alone)[0].bank, 5e-4)
    assert max(float(jnp.abs(delta).max()) for delta in found.memory.values()) < 1e-6


def test_clustered_compares_the_first_updates_alone(federation):
    """The cosines of the clients' B after round 1, which later rounds leave as they are."""
    strategy, work = clustered(), inputs(federation, 1)[0]
    state, found = begin(federation, strategy), []
    for round in (1, 2):
        asked, key = strategy.ask(state, work), jax.random.key(round)
        lanes = jax.tree.map(lambda leaf, key=key: jax.random.normal(key, leaf.shape), asked)
        b = np.concatenate([np.asarray(leaf).reshape(CLIENTS, -1) for leaf in lanes["main"].b.values()], axis=1)
        state = told(strategy, state, work, lanes)
        found.append((state.memory[0], b / np.linalg.norm(b, axis=1, keepdims=True)))
    (first, unit), (second, _) = found
    order = np.argsort(work.client)
    assert_close(first, (unit @ unit.T)[order][:, order])
    assert_close(second, first)


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


def test_ifca_with_one_cluster_is_fedit_and_with_more_takes_the_slot_of_least_loss(federation):
    one = federation.enrolment._replace(table=jnp.zeros((CLIENTS, CLUSTERS), jnp.int32), clusters=1)
    assert_close(
        play(federation._replace(enrolment=one), ifca(), nudge)[0].bank,
        play(federation, BY_NAME["fedit"], nudge)[0].bank,
    )
    state = begin(federation, ifca())._replace(round=jnp.ones((), jnp.int32))
    work, _ = inputs(federation, 1)
    table = ifca().choose(state, work, lambda adapters: jnp.asarray([3.0, 2.0, 1.0, 2.0])).table
    assert (table[work.client, work.cluster] == 0).all()  # all slots fit alike: the first
    marked = state._replace(bank=jax.tree.map(lambda leaf: leaf * 0 + bank.expand(jnp.arange(SLOTS), leaf), state.bank))

    def losses(adapters):
        slot = jax.tree.leaves(adapters)[0].reshape(CLIENTS, -1)[:, 0].astype(int)
        return jnp.asarray([[3, 1, 2, 2], [2, 2, 1, 3], [1, 3, 3, 1]])[slot, jnp.arange(CLIENTS)] * 1.0

    table = ifca().choose(marked, work._replace(weight=jnp.asarray([1.0, 1.0, 1.0, 0.0])), losses).table
    assert table[work.client, work.cluster].tolist()[:3] == [2, 0, 1]
    assert table[3, work.cluster[3]] == state.table[3, work.cluster[3]]  # it did not take part


def test_the_loss_of_a_round_is_what_training_at_rate_zero_reports(federation):
    """No dropout, and half of the second step's labels: the mean over the response tokens of both."""
    decoder, params = federation.model.config, federation.model.params
    plain = dataclasses.replace(LORA, dropout=0.0)
    work, batch = inputs(federation, 1, together=2)
    group = jax.tree.map(lambda leaf: leaf[0], batch)
    group.rows.labels[1, :, ::2] = -1
    adapters = jax.tree.map(lambda leaf: leaf[:2], fedit().ask(begin(federation, fedit()), work))
    update, loss = client.make_client_update(decoder, plain, LOCAL), client.make_client_loss(decoder, plain)
    reported = update(params, adapters, group, 0.0, jax.random.split(KEY, 2), fedit().phases(1, 5))[1].loss
    tokens = jax.vmap(client.responses, (0, None))(group.rows, 2).T
    assert (tokens[:, 1] != tokens[:, 0]).all()
    assert_close(loss(params, adapters, group), (reported * tokens).sum(axis=1) / tokens.sum(axis=1))


def test_ffa_lora_never_moves_a(federation):
    before, after = begin(federation, ffalora()).bank["main"], play(federation, ffalora(), federation.update)[0].bank
    for leaf, old in zip(*map(jax.tree.leaves, (after["main"].a, before.a)), strict=True):
        np.testing.assert_array_equal(leaf, old)
    assert any(bool((leaf != old).any()) for leaf, old in zip(after["main"].b.values(), before.b.values(), strict=True))


@pytest.mark.parametrize("name", ["momentum", "adam", "yogi"])
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


@pytest.mark.parametrize("name", ["adam", "yogi"])
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
        m = 0.9 * m + 0.1 * moved
        v = 0.99 * v + 0.01 * moved**2 if name == "adam" else v - 0.01 * moved**2 * np.sign(v - moved**2)
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


def test_the_command_line_offers_every_strategy():
    named = typing.get_args(typing.get_type_hints(Config)["strategy"])[0]
    assert set(typing.get_args(named)) == set(STRATEGIES)
    assert all(make().name == name for name, make in STRATEGIES.items())


@pytest.mark.parametrize("strategy", [s for s in OTHERS if s.enrolling == "clustering"], ids=lambda s: s.name)
def test_a_text_at_a_centroid_is_answered_most_by_its_cluster(federation, strategy):
    """Whatever adapters serve beside those of the clusters."""
    state = begin(federation, strategy)
    slots = bank.of_clusters(strategy.owners, state.bank)
    view = View(federation.enrolment.router.centroids)
    weights = strategy.route(state, jnp.zeros(SLOTS, int), view, "global")
    np.testing.assert_array_equal(weights[:, np.array(slots)].argmax(axis=1), np.arange(SLOTS))
    assert len(jax.tree.leaves(bank.serving(state.bank))[0]) == weights.shape[1]
