"""What is kept of a run for tables and figures."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from experiments import summaries
from fedrouter_jax import records
from fedrouter_jax.presets import smoke


def test_a_summary_holds_all_rounds_and_means_but_no_rows(monkeypatch):
    config = replace(smoke(), data=replace(smoke().data, data="/here/flan4"))
    means = {"mean": 0.5, "per_task": {"qqp": 0.5}, "per_client": [0.5]}
    run = SimpleNamespace(
        config=config,
        rounds=[{"tokens": tokens} for tokens in (30, 50, 40)] + [{"tokens": 0, "table": [[1], [k]]} for k in (0, 1)],
        scores={"personalised": {"rouge1": means, "routing_accuracy": 0.9}},
        timings={"device": "cpu"},
        clusters={"data": "of rows", "model": "of weights", "table": []},
    )
    monkeypatch.setattr(records, "read", lambda folder: run)
    monkeypatch.setattr(records, "cost", lambda run: {"bytes_up": 7})
    monkeypatch.setattr(records, "accuracy", lambda run: {"global": 1.0})
    found = summaries.of(Path("run"))
    assert found["cost"] == {"bytes_up": 7, "tokens": 120} and found["accuracy"] == {"global": 1.0}
    assert found["scores"] == run.scores
    assert found["config"]["data"]["data"] == "flan4" and found["device"] == "cpu" and found["taken_over"] == []
    assert (found["data"], found["model"]) == ("of rows", "of weights")
    assert found["table"] == [[1], [1]]  # the last one
