"""What each round trains: turns of clusters, clients that take part, weights, draws of rows."""

import numpy as np
import pytest

from fedrouter_jax.data import schedule, tokens
from fedrouter_jax.data.rows import Row
from fedrouter_jax.models import tiny_tokenizer
from fedrouter_jax.types import Work

TOKENIZER = tiny_tokenizer()
ROW = Row("Say yes.\n### Response: no", "yes", "t")
SIZES = np.array([[5, 3, 0], [4, 0, 0], [1, 1, 7]])


def test_clusters_take_turns_and_empty_ones_are_skipped():
    config = schedule.RoundConfig()
    turns = [schedule.lanes(SIZES, t, config, 0).cluster.tolist() for t in range(1, 5)]
    assert turns == [[0, 0, 0], [1, 0, 1], [0, 0, 2], [1, 0, 0]]


def test_clusters_that_no_round_reaches_are_named():
    assert schedule.never_trained(SIZES, schedule.RoundConfig(rounds=2), 0) == [(2, 2)]
    assert schedule.never_trained(SIZES, schedule.RoundConfig(rounds=3), 0) == []


@pytest.mark.parametrize("weighting, expected", [("cluster", [5, 4, 1]), ("client", [8, 4, 9]), ("uniform", [1, 1, 1])])
def test_lanes_weigh_what_the_config_says(weighting, expected):
    work = schedule.lanes(SIZES, 1, schedule.RoundConfig(weighting=weighting), 0)
    assert work.weight.tolist() == expected


def test_a_client_without_rows_trains_nothing_and_the_others_go_on():
    """It has left, or is not there yet."""
    row = tokens.Tokens([1, 2], [3], False)
    for weighting in ("cluster", "client", "uniform"):
        sizes = np.array([[2, 1], [0, 0], [1, 3]])
        work = schedule.lanes(sizes, 1, schedule.RoundConfig(clusters_per_round=0, weighting=weighting), 0)
        assert work.client.tolist() == [0, 0, 1, 1, 2, 2]
        assert [bool(weight) for weight in work.weight] == [True, True, False, False, True, True]
        members = [[[row] * count for count in held] for held in sizes]
        batch = schedule.batches(work, members, 1, 2, 2, 32, 8, 0)
        assert (batch.count > 0).all(axis=1).tolist() == [True, True, False, False, True, True]


def test_all_clusters_in_a_round_never_counts_one_twice():
    work = schedule.lanes(SIZES, 1, schedule.RoundConfig(clusters_per_round=0), 0)
    assert work.client.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    active = [(c, k) for c, k, w in zip(*work, strict=True) if w > 0]
    assert sorted(active) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]


def test_partial_participation_draws_other_clients_each_round_and_reaches_all():
    config = schedule.RoundConfig(participation=0.4)
    drawn = [schedule.lanes(np.ones((10, 1), int), t, config, 0).client.tolist() for t in range(1, 21)]
    assert all(len(set(clients)) == 4 for clients in drawn)
    assert set().union(*map(set, drawn)) == set(range(10)) and len(set(map(tuple, drawn))) > 15


def test_rows_come_once_each_before_any_comes_twice():
    order = schedule.draw(5, 12, np.random.default_rng(0))
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4] and len(order) == 12
    order = schedule.draw(20, 40, np.random.default_rng(0))
    assert (order[:20] != order[20:]).any()  # another order in every pass


def test_lanes_draw_their_rows_by_seed_round_client_and_cluster():
    rows = [tokens.Tokens([number], [0], False) for number in range(20)]

    def drawn(seed=0, round=1, client=0, cluster=0):
        work = Work(*np.array([[client], [cluster], [1]]))
        return schedule.batches(work, [[rows] * 2] * 2, round, 1, 10, 64, 32, seed).rows.packs.tokens.tolist()

    assert drawn() == drawn()
    assert drawn() not in [drawn(seed=1), drawn(round=2), drawn(client=1), drawn(cluster=1)]


def test_a_lane_of_weight_zero_gets_no_rows_and_shapes_do_not_depend_on_rows():
    rows = tokens.encode(TOKENIZER, [ROW] * 6, "short", 128, 8)
    members = [[rows[:5], []], [rows[:1], rows[:2]]]
    sizes = np.array([[5, 0], [1, 2]])
    config = schedule.RoundConfig(clusters_per_round=0)
    work = schedule.lanes(sizes, 1, config, 0)
    batch = schedule.batches(work, members, 1, 3, 4, 128, 32, 0)
    assert batch.rows.packs.tokens.shape == (4, 3, 4, 128)
    assert batch.count[work.weight == 0].sum() == 0 and (batch.count[work.weight > 0] > 0).all()
    pairs = schedule.batches(work, members, 1, 3, 4, 128, 32, 0, together=3)  # four lanes: two groups of two
    assert pairs.rows.packs.tokens.shape == (2, 3, 8, 128)
    np.testing.assert_array_equal((pairs.rows.labels >= 0).sum((0, 2, 3)), (batch.rows.labels >= 0).sum((0, 2, 3)))


def test_half_a_client_takes_part():
    assert [schedule.taking_part(5, share) for share in (0.01, 0.29, 0.31, 0.5, 1.0)] == [1, 1, 2, 3, 5]
