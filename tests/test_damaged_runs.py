"""Runs whose files, rows or weights were damaged or changed: refused in one line, or made whole."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from written_runs import change_json

from fedrouter_jax import clusters, experiment, runs, serve
from fedrouter_jax.cli import main
from fedrouter_jax.models import tiny
from fedrouter_jax.presets import smoke
from fedrouter_jax.routing import ClusterConfig


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"dtype": "bfloat16"}, {"quantise": "nf4"}, {"data": {"train_rows": 23}}]
)
def test_a_run_of_other_rows_or_another_model_has_nothing_to_give(finished, change):
    prepared = experiment.prepare(smoke())
    config = prepared.config
    nested = {k: dataclasses.replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in change.items()}
    shared = runs.Shared(runs=(finished,))
    assert list(runs.alike(shared, prepared, recipe=True)) == [finished]
    assert list(runs.alike(shared, prepared._replace(config=dataclasses.replace(config, **nested)), recipe=False)) == []
    recipe = prepared._replace(config=dataclasses.replace(config, cluster=ClusterConfig(recipe="paper")))
    assert list(runs.alike(shared, recipe, recipe=True)) == []  # other embeddings, but the same answers of the base
    assert list(runs.alike(shared, recipe, recipe=False)) == [finished]
    edited = prepared.dataset._replace(train=prepared.dataset.train[::-1])  # the same folder, other rows
    assert list(runs.alike(shared, prepared._replace(dataset=edited), recipe=False)) == []
    tuned = prepared.model._replace(fingerprint="0" * 64)  # the same name, other weights
    assert list(runs.alike(shared, prepared._replace(model=tuned), recipe=False)) == []


def test_a_run_knows_the_tokenizer_it_was_begun_with_and_older_ones_do_not():
    prepared = experiment.prepare(smoke())
    prepared = prepared._replace(model=prepared.model._replace(described="now"))
    known = clusters.origin(prepared)
    clusters.check_origin(known, prepared)
    clusters.check_origin({key: known[key] for key in ("data", "model")}, prepared)
    with pytest.raises(ValueError, match="the rows of synthetic were others then"):
        clusters.check_origin({}, prepared)
    with pytest.raises(ValueError, match="the configuration or the tokenizer of tiny were others then"):
        clusters.check_origin(known | {"described": "then"}, prepared)


def in_clusters(change):
    def changed(run):
        path = run / "clusters.json"
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return changed


relabel = in_clusters(lambda found: found["clients"][0]["local"].__setitem__(0, 7))


def lacking(key):
    def without(run):
        path = run / "clusters.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))

    return without


def edited(old, new, older=False, name="config.json"):
    """config.json with another value; `older`: in a run whose clusters do not say yet what it was begun with."""

    def edit(run):
        path = run / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        if older:
            lacking("config")(run)

    return edit


def at(name, place, byte):
    def put(run):
        content = (run / name).read_bytes()
        assert content[place : place + 1] != byte
        (run / name).write_bytes(content[:place] + byte + content[place + 1 :])

    return put


def nested(name):
    return lambda run: (run / name).write_text("[" * 100_000)


def repeat(run):
    """A log that two processes wrote."""
    path = run / "rounds.jsonl"
    path.write_text("".join(line * 2 for line in path.read_text().splitlines(keepends=True)))


def shorten(name):
    def cut(run):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])

    return cut


def without_origin(run):
    """Embeddings that do not say what they were made from."""
    np.save(run / "embeddings.npy", np.load(run / "embeddings.npy"))


@pytest.mark.parametrize(
    "damage, command, expected",
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), "route", "holds no checkpoint, so no adapters"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "export", "holds no checkpoint, so no adapters"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "resume", "rounds.jsonl tells of 3 rounds, but"),
        (shorten("embeddings.npy"), "resume", "not the embeddings of this run"),
        (without_origin, "resume", "not the embeddings of this run"),
        (at("embeddings.npy", 8, b"\x01"), "resume", "not the embeddings of this run"),  # its header
        (at("embeddings.npy", 500, b"?"), "resume", "its numbers are not those that were written"),
        (nested("clusters.json"), "resume", "clusters.json: not a JSON object (maximum recursion depth"),
        (nested("config.json"), "route", "config.json: not readable as JSON (maximum recursion depth"),
        (
            edited('"bytes_up": ', '"bytes_up": 1e999, "_": ', name="rounds.jsonl"),
            "resume",
            "bytes_up: Input should be a f",
        ),
        (in_clusters(lambda found: found["tasks"].append("\ud800")), "resume", "surrogates not allowed"),
        (shorten("rounds.jsonl"), "resume", "whole lines, but 3 rounds are trained"),
        (repeat, "resume", "line 2: round 1, expected 2"),
        (relabel, "resume", "the clusters of client 0 are not those of the table"),
        (relabel, "route", "the clusters of client 0 are not those of the table"),
        (in_clusters(lambda found: found["slot_tasks"].append("x")), "resume", "5 slot_tasks for 4 clusters"),
        (in_clusters(lambda found: found.update(slot_tasks=["x"] * 4)), "resume", "slot_tasks names unknown tasks"),
        (in_clusters(lambda found: found["clients"].reverse()), "resume", "the clients are not numbered from 0"),
        (lambda run: (run / "clusters.json").unlink(), "route", "clusters.json is missing, though the run has begun"),
        (lambda run: (run / "clusters.json").unlink(), "resume", "clusters.json is missing, though the run has begun"),
        (edited('"rank": 8', '"rank": 4', older=True), "resume", "is in one of config.json and the checkpoint only"),
        (edited('"train_rows": 24', '"train_rows": 20', older=True), "resume", "clients hold other rows now"),
        (edited('"learning_rate": 0.005', '"learning_rate": 0.5'), "resume", "local.learning_rate is 0.5, but the run"),
        (edited('"rounds": 3', '"rounds": 5'), "route", "rounds.rounds is 5, but the run was begun with 3; restore it"),
        (lacking("silhouettes"), "resume", "clusters.json: silhouettes: Field required"),
        (shorten("scores.json"), "resume", "scores.json: not a JSON object"),
        (shorten("config.json"), "export", "config.json: not readable as JSON"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line_and_left_as_it_is(damage, command, expected, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    damage(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    rest = {"route": ["text"], "export": ["--to", str(tmp_path / "to")], "resume": []}[command]
    assert main([command, str(run), *rest]) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "to").exists()


def test_a_run_whose_rows_were_changed_is_not_resumed_and_answers_without_them(tmp_path, capsys):
    data, out, compares = (tmp_path / name for name in ("rows", "run", "compares"))
    data.mkdir()
    rows = [{"instruction": f"q {i}?", "output": f"a {i}", "task": "ab"[i % 2]} for i in range(40)]
    for name in ("train", "test"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = smoke()
    small = dataclasses.replace(config.data, data=str(data), clients=2, test_rows=2, mix_rows=2)
    config = dataclasses.replace(config, data=small, rounds=dataclasses.replace(config.rounds, rounds=1))
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, evaluate_at=()))
    runs.run(config, out)
    runs.run(dataclasses.replace(config, strategy="feddpa-t"), compares)
    said = serve.route(out, ["q 3?", "another text"])
    rows[0]["instruction"] = "another"
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["resume", str(out)]) == 2
    assert f"the rows of {data} were others then" in capsys.readouterr().err
    data.rename(tmp_path / "moved")
    for arguments in (["resume", str(out)], ["route", str(compares), "text", "--client", "0"]):
        assert main(arguments) == 2
        message = f"config.json names the rows and the model of this run, from the folder {Path.cwd()} on"
        assert message in capsys.readouterr().err
    assert serve.route(out, ["q 3?", "another text"]) == said
    for run in (out, compares):
        to = tmp_path / f"{run.name}-exported"
        assert main(["export", str(run), "--to", str(to)]) == 0
        for path in (path for part in ("adapters", "router") for path in (run / part).rglob("*.*")):
            assert (to / path.relative_to(run)).read_bytes() == path.read_bytes()


def test_a_run_whose_weights_were_changed_is_not_resumed(finished, tmp_path, monkeypatch, capsys):
    begun, embedded = (tmp_path / name for name in ("begun", "embedded"))
    shutil.copytree(finished, begun)
    embedded.mkdir()
    for name in ("config.json", "embeddings.npy"):  # killed before there were clusters
        shutil.copy(finished / name, embedded)
    monkeypatch.setattr(tiny, "SEED", tiny.SEED + 1)
    for arguments in (["resume", str(begun)], ["route", str(begun), "text"], ["resume", str(embedded)]):
        assert main(arguments) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        name = "embeddings.npy" if str(embedded) in arguments else "clusters.json"
        assert f"{name}: not the " in message and "the weights of tiny were others then" in message


def test_a_run_answers_where_its_model_was_moved(finished, tiny, tmp_path, monkeypatch):
    run, said = tmp_path / "run", serve.route(finished, ["q 3?"])
    shutil.copytree(finished, run)
    change_json(run / "config.json", model="moved/tiny")
    monkeypatch.setattr(experiment, "load_model", lambda name, *rest: {"moved/tiny": tiny}[name])
    assert serve.route(run, ["q 3?"]) == said


def test_predictions_that_were_cut_short_are_made_again(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    whole = (run / "predictions.jsonl").read_text()
    (run / "predictions.jsonl").write_text("".join(whole.splitlines(keepends=True)[:3]))
    runs.proceed(run)
    assert (run / "predictions.jsonl").read_text() == whole
