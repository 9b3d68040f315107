"""What the command line says of itself: usage, examples, presets, versions; and that what it says can be typed."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from written_runs import make_run

import fedrouter_jax
from fedrouter_jax import commands, presets
from fedrouter_jax.cli import main
from fedrouter_jax.config import Config
from fedrouter_jax.terminal import parse

ROOT = Path(__file__).resolve().parents[1]
CLASSES = {name: getattr(commands, name.capitalize()) for name in commands.EXAMPLES}


def help_of(capsys, monkeypatch, command, columns=80):
    """What `fedrouter COMMAND --help` prints on a console of so many columns."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", commands.EXAMPLES)
def test_help_begins_with_usage_and_examples_and_shows_no_internals(command, capsys, monkeypatch):
    for columns in (60, 80, 120):
        text = help_of(capsys, monkeypatch, command, columns)
        assert text.startswith(f"usage: fedrouter {command} " + "[--preset NAME] " * (command in ("run", "plan")))
        assert not re.search(r"None|config[ .]|\(default: \)", text)
        examples = [line for line in text.splitlines() if line.startswith(f"  fedrouter {command} ")]
        assert examples == [f"  fedrouter {command} {example}" for example in commands.EXAMPLES[command]]
        prose = re.split(r"\n[╭+]", text)[0].splitlines()[1:]  # up to the first box
        assert len(examples) in (2, 3) and all(len(line) <= columns for line in prose if line not in examples)
        assert max(map(len, examples)) <= 80
        assert (" --preset NAME " in text) == (command in ("run", "plan"))


@pytest.mark.parametrize("command", commands.EXAMPLES)
def test_examples_can_be_typed(command):
    defaults = {"default": CLASSES[command](config=Config())} if command in ("run", "plan") else {}
    for example in [*commands.EXAMPLES[command], *re.findall(rf"fedrouter {command} (.*)", commands.USAGE)]:
        found = parse(CLASSES[command], prog="fedrouter", args=shlex.split(example), **defaults)
        if command in ("run", "plan") and "--preset" in example:
            assert found.preset in presets.PRESETS


def test_presets_are_named_one_a_line_with_a_phrase(capsys, monkeypatch):
    assert [*presets.ABOUT] == [*presets.PRESETS]
    lines = help_of(capsys, monkeypatch, "run").splitlines()
    assert any("flan4-... need --data FOLDER with train.jsonl and test.jsonl" in line for line in lines)
    for name, phrase in presets.ABOUT.items():
        assert any(re.fullmatch(f"  {re.escape(name)} +{re.escape(phrase)}", line) for line in lines)
    needing = [name for name, make in presets.PRESETS.items() if make().data.data != "synthetic"]
    assert needing == [name for name in presets.PRESETS if name.startswith("flan4-")]


def test_a_preset_is_the_default_of_what_is_not_given(tmp_path, capsys):
    """And the option that names it is one like the others, with = too."""
    for arguments in (["--preset", "smoke", "--rounds", "7"], ["--rounds", "7", "--preset=smoke"]):
        assert main(["plan", *arguments]) == 0
        assert "tiny (float32), rank 8 on q_proj v_proj, 7 rounds" in " ".join(capsys.readouterr().out.split())


def test_usage_and_version(capsys):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert main(arguments) == 0 and capsys.readouterr().out == commands.USAGE
    assert "--dtype bfloat16" in commands.USAGE
    with pytest.raises(SystemExit, match="0"):
        main(["help", "report"])
    assert capsys.readouterr().out.startswith("usage: fedrouter report ")
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"fedrouter {fedrouter_jax.__version__}\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fedrouter_jax.__version__"}
    assert f"\nversion: {fedrouter_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("option", ["--to", "--out"])
def test_a_report_goes_where_either_name_says(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", strategy="fedit")
    assert main(["report", str(run), option, "there"]) == 0
    assert Path("there/report.md").exists() and not (run / "report.md").exists()
