"""Scores of a state: which adapters questions open, what counts how, and clusters against tasks, on the tiny model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import begun

from fedrouter_jax import answers, clusters, evaluate, experiment, routing
from fedrouter_jax.errors import UserError
from fedrouter_jax.presets import smoke


def test_newcomers_rows_do_not_name_a_slot_and_are_not_missed_in_training():
    """Four clusters a client, and three rounds: one of each is never trained."""
    prepared, enrolment, _, _ = begun("fedrouter", data={"scenario": "all", "clients": 5, "newcomers": 2})
    rows = sum(len(held.train) for held in prepared.partition.clients[:3])
    assert clusters.slot_tasks(prepared, enrolment).sum() == rows
    assert [client for client, _ in clusters.describe(prepared, enrolment)["never_trained"]] == [0, 1, 2]


def test_a_client_of_few_rows_counts_little_in_the_accuracy_of_local_clusters():
    """Everybody's rows as one cluster: right for four rows of one task, half right for 24 of two."""
    prepared = experiment.prepare(smoke())
    first, *others = prepared.partition.clients
    task = prepared.partition.tasks[0]
    alike = [row for row in first.train if prepared.dataset.train[row].task == task][:4]
    few = prepared.partition._replace(clients=[first._replace(train=alike), *others])
    enrolment = routing.one_cluster_each([4, 24, 24, 24], 4)
    found = clusters.describe(prepared._replace(partition=few), enrolment)
    assert found["accuracy"]["local"] == pytest.approx((4 + 3 * 12) / (4 + 3 * 24))


def test_test_rows_that_training_has_seen_are_counted():
    prepared, enrolment, _, _ = begun("fedit")
    train, test = prepared.dataset.train, list(prepared.dataset.test)
    asked, held = [*prepared.test], {row for client in prepared.partition.clients for row in client.train}
    assert clusters.describe(prepared, enrolment)["seen_rows"] == 0
    dealt, other = min(held), min({*range(len(train))} - held)
    unasked = min({*range(len(test))} - {*asked})
    for row, known in ((asked[0], dealt), (asked[1], dealt), (asked[2], other), (unasked, dealt)):
        test[row] = test[row]._replace(instruction=train[known].instruction)
    leaking = prepared._replace(dataset=prepared.dataset._replace(test=tuple(test)))
    found = clusters.describe(leaking, enrolment)
    assert (found["seen_rows"], found["test_rows"]) == (2, len(asked))


def test_each_part_is_routed_as_its_option_says():
    prepared, enrolment, state, points = begun("fedrouter", data={"scenario": "all", "clients": 5, "newcomers": 1})
    told = dataclasses.replace(
        prepared.config.evaluation, personalised_routing="local", generalisation_routing="oracle"
    )
    modes = []

    def route(state, clients, view, mode):
        modes.append((sorted(set(clients.tolist())), mode))
        return jnp.ones((len(clients), 4))

    prepared = prepared._replace(
        config=dataclasses.replace(prepared.config, evaluation=told), strategy=prepared.strategy._replace(route=route)
    )
    evaluate.questions(prepared, state, enrolment, points, False)
    assert modes == [([0, 1, 2, 3], "local"), ([0, 1, 2, 3], "oracle"), ([4], "local")]


def test_feddpas_references_are_states_under_their_own_clients_adapter():
    prepared, _, state, _ = begun("feddpa-t")
    bank = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape), state.bank)
    view = evaluate.view(prepared, state._replace(bank=bank), None, None, [])
    own = jnp.eye(4, 5, k=1)
    found = view.references(own)
    for client in (0, 3):
        alone = view.references(jnp.tile(own[client], (4, 1)))
        np.testing.assert_allclose(found[client], alone[client], rtol=1e-3, atol=1e-3)
        assert np.abs(found[client] - alone[client - 1]).max() > 0.1


def test_feddpas_references_are_drawn_for_each_client_apart(monkeypatch):
    prepared, _, state, _ = begun("feddpa-t")
    asked = []

    def states(prepared, state, prompts, weights):
        asked.extend(prompts)
        return np.zeros((len(prompts), 64))

    monkeypatch.setattr(answers, "states", states)
    evaluate.view(prepared, state, None, None, []).references(jnp.eye(4, 5, k=1))
    prompts, each = [[row.prompt for row in held] for held in prepared.train], prepared.strategy.references
    drawn = {tuple(own.index(prompt) for prompt in asked[c * each :][:each]) for c, own in enumerate(prompts)}
    assert len(drawn) == 4
    silent = prepared._replace(strategy=prepared.strategy._replace(references=0))
    with pytest.raises(UserError, match="which its Strategy does not say; set `references` to how many"):
        evaluate.view(silent, state, None, None, []).references(jnp.eye(4, 5, k=1))


def test_the_base_model_of_a_fedex_run_is_the_model_as_it_came():
    prepared, _, state, _ = begun("fedex")
    shifted = state._replace(memory=jax.tree.map(lambda leaf: leaf + 0.3, state.memory))
    rows = [prepared.test[row] for row in experiment.test_rows(prepared.partition)[:4]]
    for weight in (0.0, 1.0):
        weights = np.full((4, 1), weight)
        plain, other = (answers.answer(prepared, s, [row.prompt for row in rows], weights) for s in (state, shifted))
        assert (plain == other) == (weight == 0)
        plain, other = (answers.losses(prepared, s, rows, weights) for s in (state, shifted))
        assert (plain == other).all() == (weight == 0)


def test_clients_count_alike_however_many_rows_they_are_asked():
    asked = [evaluate.Question("personalised", client, row, (1.0,)) for client, row in ((0, 0), (1, 1), (1, 2), (1, 3))]
    scores = [dict.fromkeys(evaluate.METRICS, value) for value in (1.0, 0.0, 0.0, 0.3)]
    found = evaluate.summary(asked, ["a", "a", "b", "a"], scores)["personalised"]
    assert found["rows"] == 4 and found["rouge1"]["mean"] == pytest.approx(0.55)
    assert found["rouge1"]["per_client"] == pytest.approx({"0": 1.0, "1": 0.1})
    assert found["rouge1"]["per_task"] == pytest.approx({"a": 1.3 / 3, "b": 0.0})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_part_with_a_loss_that_overflowed_has_none(bad):
    asked = [evaluate.Question(part, 0, row, (1.0,)) for part in ("personalised", "generalisation") for row in (0, 1)]
    scores = [dict.fromkeys(evaluate.METRICS, 0.5) | {"loss": loss} for loss in (1.0, bad, 2.0, 3.0)]
    found = evaluate.summary(asked, ["a"] * 4, scores)
    assert "loss" not in found["personalised"] and found["personalised"]["rouge1"]["mean"] == 0.5
    assert found["generalisation"]["loss"]["mean"] == 2.5


def test_a_loss_that_overflowed_is_null_among_the_predictions(monkeypatch):
    prepared, enrolment, state, _ = begun("fedit")
    asked = [evaluate.Question("personalised", 0, row, (1.0,)) for row in list(prepared.test)[:2]]
    monkeypatch.setattr(answers, "answer", lambda *rest: ["x"] * 2)
    monkeypatch.setattr(answers, "losses", lambda *rest: np.array([1.5, np.inf]))
    scores, predictions = evaluate.evaluate_state(prepared, state, enrolment, asked)
    assert [prediction["loss"] for prediction in predictions] == [1.5, None]
    json.dumps([scores, predictions], allow_nan=False)


def test_rows_of_a_task_that_nobody_holds_are_not_routed_wrongly(monkeypatch):
    prepared, enrolment, state, _ = begun("oracle", data={"scenario": "all", "unseen": ("headline",)})
    asked = evaluate.questions(prepared, state, enrolment, None, False)
    monkeypatch.setattr(answers, "answer", lambda prepared, state, prompts, *rest: ["x"] * len(prompts))
    scores = evaluate.evaluate_state(prepared, state, enrolment, asked).scores
    assert "headline" in scores["generalisation"]["rouge1"]["per_task"]
    assert scores["generalisation"]["routing_accuracy"] == 1


def test_a_text_that_goes_to_another_tasks_adapter_counts_as_routed_wrong(monkeypatch):
    given = []
    monkeypatch.setattr(
        answers, "answer", lambda p, s, prompts, weights, _: given.append(weights) or [""] * len(prompts)
    )
    monkeypatch.setattr(answers, "losses", lambda p, s, rows, weights, _: given.append(weights) or np.zeros(len(rows)))
    prepared, enrolment, state, _ = begun("oracle")
    first, *others = evaluate.questions(prepared, state, enrolment, None, False)
    wrong = first._replace(weights=(*first.weights[1:], first.weights[0]))
    scores = evaluate.evaluate_state(prepared, state, enrolment, [wrong, *others]).scores
    own = sum(question.part == first.part for question in (first, *others))
    assert scores[first.part]["routing_accuracy"] == pytest.approx(1 - 1 / own)
    asked = {(question.row, question.weights): None for question in (wrong, *others)}
    for weights in given:  # answers and losses are those of the adapters that the questions name
        np.testing.assert_array_equal(weights, [opened for _, opened in asked])
