"""FedLEASE: the choice among experts in the model, and what the server makes of the first round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLIENTS, assert_close, begin, inputs, play, told

from fedrouter_jax import bank
from fedrouter_jax.models.low_rank import _compete
from fedrouter_jax.strategies import fedit, fedlease
from fedrouter_jax.strategies.fedlease import alike
from fedrouter_jax.types import Phase

EXPERTS = 3


@pytest.fixture(scope="module")
def grouped(federation):
    """FedLEASE after its first round: updates of clients 0 and 2 alike, of 1 and 3 another way.

    That is of B, which says who is alike; A of 0 and 1, and of 2 and 3.
    """
    strategy = fedlease(EXPERTS)
    state, work = begin(federation, strategy), inputs(federation, 1)[0]
    asked = strategy.ask(state, work)

    def ways(leaves, groups):
        def way(leaf):
            noise = jax.random.normal(jax.random.key(leaf.size), leaf.shape)
            return leaf + noise[np.array(groups)] + 0.01 * jax.random.normal(jax.random.key(3), leaf.shape)

        return jax.tree.map(way, leaves)

    own = asked["own"]._replace(a=ways(asked["own"].a, [0, 0, 1, 1]), b=ways(asked["own"].b, [0, 1, 0, 1]))
    sent = asked | {"own": own}
    return strategy, strategy.regroup(told(strategy, state, work, sent)), sent, work


def test_the_servers_optimiser_starts_all_experts_alike(federation, grouped):
    strategy, _, sent, work = grouped
    moved = jnp.zeros((EXPERTS, 2)).at[0].set(5.0)  # by everybody's first round
    state = begin(federation, strategy)._replace(server=[moved])
    after = strategy.regroup(told(strategy, state, work, sent))
    np.testing.assert_array_equal(after.server[0], np.zeros((EXPERTS, 2)))


def test_alike_clients_share_an_expert_which_is_their_mean(grouped):
    strategy, state, sent, work = grouped
    client = {int(c): lane for lane, c in enumerate(work.client)}
    groups = [[0, 2], [1, 3]]  # lanes
    table = np.asarray(state.table[work.client, 0])
    assert len({*table[groups[0]]}) == len({*table[groups[1]]}) == 1 and table[0] != table[1]
    assert len(client) == CLIENTS
    for lanes in groups:
        mean = jax.tree.map(lambda leaf, lanes=lanes: leaf[np.array(lanes)].mean(axis=0), sent["own"])
        expert = jax.tree.map(lambda leaf, at=table[lanes[0]]: leaf[at], state.bank["own"])
        assert_close((expert.a, expert.b), (mean.a, mean.b))


def test_who_missed_the_first_round_has_no_part_in_its_expert(federation, grouped):
    strategy, _, sent, work = grouped
    met = work._replace(weight=work.weight * (work.client < 3))
    state = strategy.regroup(told(strategy, begin(federation, strategy), met, sent))
    assert state.table[:, 0].tolist() == [0, 1, 0, 0]  # the last one joins the largest cluster
    own, mean = state.bank["own"], jax.tree.map(lambda leaf: leaf[np.array([0, 2])].mean(axis=0), sent["own"])
    assert_close(jax.tree.map(lambda leaf: leaf[0], (own.a, own.b)), (mean.a, mean.b))


def test_every_cluster_has_a_copy_of_the_other_expert_and_never_sends_it(grouped):
    strategy, state, *_ = grouped
    own, other = state.bank["own"], state.bank["other_1"]
    for cluster in (0, 1):
        copied = jax.tree.map(lambda leaf, at=cluster: leaf[at], (other.a, other.b))
        assert_close(copied, jax.tree.map(lambda leaf, at=1 - cluster: leaf[at], (own.a, own.b)))
    # Two experts of three: two seats for one's own, one for the other, none for a third.
    seats = {
        name: (np.asarray(adapter.gate["q_proj"][0]) != 0).any(axis=(0, 1)) for name, adapter in state.bank.items()
    }
    assert {name: seat.tolist() for name, seat in seats.items()} == {
        "own": [True, True, False], "other_1": [True], "other_2": [False],
    }  # fmt: skip
    sent = sum(leaf[0].nbytes for leaf in jax.tree.leaves((own, other.gate, state.bank["other_2"].gate)))
    assert bank.wire_bytes(strategy.owners, state.bank, [Phase(True, {})]) == sent


def test_experts_are_made_once_and_only_then_compete(grouped):
    strategy, state, *_ = grouped
    later = state._replace(round=jnp.asarray(2))
    assert strategy.regroup(later) is later
    first, then = (strategy.phases(t, 5)[0].weights for t in (1, 2))
    assert {name: float(weight) for name, weight in first.items()} == {"own": 1, "other_1": 0, "other_2": 0}
    assert {float(weight) for weight in then.values()} == {1}


def test_later_rounds_train_ones_own_expert_and_all_scores(federation, grouped):
    strategy, state, *_ = grouped
    work, batch = inputs(federation, 2)
    asked = strategy.ask(state, work)
    keys = jax.vmap(jax.random.key)(jnp.arange(len(work.client)))
    one = jax.tree.map(lambda leaf: leaf[:1], (asked, batch, keys))
    adapters, losses = federation.update(
        federation.model.params, one[0], jax.tree.map(lambda leaf: leaf[0], one[1]), 1e-2, one[2], strategy.phases(2, 5)
    )
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), adapters, one[0])
    assert np.isfinite(losses).all()
    assert min(jax.tree.leaves((moved["own"], moved["other_1"].gate))) > 0
    assert max(jax.tree.leaves((moved["other_1"].a, moved["other_1"].b, moved["other_2"]))) == 0


def test_what_is_sent_is_of_the_experts_that_were_found(grouped):
    """Two experts of at most three: a lane's own and 2 * 2 - 1 of 5 scores go up, both experts and those come down."""
    strategy, state, *_ = grouped
    own = state.bank["own"]
    expert = sum(leaf[0].nbytes for leaf in jax.tree.leaves((own.a, own.b)))
    score = sum(leaf[0, ..., 0].nbytes for leaf in own.gate.values())
    size = bank.wire_bytes(strategy.owners, state.bank, strategy.phases(2, 5))
    assert size == expert + 5 * score
    later = state._replace(round=jnp.asarray(2))
    assert strategy.traffic(later, 4, size) == (expert + 3 * score, 2 * expert + 3 * score)
    assert strategy.traffic(state, 4, expert) == (expert, expert)  # the first round: one adapter


def test_with_one_expert_it_is_fedit(federation):
    found, _ = play(federation, fedlease(1), federation.update, rounds=1)
    plain, _ = play(federation, fedit(), federation.update, rounds=1)
    own, main = found.bank["own"], plain.bank["main"]
    assert_close((own.a, own.b), (main.a, main.b), 5e-4)


def test_the_number_of_clusters_is_found():
    rng = np.random.default_rng(0)
    ways = rng.normal(size=(3, 2, 4, 5))
    b = {"q_proj": ways[[0, 1, 2, 0, 1, 2, 2]] + 0.05 * rng.normal(size=(7, 2, 4, 5))}
    assert alike(b, 6).tolist() == [0, 1, 2, 0, 1, 2, 2]
    assert alike(b, 2).max() == 1  # no more than there are slots
    assert alike({"q_proj": b["q_proj"][:2]}, 4).tolist() == [0, 1]
    late = np.concatenate([np.zeros((2, 2, 4, 5)), b["q_proj"]])  # two that sent nothing take no expert of their own
    assert alike({"q_proj": late}, 6).tolist() == [2, 2, 0, 1, 2, 0, 1, 2, 2]


@pytest.mark.parametrize("seats", [1, 3])
def test_competing_adapters_share_a_token_as_a_plain_loop_says(seats):
    """The softmax of the n highest scores, n the open slots that have a seat; on each row by itself."""
    rng = np.random.default_rng(seats)
    rows, width, slots, rank = 6, 5, 4, 2
    x, gate = rng.normal(size=(rows, width)), rng.normal(size=(width, slots, seats))
    if seats > 1:
        gate[:, 1, 1:] = gate[:, 2] = 0  # slot 1 has one seat, slot 2 none
    is_open = rng.random((rows, slots)) < 0.7
    is_open[0] = True
    gates = np.repeat(is_open * 2.0, rank, axis=1)
    found = np.asarray(_compete(jnp.asarray(x), jnp.asarray(gate), jnp.asarray(gates)))
    for row in range(rows):
        scores = {
            (slot, seat): float(x[row] @ gate[:, slot, seat])
            for slot in range(slots) for seat in range(seats)
            if is_open[row, slot] and (seats == 1 or gate[:, slot, seat].any())
        }  # fmt: skip
        best = sorted(scores, key=scores.get, reverse=True)[: len({slot for slot, _ in scores})]
        total = sum(np.exp(scores[seat]) for seat in best)
        for slot in range(slots):
            share = sum(np.exp(scores[seat]) for seat in best if seat[0] == slot) / total if best else 0
            if is_open[row, slot]:
                np.testing.assert_allclose(found[row, slot * rank : (slot + 1) * rank], share, rtol=1e-5, atol=1e-7)


def test_layers_and_modules_count_alike_whatever_their_lengths():
    """One of three groups clients otherwise than the others, by updates a hundred times as long."""
    ways = np.eye(2)[:, :, None]
    parts = [100 * ways[[0, 0, 1, 1]], ways[[0, 1, 0, 1]], ways[[0, 1, 0, 1]]]
    assert alike({"q_proj": np.stack(parts, axis=1)}, 2).tolist() == [0, 1, 0, 1]
    modules = dict(zip(("k_proj", "q_proj", "v_proj"), (part[:, None] for part in parts), strict=True))
    assert alike(modules, 2).tolist() == [0, 1, 0, 1]


def test_experts_are_found_by_average_linkage():
    """Ten degrees between neighbours of a chain: by single linkage no gap would be a border but the widest."""
    angles = np.deg2rad([0, 10, 20, 30, 40, 50, 60, 70, 81])
    b = {"q": np.stack([np.cos(angles), np.sin(angles)], axis=1)[:, None, :, None]}
    assert alike(b, 2).sum() in (4, 5)
