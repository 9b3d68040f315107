"""Enrolment and routing: recipes, local and global clusters, and who may be sent where."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrouter_jax import clusters, embed, experiment, routing
from fedrouter_jax.data import schedule, synthetic, tokens
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import first_blocks, hidden_states
from fedrouter_jax.presets import smoke
from fedrouter_jax.strategies import fedrouter
from fedrouter_jax.types import LoRA, View

KEY = jax.random.key(0)


def clients_of(tasks_per_client, rows=20, width=8, seed=0):
    """Well separated tasks: client i holds `tasks_per_client[i]`. Returns embeddings and true tasks."""
    rng = np.random.default_rng(seed)
    centres = 20 * rng.normal(size=(4, width)) + 100
    tasks = [np.repeat(held, rows) for held in tasks_per_client]
    return [(centres[t] + rng.normal(size=(len(t), width))).astype(np.float32) for t in tasks], tasks


@pytest.mark.parametrize("recipe", ["paper", "refined"])
@pytest.mark.parametrize("chosen", [False, True])
def test_tasks_are_found_and_test_rows_follow(recipe, chosen):
    """Given the counts or left to the silhouette, every row lands in the slot of its task."""
    embeddings, tasks = clients_of([[0, 1], [1, 2], [2, 3], [3, 0]])
    config = routing.RECIPES[recipe]
    found = routing.enroll(KEY, embeddings, config, None if chosen else 2, None if chosen else 4)
    assert found.clusters == 4 and found.table.shape == (4, 2)
    slot_of = {}
    for client, (labels, true) in enumerate(zip(found.labels, tasks, strict=True)):
        for label, task in zip(labels, true, strict=False):
            slot_of.setdefault(int(task), set()).add(int(found.table[client, label]))
    assert sorted(len(slots) for slots in slot_of.values()) == [1, 1, 1, 1]
    assert len(set.union(*slot_of.values())) == 4
    fresh, true = clients_of([[0, 1, 2, 3]], seed=0)
    slots, distances = routing.nearest(found.router, jnp.asarray(fresh[0]))
    assert [{int(s)} for s in slots] == [slot_of[int(t)] for t in true[0]]
    assert distances.shape == (80, 4)
    assert (set(found.silhouettes) == {"local 0", "local 1", "local 2", "local 3", "global"}) == chosen


def test_clients_may_hold_different_numbers_of_clusters():
    embeddings, _ = clients_of([[0, 1, 2], [2, 3]])
    found = routing.enroll(KEY, embeddings, routing.RECIPES["standardised"], None, None, max_clusters=5)
    assert (np.asarray(found.table) >= 0).sum(axis=1).tolist() == [3, 2]
    assert found.labels[1].max() == 1 and (found.labels[1] == -1).sum() == 20


def test_federated_statistics_are_the_pooled_ones():
    """A huge offset must not cost digits: some dimensions of a language model's states are like that."""
    rng = np.random.default_rng(0)
    parts = [(rng.normal(size=(n, 5)) * [1, 1, 1e-2, 3, 0] + [0, 5, 1e4, -3, 7]).astype(np.float32) for n in (7, 30)]
    mean, deviation = routing.statistics(parts)
    pooled = np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(mean, pooled.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(deviation[:4], pooled.std(axis=0)[:4], rtol=1e-5)
    assert deviation[4] == 1  # a constant dimension is left alone


def test_local_mode_stays_among_the_clients_own_slots_and_distances_are_to_all():
    embeddings, _ = clients_of([[0, 1], [2, 3]])
    found = routing.enroll(KEY, embeddings, routing.RECIPES["standardised"], 2, 4)
    strategy = fedrouter()
    state = strategy.init({"main": LoRA({}, {})}, found)
    foreign = jnp.asarray(embeddings[1])
    clients = jnp.zeros(len(foreign), jnp.int32)
    own = set(np.asarray(found.table[0]).tolist())
    local = np.asarray(strategy.route(state, clients, View(foreign), "local")).argmax(axis=1)
    anywhere = np.asarray(strategy.route(state, clients, View(foreign), "global")).argmax(axis=1)
    assert set(local.tolist()) <= own and not set(anywhere.tolist()) & own


def test_counts_that_rows_cannot_fill_are_bad_input():
    embeddings, _ = clients_of([[0, 1], [2]], rows=3)
    config = routing.RECIPES["refined"]
    with pytest.raises(UserError, match="client 1 has 3 rows but 5 local clusters"):
        routing.enroll(KEY, embeddings, config, 5, 4)
    with pytest.raises(UserError, match="5 global clusters .* have 4 centres"):
        routing.enroll(KEY, embeddings, config, 2, 5)
    with pytest.raises(UserError, match="2 global points are too few for a silhouette"):
        routing.enroll(KEY, embeddings, routing.RECIPES["paper"], 1, None)


def test_duplicate_rows_leave_local_clusters_empty_and_out_of_the_table():
    same = [np.ones((6, 4), np.float32), np.eye(6, 4, dtype=np.float32)]
    found = routing.enroll(KEY, same, routing.RECIPES["paper"], 2, 2)
    assert (np.asarray(found.table[0]) >= 0).sum() == 1 and set(found.labels[0].tolist()) == {0}


def test_centres_of_the_papers_recipe_count_alike_however_many_rows_they_stand_for():
    """Of five rows at 0, six at 1 and one at 2.5, which by its rows would have no centroid of its own."""
    places = [0, 0, 0, 0, 0, 2.5], [1] * 6
    clients = [np.outer(at, np.eye(4)[0]).astype(np.float32) for at in places]  # the shapes of the test above
    found = routing.enroll(KEY, clients, routing.RECIPES["paper"], 2, 2)
    np.testing.assert_allclose(np.sort(found.router.centroids[:, 0]), [0.5, 2.5])


@pytest.mark.parametrize(("depth", "skip"), [(None, 0), (0.5, 0), (0.5, 1)])
def test_packed_embeddings_are_those_of_single_texts(tiny, depth, skip):
    texts = [row.instruction for row in synthetic.make(train_per_task=1, test_per_task=1).train]
    ids = [*tokens.encode_texts(tiny.tokenizer, texts, 200), [7]]  # one token alone is not left out
    found = embed.embed(tiny.config, tiny.params, ids, depth, packs_at_once=2, skip=skip)
    for text, embedding in zip(ids, found, strict=True):
        row = jnp.asarray([text])
        config, params, _ = first_blocks(tiny.config, tiny.params, None, tiny.config.layers if depth is None else 1)
        alone = hidden_states(config, params, row, jnp.arange(len(text))[None], final_norm=depth is None)[0]
        alone = alone[skip if len(text) > 1 else 0 :].mean(axis=0)
        np.testing.assert_allclose(embedding, alone, rtol=1e-4, atol=1e-5)


def test_a_share_of_the_blocks_is_the_nearest_number_and_at_least_one(tiny):
    config = replace(tiny.config, layers=30)
    assert [embed.blocks(config, depth) for depth in (None, 0.5, 0.59, 0.01)] == [30, 15, 18, 1]


@pytest.mark.parametrize("name", ["standardised", "refined"])
def test_newcomers_move_no_centroid_and_belong_to_the_nearest(name):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 6)) * 20
    rows = [centres[[c % 3, (c + 1) % 3]].repeat(8, axis=0) + rng.normal(size=(16, 6)) for c in range(4)]
    clients = [held.astype(np.float32) for held in rows]
    key, recipe = jax.random.key(0), routing.RECIPES[name]
    found = routing.enroll(key, clients, recipe, 2, 3, newcomers=1)
    same = found._replace(table=found.table[:3])
    moved = [*clients[:3], clients[3] + 100]  # whatever they bring
    other = routing.enroll(key, moved, recipe, 2, 3, newcomers=1)
    for one, two in zip(jax.tree.leaves(same.router), jax.tree.leaves(other.router), strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(same.table, other.table[:3])
    slots = {int(found.table[3, k]) for k in range(2)}
    assert slots == {int(found.table[0, k]) for k in range(2)}  # client 3 holds what client 0 holds


def test_points_of_all_clients_are_made_at_once(monkeypatch):
    """One program whatever their numbers of rows; a client's are first, and zeros fill up."""
    rng, calls, prepare = np.random.default_rng(0), [], routing.prepare
    monkeypatch.setattr(routing, "prepare", lambda *given: calls.append(given) or prepare(*given))
    clients = [rng.normal(size=(rows, 8)).astype(np.float32) for rows in (3, 1, 5, 2)]
    points, present, router = routing._shared_space(clients, routing.RECIPES["standardised"], 3)
    assert len(calls) == 1 and points.shape == (4, 5, 8)
    for rows, here, held in zip(clients, points, present, strict=True):
        assert held.tolist() == [True] * len(rows) + [False] * (5 - len(rows)) and not here[len(rows) :].any()
        np.testing.assert_allclose(here[: len(rows)], prepare(router, rows), rtol=1e-5, atol=1e-7)


def test_an_oracle_is_enrolled_by_the_true_tasks():
    found = routing.one_cluster_a_task([[2, 0, 2], [1, 1]], total=3)
    assert found.table.tolist() == [[0, 2], [1, -1]] and found.clusters == 3
    assert found.labels.tolist() == [[1, 0, 1], [0, 0, -1]]


@pytest.mark.parametrize("held", [[[0, 1, 2, 3]] * 4, [[0, 1], [1, 2], [2, 3], [3, 0]], [[0, 1, 2, 3]] * 8])
def test_staggered_turns_reach_every_slot_in_every_round(held):
    """The same rows in the same slots, in another order: as many lanes at each slot as at any other."""
    rng = np.random.default_rng(0)
    table = np.array([rng.permutation(tasks) for tasks in held], np.int32)
    labels = np.tile(np.arange(len(held[0]), dtype=np.int32).repeat(20), (len(held), 1))
    found = routing.Enrolment(jnp.asarray(table), 4, (), labels, {})
    order = routing.staggered(found, 100)
    for client, labels in enumerate(found.labels):
        before, after = (np.asarray(e.table)[client, e.labels[client]] for e in (found, order))
        np.testing.assert_array_equal(before[labels >= 0], after[labels >= 0])
        np.testing.assert_array_equal(order.labels[client] == -1, labels == -1)
    sizes = np.array([[np.sum(row == k) for k in range(len(held[0]))] for row in order.labels])
    for t in range(1, 5):
        work = schedule.lanes(sizes, t, schedule.RoundConfig(), seed=0)
        lanes = np.bincount(np.asarray(order.table)[work.client, work.cluster], minlength=4)
        assert lanes.tolist() == [len(held) // 4] * 4


@pytest.mark.parametrize("clients, tasks, each", [(2, 4, 2), (2, 6, 3), (4, 8, 2), (4, 8, 3)])
def test_staggered_turns_with_several_clusters_a_round_leave_no_slot_out(clients, tasks, each):
    rng = np.random.default_rng(0)
    config, sizes = schedule.RoundConfig(clusters_per_round=each), np.ones((clients, tasks), int)
    for _ in range(10):
        table = np.stack([rng.permutation(tasks) for _ in range(clients)]).astype(np.int32)
        found = routing.Enrolment(jnp.asarray(table), tasks, (), np.tile(np.arange(tasks), (clients, 1)), {})
        order = np.asarray(routing.staggered(found, 100, each=each).table)
        works = [schedule.lanes(sizes, t, config, seed=0) for t in range(1, tasks + 1)]
        assert all(len(set(order[work.client, work.cluster].tolist())) == tasks for work in works)


def test_staggered_turns_of_clients_with_fewer_clusters_or_none_yet():
    """Local clusters come first in a client's line; a newcomer's stay as they are and count for nothing."""
    table = jnp.asarray([[2, -1, 0], [0, -1, -1], [0, 2, 1]], jnp.int32)
    labels = np.array([[0, 2, 2], [0, 0, -1], [2, 1, 0]], np.int32)
    found = routing.staggered(routing.Enrolment(table, 3, (), labels, {}), 100, newcomers=1)
    assert sorted(np.asarray(found.table)[0].tolist()[:2]) == [0, 2] and found.table[0, 2] == -1
    np.testing.assert_array_equal(np.asarray(found.table)[0, found.labels[0]], [2, 0, 0])
    np.testing.assert_array_equal(found.table[2], table[2])
    np.testing.assert_array_equal(found.labels[1:], labels[1:])


def test_staggered_turns_are_no_longer_than_the_run():
    """Turns of these clients would come again together after 232,792,560 rounds."""
    counts = (5, 7, 9, 11, 13, 16, 17, 19)
    table = np.array([[k if k < count else -1 for k in range(19)] for count in counts], np.int32)
    labels = np.maximum(table, 0)
    found = routing.staggered(routing.Enrolment(jnp.asarray(table), 19, (), labels, {}), 30)
    assert [sorted(row[row >= 0].tolist()) for row in np.asarray(found.table)] == [list(range(n)) for n in counts]


def test_clients_are_dealt_evenly_and_who_joins_later_takes_no_place():
    for seed in range(12):
        found = routing.one_cluster_each([3] * 8, 4, jax.random.key(seed), newcomers=4)
        assert sorted(found.table[:4, 0].tolist()) == [0, 1, 2, 3] and found.table[4:, 0].tolist() == [0] * 4


def test_staggered_turns_of_clients_whose_turns_come_again_at_different_times():
    """Clients of three and of two clusters: no more rounds without a lane at some slot than with turns of their own."""
    rng = np.random.default_rng(0)
    missed = []
    for _ in range(20):
        held = [rng.permutation(4)[: rng.integers(1, 4)] for _ in range(5)]
        table = np.full((5, 3), -1)
        for row, slots in zip(table, held, strict=True):
            row[: len(slots)] = slots
        labels = np.array([[0, 1, 2] if len(slots) == 3 else [0, len(slots) - 1, 0] for slots in held])
        own = routing.Enrolment(jnp.asarray(table, jnp.int32), 4, (), labels, {})
        missed.append([without_lanes(found) for found in (own, routing.staggered(own, 100))])
    before, after = np.mean(missed, axis=0)
    assert after < 0.9 * before, (before, after)


def without_lanes(found):
    """The share of rounds and slots that are held but not trained."""
    table = np.asarray(found.table)
    sizes = (table >= 0).astype(int)
    held = np.unique(table[table >= 0])
    works = [schedule.lanes(sizes, t, schedule.RoundConfig(), seed=0) for t in range(1, 13)]
    return np.mean([[slot not in table[work.client, work.cluster] for slot in held] for work in works])


def test_few_rows_do_not_take_a_centroid_from_many():
    """Three tasks of twenty rows on every client, two of them alike, and a single row of a fourth; three clusters."""
    rng = np.random.default_rng(0)
    centres, tasks = 6 * rng.normal(size=(4, 16)), np.repeat(np.arange(4), [20, 20, 20, 1])
    centres[1] = centres[:2].mean(axis=0)
    clients = [(centres[tasks] + rng.normal(size=(61, 16))).astype(np.float32) for _ in range(4)]
    found = routing.enroll(KEY, clients, routing.RECIPES["refined"], 4, 3)
    slots = [np.asarray(found.table)[c, found.labels[c]] for c in range(4)]
    for task in range(3):
        assert len({int(slot) for row in slots for slot in row[tasks == task]}) == 1
    assert len(set(slots[0][[0, 20, 40]].tolist())) == 3


def test_a_config_asks_for_staggered_turns():
    """An oracle of four clients that hold all four tasks: a Latin square instead of one order for everybody."""
    config = replace(smoke(), strategy="oracle", data=replace(smoke().data, scenario="all"))
    plain, staggered = (
        np.asarray(experiment.enroll(experiment.prepare(replace(config, rounds=rounds)), None).table)
        for rounds in (config.rounds, replace(config.rounds, turns="staggered"))
    )
    assert (plain == np.arange(4)).all()
    assert (np.sort(staggered, axis=0).T == np.arange(4)).all() and (np.sort(staggered, axis=1) == np.arange(4)).all()


def test_a_slot_that_holds_nobodys_rows_gets_no_text():
    table = jnp.asarray([[0, 2], [2, -1], [0, -1]])
    everywhere = routing.candidates(table, jnp.asarray([0, 1]), 4, "global")
    np.testing.assert_array_equal(everywhere, [[True, False, True, False]] * 2)
    own = routing.candidates(table, jnp.asarray([0, 1]), 4, "local")
    np.testing.assert_array_equal(own, [[True, False, True, False], [False, False, True, False]])
    prepared = SimpleNamespace(partition=SimpleNamespace(tasks=["a", "b"]))
    assert clusters.slot_names(prepared, np.array([[3, 0, 1], [1, 0, 2]])) == ["a", "", "b"]


def test_points_of_a_router_are_standardised_and_of_unit_length_where_it_says_so():
    rows = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    mean, deviation = np.arange(4.0, dtype=np.float32), np.array([1, 2, 3, 4], np.float32)
    expected = (rows - mean) / deviation
    for unit in (False, True):
        router = routing.Router(jnp.zeros((1, 4)), jnp.asarray(mean), jnp.asarray(deviation), jnp.asarray(unit))
        lengths = np.linalg.norm(expected, axis=1, keepdims=True) if unit else 1
        np.testing.assert_allclose(routing.prepare(router, jnp.asarray(rows)), expected / lengths, rtol=1e-5)


@pytest.mark.parametrize("name", ["standardised", "refined"])
def test_newcomers_do_not_change_how_many_clusters_are_found(name):
    """Three tasks; whoever joins later brings a fourth and far away one."""
    rng = np.random.default_rng(0)
    centres = np.eye(4, 6) * 30
    held = [[0, 1], [1, 2], [2, 0], [3, 3]]
    clients = [(centres[h].repeat(8, axis=0) + rng.normal(size=(16, 6))).astype(np.float32) for h in held]
    key, recipe = jax.random.key(0), routing.RECIPES[name]
    found = routing.enroll(key, clients, recipe, 2, None, newcomers=1)
    alone = routing.enroll(key, clients[:3], recipe, 2, None)
    assert found.clusters == 3
    assert found.silhouettes["global"] == pytest.approx(alone.silhouettes["global"], abs=1e-4)


@pytest.mark.parametrize("name", routing.RECIPES)
@pytest.mark.parametrize("newcomers", [0, 1])
def test_a_client_of_few_rows_limits_nobody_elses_clusters(name, newcomers):
    """Three clients of four tasks, and one of three rows, or two where it joins later."""
    rng = np.random.default_rng(0)
    centres = np.eye(4, 16) * 10

    def near(tasks):
        return (centres[tasks] + 0.1 * rng.normal(size=(len(tasks), 16))).astype(np.float32)

    clients = [near(np.arange(40) % 4) for _ in range(3)] + [near(np.arange(3 - newcomers))]
    found = routing.enroll(jax.random.key(0), clients, routing.RECIPES[name], None, 4, 5, newcomers)
    assert [len({*row[row >= 0].tolist()}) for row in np.asarray(found.table)[:3]] == [4, 4, 4]
    assert all(np.isfinite([*scores.values()]).all() for scores in found.silhouettes.values())  # what JSON can hold


def test_more_texts_than_are_packed_together_keep_their_order(tiny, monkeypatch):
    texts = [list(range(1 + i, 8 + 2 * i)) for i in range(7)]
    whole = embed.embed(tiny.config, tiny.params, texts, 0.5)
    monkeypatch.setattr(embed, "_WINDOW", 3)
    np.testing.assert_allclose(embed.embed(tiny.config, tiny.params, texts, 0.5), whole, rtol=1e-4, atol=1e-5)
