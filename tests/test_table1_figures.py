"""Figures of Table 1: bars are what its table says, leads what its runs say."""

import itertools
import json
import re

import numpy as np
import pytest
from documents import RESULTS, first_table
from matplotlib.colors import to_rgb
from written_runs import make_summary

from experiments import summaries, table1, table1_figures
from experiments.methods import BOUNDS
from fedrouter_jax.leads import interval

TABLES = ["table1", "table1-long", "table1-full", "table1-rates"]


@pytest.mark.parametrize("name", TABLES)
def test_a_bar_is_a_mean_of_the_table_and_the_best_come_first(name):
    """Those with one seed last, hatched; the caption names what is drawn and nothing else."""
    rows = {row[""].split(" (")[0]: row for row in first_table(RESULTS / name / "table1.md")}
    drawn = table1_figures.scores(summaries.load(RESULTS / name / "runs"))
    assert sorted(axes.get_title() for axes in drawn.axes) == sorted([*rows["base model"]][1:])
    hatches, methods = set(), set()
    for axes in drawn.axes:
        column = axes.get_title()
        cells = {m: row[column] for m, row in rows.items() if "gain" not in m and row[column]}
        names = [label.get_text() for label in axes.get_yticklabels()]
        bars = dict(zip(names, axes.patches, strict=True))
        assert [bar.get_y() + bar.get_height() / 2 for bar in bars.values()] == pytest.approx(range(len(bars)))
        assert {method: f"{bar.get_width():.3f}" for method, bar in bars.items()} == {
            method: cell.split(" ± ")[0] for method, cell in cells.items()
        }
        order = [(" ± " not in cells[method], -bar.get_width()) for method, bar in bars.items()]
        assert order == sorted(order)
        for method, bar in bars.items():
            assert bool(bar.get_hatch()) == (" ± " not in cells[method])
            colour = bar.get_edgecolor() if bar.get_hatch() else bar.get_facecolor()
            assert (colour[:3] == to_rgb("0.8")) == (method in BOUNDS)
        for bar, dots in zip(axes.patches, axes.lines, strict=True):
            assert np.mean(dots.get_xdata()) == pytest.approx(bar.get_width())
        hatches |= {bool(bar.get_hatch()) for bar in bars.values()}
        methods |= {*names}
    setting, said = drawn.get_suptitle().split("\n")
    assert ("hatched" in said, "references" in said) == (True in hatches, bool(methods & {*BOUNDS}))
    clients, steps = {"table1-long": (4, 60), "table1-full": (8, 250)}.get(name, (4, 24))
    assert setting == f"smollm2-135m, {clients} clients, {steps} optimiser steps a client"


def test_scores_of_one_seed_have_no_hatch():
    """Though the base model has the seeds of both methods."""
    found = {f"dual-{m}-{seed}": make_summary(m, seed, 0.5) for seed, m in enumerate(("fedrouter+", "fedit"))}
    drawn = table1_figures.scores(found)
    assert not any(bar.get_hatch() for axes in drawn.axes for bar in axes.patches)
    assert drawn.get_suptitle().endswith("one seed")


PARTS = {"own tasks": "personalised", "the mix": "generalisation"}


@pytest.mark.parametrize("name", TABLES)
def test_leads_are_those_of_the_seeds_that_both_have(name):
    """Every baseline of several such seeds in every column, the closest first; from the runs themselves."""
    runs = summaries.load(RESULTS / name / "runs")
    drawn, counts = table1_figures.leads(runs), set()
    found = {axes.get_title(): axes for axes in drawn.axes}
    for title, scenario in itertools.product(PARTS, ("single", "dual", "all")):
        scores = {}
        for run, summary in runs.items():
            where, method, seed = re.fullmatch(r"(\w+)-(.+)-(\d+)", run).groups()
            if where == scenario:
                scores.setdefault(method, {})[seed] = summary["scores"][PARTS[title]]["rouge1"]["mean"]
        ours = scores.pop("fedrouter+", {})
        leads = {
            method: [ours[seed] - theirs[seed] for seed in {*theirs} & {*ours}]
            for method, theirs in scores.items()
            if not method.startswith("fedrouter") and method not in BOUNDS
        }
        leads = {method: values for method, values in leads.items() if len(values) > 1}
        axes = found.pop(f"{title}, {scenario}", None)
        assert (axes is not None) == bool(leads)
        if axes is None:
            continue
        counts |= {len(values) for values in leads.values()}
        methods = [label.get_text().split(" (")[0] for label in axes.get_yticklabels()]
        assert sorted(methods) == sorted(leads)
        assert methods == sorted(methods, key=lambda m, leads=leads: np.mean(leads[m])) and axes.yaxis_inverted()
        for method, label, bar, text in zip(methods, axes.get_yticklabels(), axes.containers, axes.texts, strict=True):
            mean, half = interval(leads[method])
            (((left, y), (right, _)),) = bar.lines[2][0].get_segments()
            assert (bar.lines[0].get_xdata()[0], left, right) == pytest.approx((mean, mean - half, mean + half))
            assert text.get_text() == f"{round(mean, 3) + 0.0:+.3f} ± {half:.3f}" and text.get_position()[1] == y
            if name == "table1":
                assert label.get_text() == f"{method} ({len(leads[method])})"
        assert sum(list(line.get_xdata()) == [0, 0] for line in axes.lines) == 1  # where nobody leads
    assert not found
    assert drawn.get_suptitle().endswith("seeds that both have" if len(counts) > 1 else f"{counts.pop()} seeds")


def test_leads_are_drawn_where_there_are_seeds_to_pair(tmp_path):
    for seeds, there in ((1, False), (2, True)):
        (tmp_path / "runs").mkdir(exist_ok=True)
        for method, seed in itertools.product(("fedrouter+", "fedit"), range(seeds)):
            summary = make_summary(method.removesuffix("+"), seed, 0.5)
            (tmp_path / "runs" / f"dual-{method}-{seed}.json").write_text(json.dumps(summary), encoding="utf-8")
        table1.draw(tmp_path)
        assert (tmp_path / "leads.png").exists() == there
        assert ("](leads.png)" in (tmp_path / "table1.md").read_text(encoding="utf-8")) == there
