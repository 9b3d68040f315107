"""A run from start to end, killed and resumed, and what the other commands make of it. On the tiny random model."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import summaries
from experiments.sweep import sweep
from fedrouter_jax import checkpoint, evaluate, experiment, files, runs, serve, sharing
from fedrouter_jax import config as config_lib
from fedrouter_jax.cli import finish, main
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import load_model, tiny
from fedrouter_jax.peft_io import read_router
from fedrouter_jax.presets import smoke
from fedrouter_jax.routing import ClusterConfig
from fedrouter_jax.terminal import progress

FINAL = ("scores.json", "predictions.jsonl", "clusters.json", "router/router.safetensors", "router/router.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted smoke run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    runs.run(smoke(), out)
    return out


def result(out: Path) -> dict[str, bytes]:
    """The bytes that a run ends with, and its log without the seconds."""
    files = [*(out / name for name in FINAL), *sorted(out.glob("adapters/*/*"))]
    content = {str(path.relative_to(out)): path.read_bytes() for path in files}
    return content | {"rounds": [record(line) for line in (out / "rounds.jsonl").read_text().splitlines()]}


def record(line: str) -> dict:
    found = json.loads(line)
    assert found.pop("seconds") >= 0
    return found


def test_a_run_directory_holds_what_it_promises(finished):
    config = smoke()
    lines = [json.loads(line) for line in (finished / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert "scores" in lines[0] and "scores" not in lines[1]
    for line in lines:
        assert len(line["lanes"]) == 4 and all(len(lane["loss"]) == config.local.steps for lane in line["lanes"])
        assert line["optimiser_steps_per_client"] == 2 and line["adapters_per_client"] == 1
    adapters = sorted(path.name for path in (finished / "adapters").iterdir())
    assert adapters == ["cluster_0", "cluster_1", "cluster_2", "cluster_3"]
    # Four lanes a round, each as large as one exported adapter without its header.
    weights = finished / "adapters" / "cluster_0" / "adapter_model.safetensors"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert lines[0]["bytes_up"] == 4 * (weights.stat().st_size - header)
    scores = json.loads((finished / "scores.json").read_text())
    for part in ("base", "personalised", "generalisation"):
        assert set(scores[part]["rouge1"]) == {"mean", "per_task", "per_client"} and scores[part]["rows"] > 0
    clusters = json.loads((finished / "clusters.json").read_text())
    assert 0 < clusters["accuracy"]["global"] <= 1 and len(clusters["clients"]) == 4
    router, description = read_router(finished / "router")
    assert router.centroids.shape[0] == 4 and description["adapters"] == adapters
    assert description["layers"] == 1 and description["pooling"].endswith("but the first 1")
    assert description["tasks"] == clusters["slot_tasks"]
    assert description["max_length"] == 320 and not description["final_norm"]
    assert (finished / "predictions.jsonl").read_text().count("\n") == sum(scores[part]["rows"] for part in scores)


def test_killed_at_three_random_moments_and_resumed_ends_with_the_same_bytes(finished, tmp_path):
    """SIGKILL when a process has just made a file drawn at random, early, in the middle and late; each time resumed."""
    out, command = tmp_path / "killed", [sys.executable, "-m", "fedrouter_jax"]
    moments = (
        ["config.json", "embeddings.npy", "clusters.json", "checkpoints/0"],
        ["checkpoints/1", "checkpoints/2"],
        ["checkpoints/3", "predictions.jsonl", "adapters/cluster_1"],
    )
    arguments = ["run", "--preset", "smoke", "--out", str(out)]
    for sign in (out / random.choice(signs) for signs in moments):
        with subprocess.Popen([*command, *arguments], stderr=subprocess.DEVNULL) as run:
            while not sign.exists() and run.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(0.005)
            run.send_signal(signal.SIGKILL)
        assert run.returncode == -signal.SIGKILL, f"the run ended before {sign.name} was seen"
        (out / "rounds.jsonl").open("a").write('{"round": 9')  # what a kill in the middle of a line leaves
        arguments = ["resume", str(out)]
    subprocess.run([*command, *arguments], check=True, capture_output=True)
    found, expected = result(out), result(finished)
    assert not [name for name in found | expected if found.get(name) != expected.get(name)]
    assert found == expected


def test_a_second_process_is_refused_while_one_works(finished, tmp_path, capsys):
    run, codes = tmp_path / "run", []
    shutil.copytree(finished, run)
    (run / "predictions.jsonl").unlink()
    shutil.rmtree(run / "checkpoints" / "3")

    @contextlib.contextmanager
    def others(what, total):
        codes.append(main(["resume", str(run)]))
        assert capsys.readouterr().err == f"fedrouter: another process works on {run}; wait for it, or end it\n"
        yield lambda rows, note="": None

    runs.proceed(run, others)
    assert codes == [2, 2, 2] and result(run) == result(finished)  # asked in training, answering, reading references


def test_a_new_run_is_not_given_another_config_while_it_begins(tmp_path, capsys):
    run, other = tmp_path / "run", ["run", "--preset", "smoke", "--seed", "1", "--out", str(tmp_path / "run")]

    def others(what, total):
        assert main(other) == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.run(smoke(), run, others)
    assert "another process works on" in capsys.readouterr().err
    assert config_lib.load(run / "config.json") == smoke()
    runs.claim(run, dataclasses.replace(smoke(), seed=1))  # nobody works there now, and nothing is done yet


def test_a_run_killed_while_it_wrote_its_config_can_be_started_again(tmp_path):
    (tmp_path / "config.json.tmp").write_text(config_lib.to_json(smoke())[:40])
    runs.claim(tmp_path, smoke())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_runs_can_be_used_while_a_process_works_on_them(finished, tmp_path):
    with files.reserved(finished):
        assert main(["route", str(finished), "text"]) == 0
        assert main(["export", str(finished), "--to", str(tmp_path / "exported")]) == 0
        assert main(["report", str(finished), "--to", str(tmp_path / "report")]) == 0


def test_a_file_system_without_locks_does_without(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with files.reserved(tmp_path), files.reserved(tmp_path):
        pass


def test_a_lock_that_may_not_be_had_is_another_process(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")  # how some systems say it

    monkeypatch.setattr(fcntl, "flock", denied)
    with pytest.raises(UserError, match="another process works on"), files.reserved(tmp_path):
        pass


def test_without_a_terminal_progress_is_a_line_for_every_tenth(capsys):
    with progress() as track, track("reading", 40) as advance:
        for _ in range(40):
            advance(1, "well")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[0].startswith("reading 4/40, ") and lines[0].endswith(" s left well")


def test_resuming_a_finished_run_changes_nothing(finished):
    before = result(finished)
    assert main(["resume", str(finished)]) == 0
    assert result(finished) == before


def test_what_changes_only_speed_changes_no_result(finished, tmp_path):
    """Other lanes together, rows and packs at once, other checkpoints: the same clusters, nearly the same losses."""
    config = smoke()
    compute = dataclasses.replace(
        config.compute, lanes_together=3, groups_at_once=2, rows_at_once=7, packs_at_once=3, checkpoint_every=3
    )
    out = tmp_path / "other"
    runs.run(dataclasses.replace(config, compute=compute), out)
    for line, other in zip(result(out)["rounds"], result(finished)["rounds"], strict=True):
        np.testing.assert_allclose(line["loss"], other["loss"], rtol=1e-4)
    assert json.loads((out / "clusters.json").read_text()) == json.loads((finished / "clusters.json").read_text())


def test_a_run_of_a_sweep_takes_over_what_is_equal_and_ends_with_the_same_bytes(finished, tmp_path):
    again = tmp_path / "again"
    runs.run(smoke(), again, shared=runs.Shared(load_model("tiny"), (finished,)))
    assert json.loads((again / "timings.json").read_text())["taken_over"] == ["embeddings", "base answers"]
    assert result(again) == result(finished)


def test_a_sweep_finishes_what_was_begun_and_runs_nothing_twice(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "out" / "one")
    kept, console = tmp_path / "kept", Console(quiet=True)
    (tmp_path / "out" / "one" / "report.md").unlink(missing_ok=True)
    sweep({"one": smoke()}, tmp_path / "out", console)
    assert (tmp_path / "out" / "one" / "report.md").exists()
    for name in ("run", "proceed"):
        monkeypatch.setattr(runs, name, None)
    sweep({"one": smoke()}, tmp_path / "out", console, kept)  # finished here, its summary asked for later
    assert summaries.load(kept)["one"]["scores"]["base"]["rouge1"].keys() == {"mean", "per_task", "per_client"}
    sweep({"one": smoke()}, tmp_path / "elsewhere", console, kept)  # finished anywhere
    speed = dataclasses.replace(smoke(), compute=dataclasses.replace(smoke().compute, rows_at_once=3))
    sweep({"one": speed}, tmp_path / "out", console, kept)  # however it was computed
    with pytest.raises(UserError, match="a run of another config"):
        sweep({"one": dataclasses.replace(smoke(), seed=1)}, tmp_path / "out", console)


@pytest.mark.parametrize("change", [{"seed": 1}, {"dtype": "bfloat16"}, {"data": {"train_rows": 23}}])
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


def test_route_answers_with_the_nearest_adapter(finished, capsys):
    texts = ["Facts: Red Cafe, town, Oslo\nTurn the facts into one sentence.", "Is tea good?\nIs tea bad?\nSame?"]
    assert main(["route", str(finished), *texts, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["text"] for answer in answers] == texts
    for answer in answers:
        assert len(answer["distances"]) == 4
        assert answer["slot"] == int(np.argmin(answer["distances"]))
        assert answer["adapter"] == f"cluster_{answer['slot']}" and isinstance(answer["answer"], str)
        assert not answer["cut"]


def test_route_shows_all_of_texts_without_spaces_and_says_which_were_cut(finished, capsys):
    text = "".join(chr(0x4E00 + i) for i in range(40))
    assert main(["route", str(finished), text, 999 * "long "]) == 0
    shown = capsys.readouterr()
    assert set(text) <= set(shown.out) and "…" not in shown.out
    (note,) = shown.err.splitlines()
    assert note == "note: longer than --max-length 320, so cut at its end: text 2"


def test_route_answers_the_rows_of_a_file_as_the_same_texts(finished, tmp_path, capsys):
    texts = ["Facts: Red Cafe, town, Oslo\nTurn the facts into one sentence.", *(12 * [999 * "long "])]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps({"instruction": text, "id": 1}) + "\n" for text in texts))  # no answers there
    assert main(["route", str(finished), "--rows", str(file), "--json"]) == 0
    shown = capsys.readouterr()
    assert [json.loads(line) for line in shown.out.splitlines()] == serve.route(finished, texts)
    *progress, note = shown.err.splitlines()
    assert [line.split(",")[0] for line in progress][-1] == "answering 13/13"
    assert note.endswith("so cut at its end: text 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more")


def test_a_file_of_texts_has_them_where_the_rows_of_the_run_had_theirs(tmp_path):
    data = dataclasses.replace(smoke().data, data="rows.csv", columns=("instruction=question", "output=answer"))
    files.write(tmp_path / "config.json", config_lib.to_json(dataclasses.replace(smoke(), data=data)))
    (tmp_path / "asked.csv").write_text('id,question\n1,"Is it so,\nor not?"\n2,Why?\n')
    assert serve.texts_of(tmp_path / "asked.csv", tmp_path) == ("Is it so,\nor not?", "Why?")


@pytest.mark.parametrize(
    "rows, beside, expected",
    [
        ('{"instruction": "a"}\n', ["text"], "route has 1 texts and --rows"),
        ('{"question": "a"}\n', [], "line 1: no column 'instruction'; the columns are 'question'"),
        ('{"instruction": "a"}\n{"instruction": null}\n', [], "line 2: 'instruction' is null"),
        ("\n", [], "no rows"),
    ],
)
def test_files_that_cannot_be_routed(rows, beside, expected, finished, tmp_path, capsys):
    (tmp_path / "asked.jsonl").write_text(rows)
    assert main(["route", str(finished), *beside, "--rows", str(tmp_path / "asked.jsonl")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


@pytest.mark.parametrize("texts, expected", [((), "no text to route"), (("a", " "), "text 2"), (("a\udcff",), "UTF-8")])
def test_texts_that_cannot_be_routed(texts, expected, finished):
    with pytest.raises(UserError, match=expected):
        serve.route(finished, texts)


def test_answers_that_are_interrupted_are_not_said_to_be_kept(finished, monkeypatch, capsys):
    monkeypatch.setattr(serve, "route", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["route", str(finished), "text"]) == 130
    assert capsys.readouterr().err == "fedrouter: interrupted; the same command begins anew\n"


def test_route_refuses_a_client_that_is_not_there(finished, capsys):
    assert main(["route", str(finished), "text", "--client", "9"]) == 2
    assert "clients are 0 to 3" in capsys.readouterr().err


def test_oracle_routing_sends_every_row_to_the_slot_of_its_task(finished):
    loaded = runs.load(finished)
    prepared, enrolment = loaded.prepared, loaded.enrolment
    told = dataclasses.replace(prepared.config.evaluation, personalised_routing="oracle")
    prepared = prepared._replace(config=dataclasses.replace(prepared.config, evaluation=told))
    asked = evaluate.questions(prepared, loaded.state, enrolment, loaded.embeddings, False)
    held = evaluate.slot_tasks(prepared, enrolment)
    own = [question for question in asked if question.part == "personalised"]
    assert len(own) == 32
    for question in own:
        task = prepared.partition.tasks.index(prepared.dataset.test[question.row].task)
        assert int(np.argmax(question.weights)) == held[task].argmax()


def relabel(run):
    path = run / "clusters.json"
    clusters = json.loads(path.read_text())
    clusters["clients"][0]["local"][0] = 7
    path.write_text(json.dumps(clusters))


def lacking(key):
    def without(run):
        path = run / "clusters.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))

    return without


def edited(old, new, older=False):
    """config.json with another value; `older`: in a run whose clusters do not say yet what it was begun with."""

    def edit(run):
        path = run / "config.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        if older:
            lacking("config")(run)

    return edit


def repeat(run):
    """A log that two processes wrote."""
    path = run / "rounds.jsonl"
    path.write_text("".join(line * 2 for line in path.read_text().splitlines(keepends=True)))


def shorten(name):
    def cut(run):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])

    return cut


@pytest.mark.parametrize(
    "damage, command, expected",
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), "route", "holds no checkpoint, so no adapters"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "export", "holds no checkpoint, so no adapters"),
        (shorten("embeddings.npy"), "resume", "not the embeddings of this run"),
        (shorten("rounds.jsonl"), "resume", "whole lines, but 3 rounds are trained"),
        (repeat, "resume", "line 2: round 1, expected 2"),
        (relabel, "resume", "the clusters of client 0 are not those of the table"),
        (relabel, "route", "the clusters of client 0 are not those of the table"),
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


def test_answers_that_were_lost_are_given_again(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "predictions.jsonl").unlink()
    assert main(["resume", str(run)]) == 0
    assert (run / "predictions.jsonl").read_bytes() == (finished / "predictions.jsonl").read_bytes()


def test_export_writes_what_the_run_holds(finished, tmp_path, capsys):
    assert main(["export", str(finished), "--to", str(tmp_path)]) == 0
    for path in [*finished.glob("adapters/*/*"), *finished.glob("router/*")]:
        assert (tmp_path / path.relative_to(finished)).read_bytes() == path.read_bytes()
    assert main(["export", str(finished), "--to", str(tmp_path)]) == 2
    assert "adapters of two runs would mix" in capsys.readouterr().err


def test_an_unfinished_run_says_so_when_it_is_used(finished, tmp_path, capsys):
    part = tmp_path / "part"
    shutil.copytree(finished, part)
    shutil.rmtree(part / "checkpoints" / "3")
    for run, notes in ((finished, []), (part, [f"note: {part} has done 2 of 3 rounds"])):
        for arguments in (["route", str(run), "text", "--json"], ["export", str(run), "--to", f"{run}-exported"]):
            assert main(arguments) == 0
            printed, errors = capsys.readouterr()
            assert errors.splitlines() == notes and "note" not in printed


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
    begun, older, embedded = (tmp_path / name for name in ("begun", "older", "embedded"))
    for run in (begun, older):
        shutil.copytree(finished, run)
    lacking("model")(older)
    with (older / "embeddings.npy").open("rb") as file:
        points = np.load(file)
    np.save(older / "embeddings.npy", points)
    embedded.mkdir()
    for name in ("config.json", "embeddings.npy"):  # killed before there were clusters
        shutil.copy(finished / name, embedded)
    monkeypatch.setattr(tiny, "SEED", tiny.SEED + 1)
    for arguments in (["resume", str(begun)], ["route", str(begun), "text"], ["resume", str(embedded)]):
        assert main(arguments) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        name = "embeddings.npy" if str(embedded) in arguments else "clusters.json"
        assert f"{name}: not the " in message and "the weights of tiny were others then" in message
    assert main(["resume", str(older)]) == 0  # it cannot know


def test_rows_that_lose_their_end_are_counted(finished, capsys):
    prepared = experiment.prepare(smoke())
    longer = sum(len(row.response) == smoke().data.max_response for held in prepared.train for row in held)
    assert 0 < longer == json.loads((finished / "clusters.json").read_text())["cut_rows"]
    finish(finished)
    assert f"note: {longer} of 96 training rows lost their end" in " ".join(capsys.readouterr().out.split())


def test_lanes_that_were_left_out_are_told(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    lanes = [lane for record in rounds for lane in record["lanes"]]
    for left_out in (1, len(lanes)):
        for lane in lanes[:left_out]:
            lane["rejected"] = "not finite"
        (run / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rounds))
        finish(run)
        said = " ".join(capsys.readouterr().out.split())
        assert f"{left_out} of {len(lanes)} lanes were left out" in said


def test_rounds_past_the_checkpoint_are_done_and_logged_once(finished, tmp_path):
    """Killed when a round's line was written and its checkpoint was not."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "3")
    assert main(["resume", str(run)]) == 0
    assert result(run)["rounds"] == result(finished)["rounds"]


def test_a_folder_that_another_process_makes_meanwhile_is_free(tmp_path, monkeypatch):
    """Seen once in two processes of one run: it was no folder, and a moment later it was there."""
    out, is_dir = tmp_path / "run", Path.is_dir

    def and_then_made(path):
        found = is_dir(path)
        out.mkdir(exist_ok=True)
        return found

    monkeypatch.setattr(Path, "is_dir", and_then_made)
    runs.check_free(out, smoke())


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    files.write(path, "old")
    with pytest.raises(KeyboardInterrupt), files.replaced(path) as beside:
        beside.write_text("ne")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_line_ends_where_its_own_break_is(tmp_path):
    """JSON of any script holds U+2028 and U+0085 as they are, which are no ends of lines in a file."""
    log = tmp_path / "log"
    log.write_text('"one \u2028 \x85 whole"\n"two"\n"cut sh', encoding="utf-8")
    assert files.lines(log) == ['"one \u2028 \x85 whole"', '"two"']


def test_a_checkpoint_that_cannot_be_written_is_one_line_whatever_is_raised(tmp_path, monkeypatch):
    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: \n no space left")  # TensorStore's kind of error

    monkeypatch.setattr(checkpoint, "_open", full)
    with pytest.raises(UserError, match="the checkpoint of round 2 could not be written .*: no space left"):
        checkpoint.save(tmp_path, 2, {"x": jnp.zeros(2)})


def test_asking_for_checkpoints_makes_no_folder(tmp_path):
    assert checkpoint.latest(tmp_path / "checkpoints") is None and not list(tmp_path.iterdir())


def test_predictions_that_were_cut_short_are_made_again(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    whole = (run / "predictions.jsonl").read_text()
    (run / "predictions.jsonl").write_text("".join(whole.splitlines(keepends=True)[:3]))
    assert main(["resume", str(run)]) == 0
    assert (run / "predictions.jsonl").read_text() == whole


@pytest.mark.parametrize(
    "kept, missing",
    [
        (["embeddings.npy"], {"total", "embed"}),  # killed before there were clusters
        (["embeddings.npy", "clusters.json", "checkpoints/3"], {"total", "embed", "cluster"}),
    ],
)
def test_a_resumed_run_notes_the_times_that_it_knows(kept, missing, finished, tmp_path):
    run = tmp_path / "run"
    for name in ("config.json", "rounds.jsonl", *kept):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (finished / name).is_dir() else shutil.copy)(finished / name, run / name)
    runs.proceed(run)
    whole, found = (json.loads((path / "timings.json").read_text()).keys() for path in (finished, run))
    assert whole == {"device", "taken_over", "total", "embed", "cluster", "evaluate"} and found == whole - missing


def test_the_two_latest_checkpoints_are_kept(tmp_path):
    for step in range(4):
        checkpoint.save(tmp_path, step, {"x": jnp.full(2, step)})
    assert checkpoint.latest(tmp_path) == 3
    for step in (2, 3):
        assert checkpoint.load(tmp_path, step, {"x": jnp.zeros(2, jnp.int32)})["x"].tolist() == [step] * 2
    with pytest.raises(UserError, match="round 1 could not be read"):
        checkpoint.load(tmp_path, 1, {"x": jnp.zeros(2, jnp.int32)})


def test_the_last_round_is_saved_whatever_the_interval(tmp_path):
    config = smoke()
    config = dataclasses.replace(
        config,
        strategy="local",
        rounds=dataclasses.replace(config.rounds, rounds=1),
        compute=dataclasses.replace(config.compute, checkpoint_every=2),
        evaluation=dataclasses.replace(config.evaluation, evaluate_at=(1,)),
    )
    runs.claim(tmp_path / "run", config)
    loaded = runs.load(tmp_path / "run")
    runs.train(tmp_path / "run", loaded, sharing.silent)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") == 1
    assert "scores" not in json.loads((tmp_path / "run" / "rounds.jsonl").read_text())  # the run's own scores follow
