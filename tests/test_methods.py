"""What each method computes, and the cases in which one method is another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from helpers import (
    BY_NAME,
    CLIENTS,
    CLUSTERS,
    KEY,
    LOCAL,
    LORA,
    SLOTS,
    assert_close,
    begin,
    inputs,
    nudge,
    play,
    round_of,
    told,
)

from fedrouter_jax import bank, client, routing
from fedrouter_jax.strategies import (
    clustered,
    feddpa_f,
    fedit,
    fedrouter,
    fedrouter_a,
    fedrouter_b,
    fedrouter_soft,
    fedrouter_warm,
    ffalora,
    ifca,
)
from fedrouter_jax.types import FederationState, LoRA, View


def test_fedrouter_with_one_cluster_is_fedit(federation):
    one = federation.enrolment._replace(table=jnp.zeros_like(federation.enrolment.table), clusters=1)
    alone = federation._replace(enrolment=one)
    found = play(alone, BY_NAME["fedrouter"], nudge)[0].bank
    assert_close(found, play(alone, BY_NAME["fedit"], nudge)[0].bank)


def test_one_cluster_of_clients_is_fedit_and_one_each_is_local_after_the_first_round(federation):
    """Clustered, in its two extremes."""
    pooled = federation._replace(enrolment=federation.enrolment._replace(clusters=1))
    assert_close(play(pooled, clustered(), nudge)[0].bank, play(federation, BY_NAME["fedit"], nudge)[0].bank)
    each = federation._replace(enrolment=federation.enrolment._replace(clusters=CLIENTS))
    state = play(each, clustered(), nudge, rounds=1)[0]
    state = clustered().regroup(state._replace(memory=(jnp.eye(CLIENTS), jnp.ones(CLIENTS))))
    assert state.table[:, 0].tolist() == list(range(CLIENTS))
    assert all(bool((leaf == leaf[:1]).all()) for leaf in jax.tree.leaves(state.bank))
    base, given = federation.model.params, inputs(federation, 2)
    alone = begin(federation, BY_NAME["local"])._replace(round=state.round, bank=state.bank)
    alone = jax.tree.map(jnp.copy, alone)  # a round takes its state away
    pairs = ((clustered(), state), (BY_NAME["local"], alone))
    assert_close(*(round_of(method, nudge, None)(at, base, *given, KEY)[0].bank for method, at in pairs))


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
    strategy = feddpa_f(together=3)
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


def test_fedrouter_b_with_one_cluster_is_ffa_lora(federation):
    one = federation.enrolment._replace(table=jnp.zeros_like(federation.enrolment.table), clusters=1)
    found = play(federation._replace(enrolment=one), fedrouter_b(), federation.update)[0].bank
    assert_close(found, play(federation, ffalora(), federation.update)[0].bank)


def test_the_two_adapters_of_fedrouter_sum_learn_apart(federation):
    """From one A and one B they would have the same gradients, and be one adapter twice."""
    strategy, table = BY_NAME["fedrouter-sum"], jnp.zeros_like(federation.enrolment.table)
    alone = federation._replace(enrolment=federation.enrolment._replace(table=table, clusters=1))
    before, found = begin(alone, strategy).bank, play(alone, strategy, federation.update, rounds=1)[0].bank
    for module, own in found["main"].b.items():
        moved = jnp.abs(own[0] - before["main"].b[module][0]).max()
        assert jnp.abs(own - found["common"].b[module]).max() > 0.1 * moved > 0


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


def test_clients_of_ifca_choose_their_slots_in_a_round(federation):
    """Before they train, by the loss of all three slots; two of them fit nobody."""
    state = begin(federation, ifca())
    far = jax.tree.map(lambda leaf: leaf + bank.expand(jnp.array([90.0, 50.0, 0.0]), leaf), state.bank)
    work, batch = inputs(federation, 2)
    given = state._replace(bank=far, round=jnp.ones((), jnp.int32))
    after, _ = round_of(ifca(), nudge, None)(given, federation.model.params, work, batch, KEY)
    assert after.table[work.client, work.cluster].tolist() == [2] * CLIENTS


def test_the_loss_of_a_round_is_what_training_at_rate_zero_reports(federation):
    """No dropout, and half of the second step's labels: the mean over the response tokens of both."""
    decoder, params = federation.model.config, federation.model.params
    plain = dataclasses.replace(LORA, dropout=0.0)
    work, batch = inputs(federation, 1, together=2)
    group = jax.tree.map(lambda leaf: leaf[0], batch)
    group.rows.labels[1, :, ::2] = -1
    adapters = jax.tree.map(lambda leaf: leaf[:2], fedit().ask(begin(federation, fedit()), work))
    update, loss = client.make_client_update(decoder, plain, LOCAL), client.make_client_loss(decoder, plain)
    reported = update(params, adapters, group, 0.0, jax.random.split(KEY, 2), fedit().phases(1, 5))[1]
    tokens = jax.vmap(client.responses, (0, None))(group.rows, 2).T
    assert (tokens[:, 1] != tokens[:, 0]).all()
    assert_close(loss(params, adapters, group), (reported * tokens).sum(axis=1) / tokens.sum(axis=1))
