"""The experiments' own arithmetic: summaries, intervals, the table. The runs behind them are tested elsewhere."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from experiments import clustering, summaries, table1
from fedrouter_jax import routing
from fedrouter_jax.config import to_json
from fedrouter_jax.presets import smoke

SCORES = {"base": 0.1, "base_generalisation": 0.1}


def made(strategy: str, seed: int, score: float, scenario: str = "dual") -> dict:
    """A summary with one score everywhere."""
    config = replace(smoke(), strategy=strategy, seed=seed)
    config = replace(config, data=replace(config.data, scenario=scenario))
    parts = {"personalised": score, "generalisation": score / 2} | SCORES
    return {
        "config": {key: value for key, value in json.loads(to_json(config)).items() if key != "format"},
        "scores": {part: {"rouge1": {"mean": value, "per_task": {}}} for part, value in parts.items()},
        "device": "cpu",
    }


def test_an_interval_is_students():
    values = [0.3, 0.4, 0.55]
    mean, half = summaries.interval(values)
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose([mean - half, mean + half], [low, high])
    assert summaries.interval([0.2]) == (0.2, 0.0)


def test_the_table_marks_the_best_rival_and_states_the_gain():
    found = {
        f"{method}-{seed}": made(method, seed, score + 0.02 * seed)
        for method, score in (("fedrouter", 0.48), ("fedit", 0.38), ("oracle", 0.9))
        for seed in (0, 1)
    }
    lines = table1.markdown(found).splitlines()
    assert "**synthetic** rows" in lines[2] and "Seeds [0, 1]" in lines[4]
    row = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    assert "**0.490 ± 0.127**" in row["fedrouter"] and "0.390 ± 0.127" in row["fedit"] and "**" not in row["fedit"]
    assert "**" not in row["oracle (bound)"] and "0.910" in row["oracle (bound)"]  # a bound is no rival
    assert row["fedrouter over the best other"].count("+25.6 %") == 2


def test_a_summary_is_known_by_its_config_wherever_the_data_lay(tmp_path):
    config = replace(smoke(), data=replace(smoke().data, data="/here/flan4"))
    path = tmp_path / "one.json"
    summary = made("fedrouter", 0, 0.5)
    summary["config"]["data"] |= {"data": "flan4"}
    path.write_text(json.dumps(summary))
    assert summaries.known(path, config)
    assert summaries.known(path, replace(config, data=replace(config.data, data="/there/flan4")))
    assert not summaries.known(path, replace(config, seed=1))
    assert not summaries.known(tmp_path / "none.json", config)


@pytest.mark.parametrize("wrong, expected", [(0, 1.0), (4, 0.8)])
def test_clustering_accuracy_matches_clusters_to_tasks(wrong, expected):
    tasks = [np.repeat([0, 1], 5), np.repeat([0, 1], 5)]
    labels = np.stack([1 - tasks[0], tasks[1]]).astype(np.int32)  # the numbers of clusters mean nothing
    labels[0, :wrong] = 0
    found = routing.Enrolment(np.array([[1, 0], [0, 1]]), 2, (), labels, {})
    assert clustering.accuracy(found, tasks, 2) == (expected, expected)
