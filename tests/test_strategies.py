"""What single strategies do that no law over all of them asks for."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import CLIENTS, KEY, SLOTS, assert_close, begin, inputs, play, rate

from fedrouter_jax import client, routing
from fedrouter_jax.strategies import (
    STRATEGIES,
    clustered,
    feddpa_f,
    feddpa_t,
    fedrouter,
    fedrouter_soft,
    fedrouter_warm,
    ffalora,
    ifca,
)
from fedrouter_jax.types import FederationState, LoRA, Phase, View


def test_ffa_loras_clients_train_b_under_the_a_that_was_drawn(federation):
    """Not only is A never written on the server: a client's B is trained with A as it was."""
    strategy, (work, batch) = ffalora(), inputs(federation, 1)
    asked = jax.tree.map(lambda leaf: leaf[:1], strategy.ask(begin(federation, strategy), work))
    rows = jax.tree.map(lambda leaf: leaf[0], batch)
    keys = jax.random.split(KEY, 1)
    found = federation.update(federation.model.params, asked, rows, rate(1), keys, strategy.phases(1, 5))[0]["main"]
    for leaf, old in zip(*map(jax.tree.leaves, (found.a, asked["main"].a)), strict=True):
        np.testing.assert_array_equal(leaf, old)
    assert all((leaf != old).any() for leaf, old in zip(found.b.values(), asked["main"].b.values(), strict=True))


def test_clusters_of_clients_start_from_what_the_first_round_made():
    bank = {"main": LoRA({"q": jnp.array([[5.0], [1.0]])}, {"q": jnp.array([[6.0], [2.0]])})}
    server = [jnp.array([7.0, 3.0])] * 2
    state = FederationState(jnp.ones((), int), bank, jnp.zeros((2, 1), int), (jnp.eye(2), jnp.ones(2)), server)
    found = clustered().regroup(state)
    leaves = [leaf.ravel().tolist() for leaf in jax.tree.leaves((found.bank, found.server))]
    assert leaves == [[value, value] for value in (5, 6, 7, 7)]


def test_in_ifcas_first_round_clients_train_the_slot_they_were_dealt(federation):
    state, (work, _) = begin(federation, ifca()), inputs(federation, 1)
    table = ifca().choose(state, work, lambda adapters: jnp.zeros(CLIENTS)).table
    np.testing.assert_array_equal(table, state.table)


def test_feddpa_compares_a_text_with_its_clients_own_prompts():
    strategy = feddpa_t(scale=0.5)
    adapter = LoRA({"q": jnp.zeros((1, 2, 1))}, {"q": jnp.zeros((1, 1, 2))})
    state = strategy.init(dict.fromkeys(strategy.owners, adapter), routing.one_cluster_each([3, 3]))
    asked = []

    def references(weights):
        asked.append(weights.tolist())
        return jnp.repeat(jnp.eye(2)[:, None], 5, axis=1)

    view = View(hidden=lambda weights: jnp.array([[2.0, 0.0], [2.0, 0.0]]), references=references)
    weights = strategy.route(state, jnp.array([0, 1]), view, "local")
    assert asked == [[[0, 1, 0], [0, 0, 1]]]  # each client's under its own local adapter
    np.testing.assert_allclose(weights, [[0.5, 0.5, 0], [1, 0, 0]], atol=1e-6)


def test_feddpa_f_has_a_private_round_however_few_there_are():
    """The last of three, of which a fifth is less than one."""
    shared = [bool(feddpa_f().phases(t, 3)[0].train["global"]) for t in (1, 2, 3)]
    assert shared == [True, True, False]
    assert feddpa_f().phases(1, 1)[0].train["global"]  # nor is the only one private


def test_the_private_rounds_of_feddpa_f_have_learning_rates_of_their_own():
    """Both parts go from the peak to the least: five private rounds of 25 are not the foot of one cosine."""
    config = client.LocalConfig(learning_rate=1.0, min_learning_rate=0.0)
    rates = [float(client.learning_rate(config, 25, feddpa_f().pace(t, 25))) for t in range(1, 26)]
    assert rates[:20] == sorted(rates[:20], reverse=True) and rates[20:] == sorted(rates[20:], reverse=True)
    np.testing.assert_allclose([rates[19], np.mean(rates[20:])], [0, 0.5], atol=1e-6)
    np.testing.assert_allclose(client.learning_rate(config, 6, feddpa_f().pace(6, 6)), 0.5, atol=1e-6)


def test_what_private_rounds_start_from_comes_down_once(federation):
    """Two of five rounds are private: the average of the third is received before the first of them."""
    strategy, size = feddpa_f(private=0.4), 100
    held = begin(federation, strategy)
    adapter = sum(leaf.nbytes for leaf in jax.tree.leaves(held.bank["global"]))
    after = [(held._replace(memory=jnp.asarray(private)), sent) for private, sent in ((0, size), (1, 0), (2, 0))]
    assert [strategy.traffic(state, 4, sent) for state, sent in after] == [(size, size), (0, adapter), (0, 0)]
    played = [play(federation, strategy, federation.update, rounds=rounds)[0].memory for rounds in (3, 4, 5)]
    assert [int(private) for private in played] == [0, 1, 2]


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


def test_what_comes_down_is_counted(federation):
    """FedEx: every client's adapter; IFCA: every slot's."""
    fedex = STRATEGIES["fedex"]()
    assert fedex.traffic(begin(federation, fedex), 5, 100) == (100, 500)
    after = begin(federation, ifca())._replace(round=jnp.asarray(2))
    assert ifca().traffic(after, 5, 100) == (100, SLOTS * 100)
    assert ifca().traffic(after._replace(round=jnp.asarray(1)), 5, 100) == (100, 100)  # slots are dealt, nobody chooses
