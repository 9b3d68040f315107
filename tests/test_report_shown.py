"""How a report stands on a terminal, and what is said beside its tables."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console
from written_runs import CONFIG, change_json, make_run, scores_of, write_json

from fedrouter_jax import records, report


def test_settings_are_told_once_and_what_differs_by_method(tmp_path):
    paths = [make_run(tmp_path / s, strategy=s) for s in ("fedrouter", "fedit", "local")]
    common, differs = report.setups(records.rows_of(records.read_all(paths)))
    assert common.startswith("Common: model tiny (float32); synthetic data; 4 clients, dual")
    assert "LoRA rank 8" in common and "weighted" not in common
    assert differs.startswith("Differs: fedrouter: averages weighted by cluster; 3 clusters, recipe refined; ")
    assert "global (generalisation). fedit: averages weighted by cluster. local: no weighted averages." in differs
    assert "LoRA" not in differs and "of the clients a round" not in common
    half = make_run(tmp_path / "half", rounds=replace(CONFIG.rounds, participation=0.5))
    assert "50% of the clients a round" in report.setups(records.rows_of(records.read_all([half])))[0]
    same = [
        make_run(tmp_path / f"local-{rank}", strategy="local", lora=replace(CONFIG.lora, rank=rank)) for rank in (2, 4)
    ]
    _, differs = report.setups(records.rows_of(records.read_all(same)))
    assert "local (rank 2): LoRA rank 2, alpha 16" in differs and "local (rank 4): LoRA rank 4" in differs


def test_what_plus_and_minus_and_bold_mean_is_below_the_first_table(tmp_path):
    paths = [
        make_run(tmp_path / f"{s}{seed}", strategy=s, seed=seed) for s in ("fedrouter", "fedit") for seed in (0, 1)
    ]
    scores, _, _, costs, *others = report.tables(records.rows_of(records.read_all(paths)))
    assert "standard deviation (n - 1)" in scores.note and "Bold: the best mean" in scores.note
    assert costs.title == "Cost" and costs.note.startswith("Sent: all clients and rounds") and "means" in costs.note
    console = Console(file=io.StringIO(), width=200)
    report.show(paths, console)
    shown = console.file.getvalue()
    report.write(paths, tmp_path / "to")
    written = (tmp_path / "to" / "report.md").read_text(encoding="utf-8")
    for text in (shown, written):
        assert text.index("standard deviation (n") < text.index("Leads") < text.index("Loss of the reference")
    (alone, *_) = report.tables(records.rows_of(records.read_all(paths[:1])))
    assert "±" not in alone.note


def test_seconds_that_are_left_out_say_why(tmp_path):
    paths = [make_run(tmp_path / s, strategy=s) for s in ("fedrouter", "fedit", "local")]
    change_json(paths[0] / "timings.json", taken_over=["embeddings"])
    timings = json.loads((paths[1] / "timings.json").read_text())
    del timings["total"]
    write_json(paths[1] / "timings.json", timings)
    [costs] = [t for t in report.tables(records.rows_of(records.read_all(paths))) if t.title == "Cost"]
    assert costs.note.endswith(
        "Seconds total leave out runs that took embeddings or base answers over from another run (fedrouter). "
        "Seconds total leave out runs that were resumed (fedit)."
    )


def test_seeds_in_a_row_are_a_range():
    for seeds, said in (([3], "3"), ([0, 1], "0, 1"), ([0, 1, 2], "0-2"), ([0, 2, 3, 4, 5, 9], "0, 2-5, 9")):
        assert records.ranges(seeds) == said


@pytest.mark.parametrize("turns", ["own", "staggered"])
def test_scores_of_five_seeds_are_not_wrapped_at_80_columns(turns, tmp_path):
    rounds = replace(CONFIG.rounds, turns=turns)
    paths = [make_run(tmp_path / f"fedit{seed}", strategy="fedit", seed=seed) for seed in range(5)]
    paths += [make_run(tmp_path / f"ours{seed}", rounds=rounds, seed=seed) for seed in range(5)]
    for path in paths:  # without newcomers
        write_json(path / "scores.json", {k: v for k, v in scores_of(path).items() if "newcomers" not in k})
    console = Console(file=io.StringIO(), width=80)
    report.show(paths, console)
    shown = console.file.getvalue().split("pers.: personalised")[0]
    (table, *_) = report.tables(records.rows_of(records.read_all(paths)))
    for cells in table.cells:
        (line,) = [line for line in shown.splitlines() if cells[2] in line]
        assert all(cell in line for cell in cells[1:]) and cells[1] == "0-4"
        assert turns == "staggered" or line.startswith(cells[0])


def test_long_names_of_tasks_take_no_digit_and_no_method_away(tmp_path):
    """And what would move the cursor is told, not done."""
    paths = [make_run(tmp_path / name, strategy=name) for name in ("fedit", "local")]
    names = ["definite_pronoun_resolution", "web_nlg_en and others", "a\x1b[2Jb", "x", "y", "z", "u", "v"]
    for path in paths:
        scores = scores_of(path)
        for part in scores.values():
            some = part["rouge1"]["per_task"]
            part["rouge1"]["per_task"] = {name: [*some.values()][n % 3] for n, name in enumerate(names)}
        write_json(path / "scores.json", scores)
    console = Console(file=io.StringIO(), width=80)
    report.show(paths, console)
    shown = console.file.getvalue()
    assert "\x1b" not in shown and "\\x1b" in shown
    *_, table = report.tables(records.rows_of(records.read_all(paths)))
    last = shown.rpartition("ROUGE-1 of each task")[2]
    for method, *cells in table.cells:
        assert method.split()[0] in last and all(last.count(cell) for cell in cells)


def test_terminal_shows_the_tables(tmp_path):
    path = make_run(tmp_path / "one")
    console = Console(file=io.StringIO(), width=80)
    report.show([path], console)
    text = console.file.getvalue()
    assert "…" not in text and "generalisation" in text
    assert f"{scores_of(path)['personalised']['rouge1']['mean']:.3f}" in text
    assert "121.0 kB" in text and "sort|odd" in text and "synthetic data" in text


def test_a_report_asks_for_no_accelerator(tmp_path):
    """Which a run may hold, and one process alone can."""
    run = make_run(tmp_path / "run")
    command = [sys.executable, "-m", "fedrouter_jax", "report", str(run), "--to", str(tmp_path / "report")]
    done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cuda"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report" / "plots" / "embedding.png").exists()
