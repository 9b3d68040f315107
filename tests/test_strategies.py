"""What single strategies do that no law over all of them asks for."""

import inspect
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLIENTS, KEY, SLOTS, assert_close, begin, inputs, told
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from fedrouter_jax import client, lora, routing
from fedrouter_jax import method as method_lib
from fedrouter_jax.config import Config, EvaluationConfig
from fedrouter_jax.data.schedule import RoundConfig
from fedrouter_jax.presets import smoke
from fedrouter_jax.strategies import (
    STRATEGIES,
    clustered,
    feddpa_f,
    feddpa_t,
    fedrouter,
    fedrouter_soft,
    fedrouter_warm,
    ifca,
)
from fedrouter_jax.strategies.feddpa import shared_rounds
from fedrouter_jax.types import FederationState, LoRA, Phase, View, Work

SMALL = LoRA({"q": jnp.zeros((1, 2, 1))}, {"q": jnp.zeros((1, 1, 2))})


@pytest.mark.parametrize("make", [clustered, ifca])
def test_a_clients_texts_go_to_the_slot_of_its_cluster(federation, make):
    state = begin(federation, make())._replace(table=jnp.array([[2], [0], [1], [2]]))
    weights = make().route(state, jnp.array([1, 0, 3, 2]), View(), "local")
    np.testing.assert_array_equal(weights, np.eye(SLOTS)[[0, 2, 2, 1]])


def test_clusters_of_clients_start_from_what_the_first_round_made():
    bank = {"main": LoRA({"q": jnp.array([[5.0], [1.0]])}, {"q": jnp.array([[6.0], [2.0]])})}
    server = [jnp.array([7.0, 3.0])] * 2
    state = FederationState(jnp.ones((), int), bank, jnp.zeros((2, 1), int), (jnp.eye(2), jnp.ones(2)), server)
    found = clustered().regroup(state)
    leaves = [leaf.ravel().tolist() for leaf in jax.tree.leaves((found.bank, found.server))]
    assert leaves == [[value, value] for value in (5, 6, 7, 7)]


@pytest.mark.parametrize("seed", range(4))
def test_clients_are_clustered_by_wards_linkage_of_their_directions(seed):
    ways = np.random.default_rng(seed).normal(size=(40, 3))
    ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    bank = {"main": LoRA({"q": jnp.zeros((4, 1))}, {"q": jnp.zeros((4, 1))})}
    state = FederationState(jnp.ones((), int), bank, jnp.zeros((40, 1), int), (ways @ ways.T, np.ones(40)))
    found, expected = clustered().regroup(state).table[:, 0], AgglomerativeClustering(4).fit_predict(ways)
    assert adjusted_rand_score(found, expected) == 1


def test_in_ifcas_first_round_clients_train_the_slot_they_were_dealt(federation):
    state, (work, _) = begin(federation, ifca()), inputs(federation, 1)
    table = ifca().choose(state, work, lambda adapters: jnp.zeros(CLIENTS)).table
    np.testing.assert_array_equal(table, state.table)


def test_feddpa_compares_a_text_with_its_clients_own_prompts():
    strategy = feddpa_t(scale=0.5)
    state = strategy.init(dict.fromkeys(strategy.owners, SMALL), routing.one_cluster_each([3, 3]))
    asked = []

    def hidden(weights):
        asked.append(weights.tolist())
        return jnp.array([[2.0, 0.0], [2.0, 0.0]])

    def references(weights):
        asked.append(weights.tolist())
        prompts = jnp.array([[0.0, 5.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [7.0, 0.0]])
        return jnp.stack([prompts, prompts[:, ::-1]])

    view = View(hidden=hidden, references=references)
    weights = strategy.route(state, jnp.array([0, 1]), view, "local")
    assert asked == [[[0, 1, 0], [0, 0, 1]]] * 2  # texts and prompts, each client's under its own local adapter
    # Of five prompts two point the text's way, or three: the mean of cosines, whatever the lengths.
    np.testing.assert_allclose(weights, [[0.8, 0.2, 0], [0.7, 0, 0.3]], atol=1e-6)


def test_feddpa_f_has_a_private_round_however_few_there_are():
    """The last of three, of which a fifth is less than one."""
    config = replace(smoke(), strategy="feddpa-f")
    strategy = method_lib.strategy(config, None)
    shared = [bool(strategy.phases(t, 3)[0].train["global"]) for t in (1, 2, 3)]
    assert config.rounds.rounds == 3 and shared == [True, True, False]
    assert [shared_rounds(rounds) for rounds in (1, 2, 6, 25)] == [1, 1, 5, 20]  # nor is the only one private


def test_the_private_rounds_of_feddpa_f_have_learning_rates_of_their_own():
    """Both parts go from the peak to the least: five private rounds of 25 are not the foot of one cosine."""
    config = client.LocalConfig(learning_rate=1.0, min_learning_rate=0.0)
    rates = [float(client.learning_rate(config, 25, feddpa_f().pace(t, 25))) for t in range(1, 26)]
    assert rates[:20] == sorted(rates[:20], reverse=True) and rates[20:] == sorted(rates[20:], reverse=True)
    np.testing.assert_allclose([rates[19], np.mean(rates[20:])], [0, 0.5], atol=1e-6)
    np.testing.assert_allclose(client.learning_rate(config, 6, feddpa_f(together=5).pace(6, 6)), 0.5, atol=1e-6)


def test_what_private_rounds_start_from_comes_down_once(federation):
    """Two of five rounds are private: the average of the third is received before the first of them."""
    strategy, size = feddpa_f(together=3), 100
    held = begin(federation, strategy)
    adapter = sum(leaf.nbytes for leaf in jax.tree.leaves(held.bank["global"]))
    after = [(held._replace(round=jnp.asarray(done)), sent) for done, sent in ((3, size), (4, 0), (5, 0))]
    assert [strategy.traffic(state, 4, sent) for state, sent in after] == [(size, size), (0, adapter), (0, 0)]


def test_a_warm_start_is_the_mean_of_those_that_came_back(federation):
    """Client 0, which shares a slot with client 2, is rejected."""
    strategy, (work, _) = fedrouter_warm(), inputs(federation, 1)
    state = begin(federation, strategy)
    lanes = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape), strategy.ask(state, work))
    back = work.weight * (work.client != 0)
    nothing, add = strategy.collect(state, work)
    found = strategy.tell(state, add(nothing, work._replace(weight=back), lanes)).bank
    mean = jax.tree.map(lambda leaf: jnp.tensordot(back / back.sum(), leaf, 1), lanes)
    assert_close(found, jax.tree.map(lambda leaf, own: jnp.broadcast_to(leaf, own.shape), mean, found), 1e-4)


def test_the_sum_is_trained_as_it_answers():
    (phase,) = STRATEGIES["fedrouter-sum"]().phases(1, 5)
    assert phase == Phase(train={"common": True, "main": True}, weights={"common": 1.0, "main": 1.0})


def test_soft_gates_are_a_softmax_of_distances(federation):
    state = begin(federation, fedrouter())
    view = View(jax.random.normal(KEY, (CLIENTS, federation.model.config.width)))
    soft = fedrouter_soft(nearest=SLOTS, temperature=0.3).route(state, jnp.arange(CLIENTS), view, "global")
    away = np.asarray(routing.nearest(state.memory, view.embeddings)[1], np.float64)
    expected = np.exp((away.min(axis=1, keepdims=True) - away) / 0.3)
    np.testing.assert_allclose(soft, expected / expected.sum(axis=1, keepdims=True), rtol=1e-3, atol=1e-6)


def test_the_numbers_of_methods_are_those_of_their_papers_and_of_committed_runs():
    """No config holds these, so that nobody could tell by a run that they had changed."""
    made = {name: inspect.signature(STRATEGIES[name]).parameters for name in STRATEGIES}
    found = {
        name: {key: parameter.default for key, parameter in made[name].items()}
        for name in ("ditto", "fedrouter-soft", "feddpa-t", "feddpa-f")
    }
    assert found == {
        "ditto": {"pull": 0.1},
        "fedrouter-soft": {"nearest": 2, "temperature": 0.1},
        "feddpa-t": {"mix": 0.5, "scale": 0.5, "weight_on": "local"},
        "feddpa-f": {"together": 20, "scale": 0.5, "weight_on": "local"},
    }


def test_methods_are_given_what_they_route_by():
    """FedDPA's S of its paper; the centroids of clustered rows; slots dealt at random."""
    of = {name: make() for name, make in STRATEGIES.items()}
    assert {name: method.references for name, method in of.items() if method.references} == {
        "feddpa-t": 5, "feddpa-f": 5
    }  # fmt: skip
    by_kind = {
        kind: {name for name, method in of.items() if method.enrolling == kind}
        for kind in ("clustering", "random", "tasks")
    }
    assert by_kind["random"] == {"ifca"} and by_kind["tasks"] == {"oracle"}
    assert by_kind["clustering"] == {name for name in of if name.startswith("fedrouter")}


def test_soft_gates_leave_a_row_whose_task_is_told_to_one_adapter(federation):
    state = begin(federation, fedrouter_soft())
    view = View(jax.random.normal(KEY, (2, federation.model.config.width)), jnp.array([2, 0]))
    weights = fedrouter_soft().route(state, jnp.array([0, 1]), view, "oracle")
    np.testing.assert_array_equal(weights, np.eye(SLOTS)[[2, 0]])


def test_what_comes_down_is_counted(federation):
    """FedEx: every client's adapter; IFCA: every slot's."""
    fedex = STRATEGIES["fedex"]()
    assert fedex.traffic(begin(federation, fedex), 5, 100) == (100, 500)
    after = begin(federation, ifca())._replace(round=jnp.asarray(2))
    assert ifca().traffic(after, 5, 100) == (100, SLOTS * 100)
    assert ifca().traffic(after._replace(round=jnp.asarray(1)), 5, 100) == (100, 100)  # slots are dealt, nobody chooses


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_what_is_added_to_the_weights_is_scaled_as_the_config_says(name):
    strategy = method_lib.strategy(Config(name, lora=lora.LoRAConfig(rank=4, alpha=12.0)), None)
    state = strategy.init({"main": SMALL}, routing.one_cluster_each([3]))._replace(memory={"q": jnp.ones((1, 2, 2))})
    moved = strategy.base(state, {"blocks": {"q": {"kernel": jnp.ones((1, 2, 2))}}})["blocks"]["q"]
    np.testing.assert_array_equal(moved["shift"], jnp.full((1, 2, 2), 12.0 / 4))


def test_floras_fresh_adapters_are_drawn_by_the_configs_seed():
    drawn = []
    for seed in (0, 0, 1):
        strategy = method_lib.strategy(Config("flora", seed=seed), None)
        state = strategy.init({"main": SMALL}, routing.one_cluster_each([3]))._replace(round=jnp.ones((), int))
        drawn.append(strategy.ask(state, Work(*np.zeros((3, 1), int)))["main"].a["q"].tolist())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("name", ["feddpa-t", "feddpa-f"])
@pytest.mark.parametrize("weight_on, expected", [("local", [[1, 0], [0.5, 0.5]]), ("global", [[0, 1], [0.5, 0.5]])])
def test_instance_weights_are_on_the_adapter_that_the_config_says(name, weight_on, expected):
    """A text at right angles to its client's prompts: a weight of zero, and the other adapter has all. And one like."""
    strategy = method_lib.strategy(Config(name, evaluation=EvaluationConfig(instance_weight=weight_on)), None)
    state = strategy.init(dict.fromkeys(strategy.owners, SMALL), routing.one_cluster_each([3]))
    texts, prompts = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[[0.0, 1.0]]])
    view = View(hidden=lambda weights: texts, references=lambda weights: prompts)
    assert strategy.route(state, jnp.array([0, 0]), view, "local").tolist() == expected


def test_a_warm_start_takes_a_third_of_the_configs_rounds():
    strategy = method_lib.strategy(Config("fedrouter-warm", rounds=RoundConfig(rounds=9)), 2)
    enrolment = routing.one_cluster_each([3, 3], 2)._replace(table=jnp.array([[0], [1]]))
    lanes = {"main": jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), SMALL)}
    state, work = strategy.init({"main": SMALL}, enrolment), Work(np.arange(2), np.zeros(2, int), np.ones(2))
    for done, expected in ((2, [0.5, 0.5]), (3, [0, 1])):  # rounds: all together until the third is over
        bank = told(strategy, state._replace(round=jnp.asarray(done)), work, lanes).bank
        assert bank["main"].b["q"][:, 0, 0, 0].tolist() == expected
