"""Texts under a federation's adapters: however few are concatenated at a time, the same is found. And their scores."""

import unicodedata

import jax
import numpy as np
import pytest
from helpers import begun
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from rouge_score.rouge_scorer import RougeScorer

from fedrouter_jax import answers, evaluate, generate, likelihood, rouge

SOME = st.sampled_from([0, 0.5])
WEIGHTS = st.integers(1, 9).flatmap(
    lambda slots: arrays.arrays(np.float32, st.tuples(st.integers(0, 12), st.just(slots)), elements=SOME)
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(WEIGHTS, st.integers(1, 5), st.randoms(use_true_random=False))
def test_every_row_is_in_one_group_that_holds_what_it_opens(weights, most, random):
    rows = np.array([row for row in range(len(weights)) if random.random() < 0.8], int)
    groups = answers.together(weights, rows, most)
    assert sorted(row for held, _ in groups for row in held) == rows.tolist()
    widest = max(most, *weights.astype(bool).sum(axis=1), 0) if len(weights) else most
    assert len({len(slots) for _, slots in groups}) <= 1
    for held, slots in groups:
        opened = set(np.flatnonzero(weights[held].any(axis=0)))
        named = slots[slots >= 0].tolist()
        assert opened <= set(named) and len(named) == len(set(named)) and len(slots) <= widest


def test_groups_are_even_and_few():
    groups = answers.together(np.eye(33, dtype=np.float32)[np.arange(66) % 33], np.arange(66), 32)
    assert [len(slots) for _, slots in groups] == [17, 17]
    (rows, slots), *others = answers.together(np.eye(4), np.arange(4), 4)
    assert rows.tolist() == slots.tolist() == [0, 1, 2, 3] and not others


@pytest.mark.parametrize("strategy", ["local", "fedsa", "feddpa-t", "fedalt", "fedlease", "fedrouter-soft"])
def test_a_few_adapters_at_a_time_are_as_good_as_all(strategy, monkeypatch):
    """Also where open adapters compete by gates of their own, where rows open several, and for the base model."""
    prepared, enrolment, state, points = begun(strategy)
    keys = iter(jax.random.split(jax.random.key(0), 99))
    bank = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), state.bank)
    state = state._replace(bank=bank)
    asked = evaluate.questions(prepared, state, enrolment, points, True)[::7]
    rows = [prepared.test[question.row] for question in asked]
    weights, prompts = np.array([question.weights for question in asked]), [row.prompt for row in rows]
    assert not weights.any(axis=1).all()  # the base model's are among them
    writes = strategy in ("local", "fedlease")  # the others would be grouped alike
    monkeypatch.setattr(likelihood.packing, "shape", lambda *_: (320, 96))  # one program for groups of any rows

    def found():
        return (
            answers.losses(prepared, state, rows, weights),
            answers.states(prepared, state, prompts, weights),
            answers.answer(prepared, state, prompts, weights) if writes else [""],
        )

    at_once = found()
    monkeypatch.setattr(answers, "SLOTS", 1)
    few = found()
    for one, other in zip(at_once[:2], few[:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)
    assert np.mean([one == other for one, other in zip(at_once[2], few[2], strict=True)]) > 0.9
    assert len(set(at_once[0].round(3).tolist())) > 3


def test_an_answer_is_its_text_without_special_tokens_or_space_around(monkeypatch):
    prepared, _, state, _ = begun("fedit")
    tokenizer = prepared.model.tokenizer
    ids = [*tokenizer(" yes")["input_ids"], tokenizer.eos_token_id]
    monkeypatch.setattr(generate, "generate", lambda config, base, prompts, *rest, **options: [ids] * len(prompts))
    assert answers.answer(prepared, state, [[1], [2]], np.ones((2, 1))) == ["yes"] * 2


def test_scores_are_those_of_rouge_score_and_other_scripts_have_words_too():
    same = [("The cat, sat.", "a cat sat"), ("café 12", "caf 12"), ("", "x"), ("Łódź in 2024", "in 2024")]
    same += [("β-carotene is café", "a carotene is cafe")]  # one Greek letter makes no Greek text
    plain = RougeScorer(["rouge1", "rougeL"])
    for reference, answer in same:
        expected = plain.score(reference, answer)
        found = rouge.score(reference, answer)
        assert {name: found[name] for name in expected} == {name: value.fmeasure for name, value in expected.items()}
    for reference, answer, rouge1 in [
        ("привет мир", "Привет, мир!", 1.0),
        ("привет мир", "пока мир", 0.5),
        ("你好世界", "你好", 2 / 3),
        ("год 2024 мир", "2024", 0.5),
        ("नमस्ते दुनिया", "नमस्ते", 2 / 3),
        ("กิน", "กน", 0.5),  # a vowel sign belongs to its letter
        ("カ・テ", "カ", 2 / 3),  # signs between words are none
        ("បាទ។", "ទេ។", 0.0),  # nothing but the full stop in common
        ("世界v2です", "v2", 1 / 3),
        ("١٢٣", "١٢٣", 1.0),  # digits have scripts, too
        ("12 m²", "12", 2 / 3),
        ("мой", unicodedata.normalize("NFD", "мой"), 1.0),  # a letter and its sign, or both in one
        ("É", "é", 1.0),  # a letter, but none of a to z
        ("É", "À", 0.0),
        ("+", "+", 1.0),  # labels that are signs
        ("+", "-", 0.0),
        ("🙂", "🙂 !", 0.0),
    ]:
        assert rouge.score(reference, answer)["rouge1"] == pytest.approx(rouge1)
    assert [rouge.score("Yes", answer)["exact"] for answer in (" yES\n", "yes.")] == [1, 0]
