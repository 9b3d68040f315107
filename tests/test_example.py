"""The README's example is a file that runs."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_readme_shows_the_example_and_it_runs(capsys):
    text = (ROOT / "experiments" / "example.py").read_text()
    assert text.split('"""\n\n', 1)[1] in (ROOT / "README.md").read_text()
    runpy.run_path(str(ROOT / "experiments" / "example.py"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("round 1: loss ") and lines[-1].startswith("adapter ")
