"""What is kept of a run for tables and figures, and by what it is known."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from written_runs import make_summary

from experiments import summaries, sweep
from fedrouter_jax import records
from fedrouter_jax.config import to_json
from fedrouter_jax.errors import UserError
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


def test_a_summary_older_than_a_field_is_still_known(tmp_path):
    summary = make_summary("fedrouter", 0, 0.5)
    del summary["config"]["local"]["proximal"]
    (tmp_path / "one.json").write_text(json.dumps(summary))
    assert summaries.known(tmp_path / "one.json", smoke())
    changed = replace(smoke(), local=replace(smoke().local, proximal=0.1))
    assert not summaries.known(tmp_path / "one.json", changed)


def test_a_summary_is_known_by_its_config_wherever_the_data_lay(tmp_path):
    config = replace(smoke(), data=replace(smoke().data, data="/here/flan4"))
    path = tmp_path / "one.json"
    summary = make_summary("fedrouter", 0, 0.5)
    summary["config"]["data"] |= {"data": "flan4"}
    path.write_text(json.dumps(summary))
    assert summaries.known(path, config)
    assert summaries.known(path, replace(config, data=replace(config.data, data="/there/flan4")))
    assert summaries.known(path, replace(config, compute=replace(config.compute, rows_at_once=7)))  # only faster
    assert not summaries.known(path, replace(config, seed=1))
    assert not summaries.known(path, replace(config, model="other"))
    assert not summaries.known(path, replace(config, data=replace(config.data, data="/here/flan8")))
    assert not summaries.known(tmp_path / "none.json", config)


def test_a_summary_of_other_rows_under_the_same_name_is_refused(tmp_path):
    folder, kept = tmp_path / "rows", tmp_path / "kept"
    folder.mkdir(), kept.mkdir()
    config = replace(smoke(), data=replace(smoke().data, data=str(folder)))

    def write(answer):
        for name in ("train", "test"):
            row = {"instruction": f"{name}?", "output": answer, "task": "qqp"}
            (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")

    assert sweep.rows_now({"one": config}) == {"one": None}  # they are not here
    write("a")
    rows = sweep.rows_now({"one": config})
    summary = make_summary("fedrouter", 0, 0.5)
    summary["config"]["data"] |= {"data": "rows"}
    summary["data"] = rows["one"]
    (kept / "one.json").write_text(json.dumps(summary))
    assert sweep.summarised({"one": config}, kept) == {"one"}
    write("b")
    for asked in ("one", "another"):  # a table draws all there are
        with pytest.raises(UserError, match="one.json is of other rows than .*rows has now"):
            sweep.summarised({asked: replace(config, seed=int(asked == "another"))}, kept)
    elsewhere = replace(config, data=replace(config.data, data="elsewhere"))
    assert not sweep.summarised({"another": elsewhere}, kept)
    (kept / "other.json").write_text(json.dumps(summary | {"data": "of other rows"}))
    with pytest.raises(UserError, match="one and other are of other rows of one name, rows; remove those of one"):
        summaries.load(kept)
    (kept / "other.json").unlink()
    del summary["data"]  # of an older version
    (kept / "one.json").write_text(json.dumps(summary))
    assert sweep.summarised({"one": config}, kept) == {"one"} == {*summaries.load(kept)}
    out = tmp_path / "out" / "two"
    out.mkdir(parents=True)
    (out / "config.json").write_text(to_json(config))
    (out / "clusters.json").write_text(json.dumps({"data": rows["one"]}))
    with pytest.raises(UserError, match="the rows of .* were others then"):
        sweep.sweep({"two": config}, tmp_path / "out", Console(quiet=True))


@pytest.mark.parametrize(
    "text, expected", [('{"config": {"mod', "not a JSON object"), ("{}", "'accuracy'"), ("[]", "not a JSON object")]
)
def test_a_damaged_summary_is_named(text, expected, tmp_path):
    (tmp_path / "one.json").write_text(text)
    for read in (lambda: summaries.known(tmp_path / "one.json", smoke()), lambda: summaries.load(tmp_path)):
        with pytest.raises(UserError, match=f"one.json.*{expected}.*; restore the file,? or remove it"):
            read()
