"""Bad input on the command line: one clear line, exit code 2, no traceback, nothing lost."""

import json
import resource
import subprocess
import sys

import pytest

from fedrouter_jax.cli import main

ROWS = [{"instruction": f"q {i}?", "output": f"a {i}", "task": "ab"[i % 2]} for i in range(40)]
SMALL = ["--preset", "smoke", "--clients", "2"]


def write_rows(folder, rows=ROWS, name="train.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "rows"
    write_rows(folder)
    write_rows(folder, ROWS[:8], "test.jsonl")
    return folder


def refused(capsys, *arguments):
    """The one line that the command prints before it exits with 2."""
    try:
        code = main(list(arguments))
    except SystemExit as stop:  # tyro's own exit for unknown options
        code = stop.code
    message = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in message
    return message


def one_line(capsys, *arguments):
    message = refused(capsys, *arguments)
    assert message.startswith("fedrouter: ") and message.count("\n") == 1 and len(message) < 600
    return message


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--preset", "nonsense"], "choose among smoke, demo"),
        (["--clients", "0"], "--clients is 0; it must be at least 1"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--local-clusters", "-1"], "--local-clusters is -1"),
        (["--global-clusters", "99"], "99 global clusters were asked for but the clients found 4"),
        (["--local-clusters", "99"], "99 local clusters were asked for"),
        (["--participation", "1.5"], "share of the clients"),
        (["--targets", "w_proj"], "'w_proj', which no block has"),
        (["--max-length", "30"], "--max-length to at least"),
        (["--model", "no/such-model"], "no/such-model"),
        (["--columns", "question"], "--columns has 'question'"),
        (["--scenario", "single", "--clients", "1"], "raise --clients to at least"),
        (["--train-rows", "1"], "rows but 2 local clusters"),
    ],
)
def test_values_that_cannot_run(arguments, expected, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = ["run", *SMALL, "--data", str(data), "--out", str(tmp_path / "run"), *arguments]
    assert expected in one_line(capsys, *run)


def test_unknown_commands_and_options_are_refused(capsys):
    assert "choose among run, resume, report, route, export" in one_line(capsys, "train")
    assert "--nonsense" in refused(capsys, "run", "--nonsense", "1")


@pytest.mark.parametrize(
    "content, expected",
    [
        ('{"instruction": "q", "output": "a"\n', "line 1"),
        ("", "train.jsonl"),
        (json.dumps({"question": "q", "output": "a"}) + "\n", "instruction"),
        (json.dumps({"instruction": "  ", "output": "a", "task": "t"}) + "\n", "line 1"),
    ],
)
def test_broken_data_names_the_file_and_the_line(content, expected, data, tmp_path, capsys):
    (data / "train.jsonl").write_text(content)
    message = one_line(capsys, "run", *SMALL, "--data", str(data), "--out", str(tmp_path / "run"))
    assert "train.jsonl" in message and expected in message


def test_missing_data_names_the_path(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no_rows" in one_line(capsys, "run", *SMALL, "--data", str(tmp_path / "no_rows"))


def test_directories_that_are_no_run_of_this_config(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert "is no run directory" in one_line(capsys, "resume", str(out))
    assert "is no run directory" in one_line(capsys, "report", str(out))
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    run = ["run", *SMALL, "--data", str(data), "--out", str(out)]
    assert "is no run directory" in one_line(capsys, *run)
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "thesis.txt").unlink()
    # A refused run leaves its config; another config may then not take its place.
    one_line(capsys, *run, "--global-clusters", "99")
    assert "another config" in one_line(capsys, *run, "--global-clusters", "2")
    assert "resume" in one_line(capsys, *run, "--global-clusters", "99")
    (out / "config.json").write_text((out / "config.json").read_text().replace('"rank": 8', '"rank": "8"'))
    assert "rank is '8'" in one_line(capsys, "resume", str(out))
    (out / "config.json").write_text("{")
    assert "not readable as JSON" in one_line(capsys, "resume", str(out))


def test_a_write_that_fails_is_one_line_and_keeps_what_was_there(tmp_path):
    """A full disk, as far as a process can see one: no file may grow past 20 kB."""
    limit = 20_000

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "fedrouter_jax", "run", "--preset", "smoke", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, preexec_fn=small_disk, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("fedrouter: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "could not be written" in lines[0] and "resume" in lines[0]
    assert (tmp_path / "run" / "config.json").exists()
