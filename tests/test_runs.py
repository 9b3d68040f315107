"""A run from start to end, killed and resumed. On the tiny random model."""

import contextlib
import dataclasses
import errno
import fcntl
import io
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from experiments import summaries
from experiments.sweep import sweep
from fedrouter_jax import checkpoint, clusters, evaluate, experiment, files, report, runs, sharing, terminal
from fedrouter_jax import config as config_lib
from fedrouter_jax.cli import finish, main
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import load_model
from fedrouter_jax.presets import smoke
from fedrouter_jax.rouge import score
from fedrouter_jax.terminal import progress

FINAL = ("scores.json", "predictions.jsonl", "clusters.json", "router/router.safetensors", "router/router.json")


def result(out: Path) -> dict[str, bytes]:
    """The bytes that a run ends with, and its log without the seconds."""
    files = [*(out / name for name in FINAL), *sorted(out.glob("adapters/*.json")), *sorted(out.glob("adapters/*/*"))]
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
        assert line["optimiser_steps_per_client"] == 2
    adapters = sorted(path.name for path in (finished / "adapters").iterdir() if path.is_dir())
    assert adapters == ["cluster_0", "cluster_1", "cluster_2", "cluster_3"]
    # Four lanes a round, each as large as one exported adapter without its header.
    weights = finished / "adapters" / "cluster_0" / "adapter_model.safetensors"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert lines[0]["bytes_up"] == 4 * (weights.stat().st_size - header)
    scores = json.loads((finished / "scores.json").read_text())
    for part in ("base", "personalised", "generalisation"):
        assert set(scores[part]["rouge1"]) == {"mean", "per_task", "per_client"} and scores[part]["rows"] > 0
    said = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    for part, found in scores.items():
        answers = [answer for answer in said if answer["part"] == part]
        rouge = [score(answer["reference"], answer["answer"])["rouge1"] for answer in answers]
        assert [answer["rouge1"] for answer in answers] == pytest.approx(rouge, abs=1e-6)
        clients = {answer["client"] for answer in answers}
        own = [[r for r, answer in zip(rouge, answers, strict=True) if answer["client"] == c] for c in clients]
        assert found["rouge1"]["mean"] == pytest.approx(np.mean([np.mean(values) for values in own]))
    clusters = json.loads((finished / "clusters.json").read_text())
    assert 0 < clusters["accuracy"]["global"] <= 1 and len(clusters["clients"]) == 4
    description = json.loads((finished / "router" / "router.json").read_text())
    router = load_file(finished / "router" / "router.safetensors")
    assert router["centroids"].shape[0] == 4 and description["adapters"] == adapters
    assert description["layers"] == 1 and description["pooling"].endswith("but the first 1")
    assert description["tasks"] == clusters["slot_tasks"]
    assert description["max_length"] == 320 and not description["final_norm"] and description["skip"] == 1
    prompt = json.loads((finished / "adapters" / "prompt.json").read_text())
    assert prompt == {"before": "", "behind": "\n### Response:", "max_length": 320, "max_response": 24}
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
    runs.proceed(out)
    found, expected = result(out), result(finished)
    assert not [name for name in found | expected if found.get(name) != expected.get(name)]
    assert found == expected


def test_a_second_process_is_refused_while_one_works(finished, tmp_path, capsys):
    """Meanwhile a round whose line was written and whose checkpoint was not is done again, and logged once."""
    run, codes = tmp_path / "run", []
    shutil.copytree(finished, run)
    (run / "predictions.jsonl").unlink()
    shutil.rmtree(run / "checkpoints" / "3")

    @contextlib.contextmanager
    def others(what, total, done=0):
        codes.append(main(["resume", str(run)]))
        assert capsys.readouterr().err == f"fedrouter: another process works on {run}; wait for it, or end it\n"
        yield lambda rows, note="": None

    runs.proceed(run, others)
    assert codes == [2, 2, 2] and result(run) == result(finished)  # asked in training, answering, reading references


def test_a_new_run_is_not_given_another_config_while_it_begins(tmp_path, capsys):
    run, other = tmp_path / "run", ["run", "--preset", "smoke", "--seed", "1", "--out", str(tmp_path / "run")]

    def others(what, total, done=0):
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


def test_the_time_left_after_a_resume_is_told_by_what_was_done_since(monkeypatch, capsys):
    seconds = iter([0.0, 60.0, 120.0])
    monkeypatch.setattr(terminal.clock, "monotonic", lambda: next(seconds))
    with terminal.logged("training", 10, 6) as advance:
        advance(1)
        advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "training 7/10, 60 s, 180 s left",
        "training 8/10, 120 s, 120 s left",
    ]


def test_resuming_a_finished_run_changes_nothing(finished):
    before = result(finished)
    runs.proceed(finished)
    assert result(finished) == before


def test_what_changes_only_speed_changes_no_result(finished, tmp_path):
    """Other lanes together, rows and packs at once, other checkpoints: the same clusters, nearly the same losses."""
    config = smoke()
    compute = dataclasses.replace(
        config.compute, lanes_together=3, groups_at_once=2, rows_at_once=7, packs_at_once=3, checkpoint_every=3
    )
    out, silent = tmp_path / "other", dataclasses.replace(config.evaluation, evaluate_at=())
    runs.claim(out, dataclasses.replace(config, compute=compute, evaluation=silent))
    runs.train(out, runs.load(out), sharing.silent)
    lines = [record(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    for line, other in zip(lines, result(finished)["rounds"], strict=True):
        np.testing.assert_allclose(line["loss"], other["loss"], rtol=1e-4)
    found, expected = (json.loads((path / "clusters.json").read_text()) for path in (out, finished))
    assert {**found, "config": None} == {**expected, "config": None}


def test_a_run_of_a_sweep_takes_over_what_is_equal_and_ends_with_the_same_bytes(finished, tmp_path):
    again = tmp_path / "again"
    runs.run(smoke(), again, shared=runs.Shared(load_model("tiny"), (finished,)))
    assert json.loads((again / "timings.json").read_text())["taken_over"] == ["embeddings", "base answers"]
    assert result(again) == result(finished)


def test_a_sweep_finishes_what_was_begun_and_runs_nothing_twice(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "out" / "one")
    kept, console = tmp_path / "kept", Console(file=io.StringIO(), width=400)
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
    assert console.file.getvalue().count(f"1 of 1 runs have a summary in {kept} and are not run again") == 2
    other = {"two": smoke(), "one": dataclasses.replace(smoke(), seed=1)}
    with pytest.raises(UserError, match="a run of another config, with seed 0, where 1 is asked for"):
        sweep({"one": other["one"]}, tmp_path / "out", console)
    before = (kept / "one.json").read_bytes()
    with pytest.raises(
        UserError, match="one.json is of another experiment, with seed 0, where 1 is asked for"
    ):  # before anything runs
        sweep(other, tmp_path / "anew", console, kept)
    assert (kept / "one.json").read_bytes() == before and not (tmp_path / "anew").exists()


def test_a_run_that_was_reported_before_its_end_is_not_taken_for_a_finished_one(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # what sweeps do after a run; the next test has its programs
    run, kept = tmp_path / "out" / "one", tmp_path / "kept"
    shutil.copytree(finished, run)
    for name in ("scores.json", "timings.json", "predictions.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints" / "3")
    report.write([run], run)
    with pytest.raises(UserError, match="continue it with: fedrouter resume"):
        runs.check_free(run, smoke())
    sweep({"one": smoke()}, tmp_path / "out", Console(quiet=True), kept)
    assert runs.finished(run) and summaries.load(kept)["one"]["scores"]
    with pytest.raises(UserError, match="this very run, finished"):
        runs.check_free(run, smoke())


def test_oracle_routing_sends_every_row_to_the_slot_of_its_task(finished):
    loaded = runs.load(finished)
    prepared, enrolment = loaded.prepared, loaded.enrolment
    told = dataclasses.replace(prepared.config.evaluation, personalised_routing="oracle")
    prepared = prepared._replace(config=dataclasses.replace(prepared.config, evaluation=told))
    asked = evaluate.questions(prepared, loaded.state, enrolment, loaded.embeddings, False)
    held = clusters.slot_tasks(prepared, enrolment)
    own = [question for question in asked if question.part == "personalised"]
    assert len(own) == 32
    for question in own:
        task = prepared.partition.tasks.index(prepared.dataset.test[question.row].task)
        assert int(np.argmax(question.weights)) == held[task].argmax()


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


def test_a_folder_that_another_process_makes_meanwhile_is_free(tmp_path, monkeypatch):
    """Seen once in two processes of one run: it was no folder, and a moment later it was there."""
    out, is_dir = tmp_path / "run", Path.is_dir

    def and_then_made(path):
        found = is_dir(path)
        out.mkdir(exist_ok=True)
        return found

    monkeypatch.setattr(Path, "is_dir", and_then_made)
    runs.check_free(out, smoke())


@pytest.mark.parametrize(
    "kept, missing",
    [
        (["embeddings.npy"], {"total", "embed"}),  # killed before there were clusters
        (["rounds.jsonl", "embeddings.npy", "clusters.json", "checkpoints/3"], {"total", "embed", "cluster"}),
    ],
)
def test_a_resumed_run_notes_the_times_that_it_knows(kept, missing, finished, tmp_path, unanswered):
    run = tmp_path / "run"
    for name in ("config.json", *kept):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (finished / name).is_dir() else shutil.copy)(finished / name, run / name)
    runs.proceed(run)
    whole, found = (json.loads((path / "timings.json").read_text()).keys() for path in (finished, run))
    assert whole == {"device", "taken_over", "total", "embed", "cluster", "evaluate"} and found == whole - missing


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
