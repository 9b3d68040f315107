"""Bad input on the command line: one clear line, exit code 2, no traceback, nothing lost."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from types import ModuleType

import jax
import pytest
from helpers import one_line

from fedrouter_jax import __main__, cli, method, processes, runs, terminal
from fedrouter_jax.cli import main
from fedrouter_jax.errors import printable
from fedrouter_jax.terminal import failed, in_a_line, parse

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


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--clients", "0"], "--clients is 0; it must be at least 1"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--clients", "3000000000"], "--clients is 3000000000; it must be below 2^31"),
        (["--global-clusters", "10000000000"], "--global-clusters is 10000000000; give 1 to 2147483647"),
        (["--template", "\udcff{instruction}"], "an option is '\\udcff{instruction}', which holds bytes that are not"),
        (["--template", "alpca"], "--template is 'alpca'; expected alpaca, short, chat (the model's own), or a text"),
        (["--template", "{instruction} {instruction}"], "or a text that holds {instruction} once"),
        (["--template", "chat"], "--template is chat, but the model's tokenizer has none that works"),
        (["--local-clusters", "-1"], "--local-clusters is -1"),
        (["--global-clusters", "99"], "99 global clusters were asked for but 2 clients of 2"),
        (["--local-clusters", "99"], "99 local clusters were asked for"),
        (["--participation", "1.5"], "share of the clients"),
        (["--dropout", "1"], "--dropout is 1.0; it must be in [0, 1)"),
        (["--proximal", "-1"], "--proximal is -1.0; it must be at least 0"),
        (["--learning-rate", "nan"], "--learning-rate is nan; it must be above 0"),
        (["--clip", "-1"], "--clip is -1.0"),
        (["--alpha", "inf"], "--alpha is inf"),
        (["--seed", "-1"], "--seed is -1"),
        (["--evaluate-at", "2", "0"], "--evaluate-at is 0"),
        (["--groups-at-once", "0"], "--groups-at-once is 0"),
        (["--train-rows", "1"], "a client holds 2 tasks"),
        (["--newcomers", "2"], "--newcomers is 2; some of the 2 clients must train"),
        (["--mixture-alpha", "0"], "--mixture-alpha is 0.0"),
        (["--unseen", "poems"], "--unseen names 'poems'"),
        (["--server-rate", "0"], "--server-rate is 0.0"),
        (["--strategy", "feddpa-t", "--steps", "1"], "shares them among 2 phases"),
        (["--targets", "w_proj"], "'w_proj', which no block has"),
        (["--max-length", "30"], "--max-length to at least"),
        (["--model", "no/such-model"], "no/such-model"),
        (
            ["--columns", "question"],
            "--columns has 'question'; expected instruction=NAME, output=NAME, task=NAME, client=",
        ),
        (["--columns", "instruction=output"], "--columns takes 'output' for both instruction and output"),
        (["--columns", "input=output"], "--columns takes 'output' for both output and input"),
        (["--columns", "task=a", "task=b"], "--columns gives task twice, 'a' and 'b'"),
        (["--scenario", "single", "--clients", "1"], "raise --clients to at least"),
        (["--train-rows", "4", "--local-clusters", "5"], "client 0 has 4 rows but 5 local clusters"),
        (["--max-clusters", "1", "--global-clusters", "0"], "--max-clusters is 1"),
        (["--strategy", "ifca", "--global-clusters", "0"], "but ifca clusters no rows"),
        (["--dtype", "mixed", "--quantise", "nf4"], "choose one of them"),
        (["--strategy", "fedex", "--server", "adam"], "fedex averages their products"),
        (["--strategy", "flexlora", "--server", "momentum"], "flexlora averages their products"),
        (["--learning-rate", "1e-6"], "--min-learning-rate is 1e-05, above --learning-rate 1e-06"),
        (["--max-length", "4096"], "tiny knows 2048 positions"),
        (["--model-parallel", "64"], "--model-parallel is 64, but there are"),
        (["--coordinator", "localhost", "--num-processes", "1", "--process-id", "0"], "give HOST:PORT"),
        (["--coordinator", "host:99999", "--num-processes", "1", "--process-id", "0"], "give HOST:PORT"),
    ],
)
def test_values_that_cannot_run(arguments, expected, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = ["run", *SMALL, "--data", str(data), "--out", str(tmp_path / "run"), *arguments]
    assert expected in one_line(capsys, *run)


def test_a_command_leaves_at_once_where_it_fails_and_says_so_by_its_exit_code(monkeypatch):
    """Threads that a failed write left behind are not waited for; an interrupt may come before there is a command."""
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(sys, "argv", ["fedrouter", "run", "--clients", "0"])
    __main__.console()
    monkeypatch.setattr(sys, "argv", ["fedrouter", "plan", "--model", "tiny"])
    __main__.console()

    class Slow(ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "fedrouter_jax.cli", Slow("cli"))
    __main__.console()
    assert left == [2, 130]


def test_processes_find_each_other_before_jax_sees_a_device(monkeypatch, tmp_path):
    """Methods compute with arrays where they are checked."""
    order = []
    for whose, name in ((processes, "join"), (method, "check"), (runs, "run")):
        monkeypatch.setattr(whose, name, lambda *_, name=name: order.append(name))
    monkeypatch.setattr(cli, "finish", lambda out: None)
    assert main(["run", *SMALL, "--out", str(tmp_path / "run")]) == 0 and order == ["join", "check", "run"]


def test_a_machine_without_memory_left_is_told_in_one_line(capsys):
    def full():
        raise MemoryError("Unable to allocate 7 TiB")

    assert terminal.guarded(full) == 2
    assert "this machine's memory is used up (Unable to allocate 7 TiB); give fewer" in capsys.readouterr().err


def test_an_interrupted_run_says_how_it_goes_on(data, tmp_path, capsys, monkeypatch):
    def stopped(config, out, track):
        runs.claim(out, config)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run", stopped)
    out = tmp_path / "run"
    assert main(["run", *SMALL, "--data", str(data), "--out", str(out)]) == 130
    assert f"interrupted; `fedrouter resume {out}` goes on from there" in capsys.readouterr().err


def test_unknown_commands_and_options_are_refused(capsys):
    assert "choose among run, resume, report, route, export" in one_line(capsys, "train")
    assert "choose among smoke, demo" in one_line(capsys, "run", "--preset", "nonsense")
    assert "--preset is given 2 times" in one_line(capsys, "run", "--preset", "smoke", "--preset=demo")


@dataclass(frozen=True)
class Options:
    """Two short lines."""

    depth: int = 1
    """One line
    and another."""


def test_help_is_broken_by_the_terminal_alone(capsys):
    """Not where the source breaks a docstring."""
    with pytest.raises(SystemExit, match="0"):
        parse(Options, "name", args=["--help"])
    assert "One line and another." in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["run", "--nonsense", "1"], "Unrecognized options: --nonsense, 1; see fedrouter run --help"),
        (["run", "--roundz", "1"], "options: --roundz, 1; there is --rounds INT; see fedrouter run --help"),
        (["run", "--lr", "1"], "Unrecognized options: --lr, 1; there is --learning-rate; see fedrouter run --help"),
        (["plan", "--lr=1"], "there is --learning-rate; see fedrouter plan --help"),
        (["run", "--stratgy", "fedit"], "options: --stratgy, fedit; there is --strategy; see fedrouter run --help"),
        (["run", "--prest", "smoke"], "options: --prest, smoke; there is --preset NAME; see fedrouter run --help"),
        (["run", "--rounds", "a"], "invalid literal for int() with base 10: 'a'; there is --rounds INT; see"),
        (["run", "--scenario", "trio"], "Expected one of ('single', 'dual', 'all', 'dirichlet', 'natural'); see"),
        (["resume"], "Missing from fedrouter resume: PATH Run directory. (required); see fedrouter resume --help"),
    ],
)
def test_options_that_cannot_be_parsed_are_refused_in_a_line(capsys, arguments, expected):
    assert expected in one_line(capsys, *arguments)


def test_a_box_as_tyro_draws_it_at_a_terminal_is_a_line():
    red, end = "\x1b[31m", "\x1b[0m"
    lines = ["Unrecognized options: --roundz, 3", f"{red}{'─' * 36}{end}", "Perhaps you meant:", "    --rounds INT"]
    lines += ["        Federated rounds T.", f"{red}{'─' * 36}{end}", "For full helptext, run fedrouter run --help"]
    inside = "".join(f"{red}│{end} {line} {red}│{end}\n" for line in lines)
    box = f"{red}╭─{end} Unrecognized options {red}──╮{end}\n{inside}{red}╰{'─' * 38}╯{end}\n"
    assert in_a_line(box) == "Unrecognized options: --roundz, 3; there is --rounds INT"
    assert in_a_line("Error: no box\n") == "Error: no box"


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
    assert "no_rows" in one_line(
        capsys, "run", *SMALL, "--data", str(tmp_path / "no_rows"), "--out", str(tmp_path / "run")
    )


@pytest.fixture
def no_hub(monkeypatch):
    """Nobody asks the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("the hub is asked"))


def test_presets_without_rows_say_at_once_what_they_need(tmp_path, capsys, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    message = one_line(capsys, "run", "--preset", "flan4-dual-cpu", "--model", "tiny")
    assert "preset flan4-dual-cpu needs --data FOLDER with train.jsonl and test.jsonl (flan4: no such file" in message
    assert "OWNER/NAME" in message
    for arguments in (["--preset", "flan4-dual-cpu"], []):
        message = one_line(capsys, "run", *arguments, "--data", "flan5")
        assert "flan5: no such file or directory here; " in message and "full id, OWNER/NAME" in message
        assert "preset" not in message
    assert not [*tmp_path.iterdir()]  # nothing is written
    (tmp_path / "rows").mkdir()  # a slip behind a folder that is there is none of the hub's
    message = one_line(capsys, "run", "--preset", "smoke", "--data", "rows/flan5")
    assert "rows/flan5: no such file or directory in rows; " in message


@pytest.mark.parametrize("imported", ["terminal", "cli, terminal"])
def test_warnings_of_the_hub_do_not_come_twice(imported):
    """Nor once, whether the hub's client was imported before or is later."""
    say = (
        f"from fedrouter_jax import {imported}; terminal.guarded(lambda: None); import logging; "
        "from huggingface_hub.utils import logging as theirs; theirs.get_logger('huggingface_hub.x').warning('retry')"
    )
    done = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_directories_that_are_no_run_of_this_config(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert "is no run directory" in one_line(capsys, "resume", str(out))
    assert "is no run directory" in one_line(capsys, "report", str(out))
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    run = ["run", *SMALL, "--data", str(data), "--out", str(out)]
    assert "is no run directory" in one_line(capsys, *run)
    assert (out / "thesis.txt").read_text() == "years of work" and len(list(out.iterdir())) == 1
    (out / "thesis.txt").unlink()
    # A run that is refused before it has done anything gives way to another; one that has begun does not.
    one_line(capsys, *run, "--global-clusters", "99")
    assert "98 global" in one_line(capsys, *run, "--global-clusters", "98")
    (out / "rounds.jsonl").touch()
    assert "another config" in one_line(capsys, *run)
    assert "resume" in one_line(capsys, *run, "--global-clusters", "98")
    run_config = (out / "config.json").read_text()
    (out / "config.json").write_text(run_config.replace('"rank": 8', '"rank": "8"'))
    assert "lora.rank: Input should be a valid integer, found '8'" in one_line(capsys, "resume", str(out))
    for unknown in ('"quant": {"bits": 4}, "seed"', '"lora_rank": 8, "seed"'):
        (out / "config.json").write_text(run_config.replace('"seed"', unknown, 1))
        assert "Unexpected keyword argument" in one_line(capsys, "resume", str(out))
    (out / "config.json").write_text("{")
    assert "not readable as JSON" in one_line(capsys, "resume", str(out))


def test_paths_that_cannot_be_are_one_line(data, tmp_path, capsys):
    long, run = str(tmp_path / (300 * "x")), ["run", *SMALL, "--data", str(data), "--out"]
    for arguments in ([*run, long], [*run, str(tmp_path / "run"), "--model", long], ["report", long]):
        assert long in (message := one_line(capsys, *arguments)) and message.endswith(": File name too long")
    one_line(capsys, *run, str(tmp_path / "run"), "--global-clusters", "99")
    (tmp_path / "run" / "rounds.jsonl").mkdir()
    assert "rounds.jsonl: Is a directory" in one_line(capsys, "report", str(tmp_path / "run"))


def test_a_folder_whose_name_is_no_text_is_refused_before_the_work(data, tmp_path, finished, capsys):
    """Its checkpoints could not be written, nor its pages name it."""
    out = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9/run")
    assert "whose name is not UTF-8" in one_line(capsys, "run", *SMALL, "--data", str(data), "--out", out)
    assert "whose name is not UTF-8" in one_line(capsys, "report", str(finished), "--to", out)


def test_an_error_moves_no_cursor(capsys):
    """Names of tensors and clients are others' texts, in any script."""
    plain = "\u4f60\u597d\u3000\u4e16 caf\u00e9\u00a0\u2013 \u0646\u200c\u0645"
    assert printable(plain) == plain
    assert failed(2, "a\x1b[2Jb\x9b\u202e") == 2
    assert capsys.readouterr().err == "fedrouter: a\\x1b[2Jb\\x9b\\u202e\n"


def test_a_reader_that_stops_is_told_nothing():
    """`fedrouter plan --model tiny | true`, however much of what is printed was flushed by then."""
    say = (
        "import sys; from fedrouter_jax import terminal; terminal.keep_programs = lambda: None; "
        "sys.exit(terminal.guarded(lambda: print('x' * {})))"
    )
    for letters in (10, 1_000_000):
        process = subprocess.Popen(
            [sys.executable, "-c", say.format(letters)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141
        process.stderr.close()


def test_a_device_that_is_full_or_missing_is_one_line(monkeypatch, capsys):
    def fails(error):
        raise error

    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile trying to allocate 9 bytes")
    assert terminal.guarded(lambda: fails(full)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Out of memory while" in line and "--groups-at-once 1" in line and "compute in its config.json" in line
    with pytest.raises(AssertionError, match="ours"):
        terminal.guarded(lambda: fails(AssertionError("ours")))
    monkeypatch.setattr(jax, "devices", lambda: fails(RuntimeError("Unable to initialize backend 'x'")))
    monkeypatch.setenv("JAX_PLATFORMS", "x")
    assert terminal.guarded(lambda: fails(AssertionError())) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "JAX finds no device (Unable to initialize backend 'x'; JAX_PLATFORMS is 'x')" in line


def test_answers_are_printed_in_any_locale():
    say = (
        "import sys; from fedrouter_jax import terminal as t; sys.exit(t.guarded(lambda: print('caf\\u00e9 \\u4e16')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", say], env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "caf\\xe9 \\u4e16\n"


def test_a_write_that_fails_is_one_line_and_keeps_what_was_there(tmp_path):
    """A full disk, as far as a process can see one: no file may grow past 20 kB."""
    run = [sys.executable, "-m", "fedrouter_jax", "run", "--preset", "smoke", "--out", str(tmp_path / "run")]
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *run]
    done = subprocess.run(limited, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("fedrouter: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "could not be written" in lines[0] and "resume" in lines[0]
    assert (tmp_path / "run" / "config.json").exists()
