"""Reports of run directories whose files are broken, or do not fit each other."""

from __future__ import annotations

import json

import numpy as np
import pytest
from written_runs import CLIENTS, ROWS, make_round, make_run, write_json

from fedrouter_jax import report
from fedrouter_jax.errors import UserError

STRANGE = json.dumps(make_round(1, np.random.default_rng(0), 2)) + "\n"  # of a second cluster
TWICE = (json.dumps(make_round(1, np.random.default_rng(0))) + "\n") * 2


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("rounds.jsonl", '{"round": 1\n', r"rounds.jsonl, line 1: not a JSON object"),
        ("rounds.jsonl", "[1]\n", r"rounds.jsonl, line 1: not a JSON object"),
        ("rounds.jsonl", '{"round": 1}\n', r"rounds.jsonl, line 1: loss: Field required"),
        ("rounds.jsonl", TWICE, r"rounds.jsonl, line 2: round 1, expected 2; restore the file or start a new run"),
        ("scores.json", "{", r"scores.json: not a JSON object"),
        ("scores.json", '{"personalised": {"rows": 3, "rouge1": 0.5}}', r"personalised.rouge1: .* valid dictionary"),
        ("clusters.json", '{"tasks": ["count", 7]}', r"clusters.json: tasks.1: .* valid string"),
        ("clusters.json", "{", r"clusters.json: .*, or start a new run"),
        ("timings.json", "[]", r"timings.json: not a JSON object.*, or delete it and resume the run"),
        ("embeddings.npy", "text", r"embeddings.npy: not a NumPy array"),
        ("predictions.jsonl", "{}\n", r"predictions.jsonl, line 1: part: Field required"),
        ("rounds.jsonl", STRANGE, r"rounds.jsonl: a lane is of client 0 and cluster 1, which clusters.json does not"),
    ],
)
def test_broken_files_are_named(tmp_path, name, text, expected):
    path = make_run(tmp_path / "one", strategy="fedrouter" if name == "embeddings.npy" else "fedit")
    (path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=expected) as caught:
        report.write([path], path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"table": []}, "a table of 0 rows"),
        ({"table": [[0, 9]] * CLIENTS}, "slots beyond 3"),
        ({"clients": []}, "rows for 0 clients"),
        ({"slot_tasks": []}, "0 slot_tasks for 3 clusters"),
        ({"slot_tasks": ["other"] * 3}, "slot_tasks names unknown tasks"),
        ({"clusters": 0}, "3 slot_tasks for 0 clusters"),
        ({"tasks": ["other"]}, "client 0 has rows of unknown tasks"),
        ({"local": [7] * ROWS}, "the clusters of client 0 are not those of the table"),
        ({"global": [0]}, "client 0 has lists of unequal lengths"),
        ({"config": {"strategy": "fedit"}}, "strategy is 'fedrouter', but the run was begun with 'fedit'"),
    ],
)
def test_files_that_do_not_fit_each_other_are_named(tmp_path, change, expected):
    path = make_run(tmp_path / "one", strategy="fedrouter")
    clusters = json.loads((path / "clusters.json").read_text(encoding="utf-8"))
    (key,) = change
    (clusters if key in clusters or key == "config" else clusters["clients"][0]).update(change)
    write_json(path / "clusters.json", clusters)
    with pytest.raises(UserError, match=expected) as caught:
        report.write([path], path)
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_no_run(tmp_path):
    (tmp_path / "file.log").touch()
    for path in (tmp_path, tmp_path / "file.log"):
        with pytest.raises(UserError, match=f"{path.name} is no run directory"):
            report.write([path], tmp_path)
