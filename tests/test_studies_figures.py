"""Figures of the studies show what the tables beside them say."""

import numpy as np
import pytest
from documents import RESULTS, first_table
from written_runs import make_summary

from experiments import studies, studies_figures, summaries

STUDIES = sorted(path.name for path in (RESULTS / "studies").iterdir() if path.is_dir())


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "unseen"])
def test_a_line_of_a_study_goes_through_the_means_of_its_table(name):
    """Methods stand side by side, under their names where there is one value; nothing joins single seeds or kinds."""
    rows = first_table(RESULTS / "studies" / f"{name}.md")
    drawn = studies.figure(name, summaries.load(RESULTS / "studies" / name))
    values, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("", "method"))
    kinds, alone = not values[0].replace(".", "").isdigit(), len(values) == 1
    counts = {int(row["seeds"]) for row in rows}
    for axes in drawn.axes:
        ticks = [label.get_text().replace("\n", "") for label in axes.get_xticklabels()]
        assert ticks == (methods if alone else values if kinds else sorted(values, key=float))
        lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        assert len({line.get_color() for line in lines.values()}) == len(lines)
        joined = max(counts) > 1 and not kinds and not alone
        assert {line.get_linestyle() for line in lines.values()} == {"-" if joined else "None"}
        everywhere = [place for line in lines.values() for place in line.get_xdata()]
        assert len({*everywhere}) == len(everywhere)
        for method, line in lines.items():
            said = {row[""]: row for row in rows if row["method"] == method and row[axes.get_title()]}
            if alone:
                assert list(line.get_xdata()) == [axes.get_xticks()[methods.index(method)]]
            places = values if alone else [ticks[round(place)] for place in line.get_xdata()]
            means = [said[value][axes.get_title()].split(" ± ")[0] for value in places]
            assert [f"{mean:.3f}" for mean in line.get_ydata()] == means and len(places) == len(said)
            for place, value, mean in zip(line.get_xdata(), places, line.get_ydata(), strict=True):
                seeds = int(said[value]["seeds"])
                dots = [other for other in axes.lines if other is not line and other.get_xdata()[0] == place]
                dots = [dot for dot in dots if dot not in lines.values()]
                assert len(dots) == (max(counts) > 1)
                for dot in dots:
                    assert len(dot.get_ydata()) == seeds and np.mean(dot.get_ydata()) == pytest.approx(mean)
                    assert (dot.get_markerfacecolor() == "white") == (seeds == 1)
                    assert dot.get_color() == line.get_color()
    said = drawn.get_suptitle()
    assert (said.startswith("one seed"), "hollow" in said) == (counts == {1}, 1 in counts != {1})
    assert bool(drawn.legends) != alone


def test_what_one_seed_is_said_to_differ_by_is_what_table_1s_seeds_do():
    """In Dual, of which the studies change one thing."""
    runs = summaries.load(RESULTS / "table1" / "runs")
    for part, spread in zip(("personalised", "generalisation"), studies_figures.SPREAD, strict=True):
        found = [summaries.score(runs[f"dual-fedrouter-{seed}"], part) for seed in range(5)]
        assert round(np.std(found, ddof=1), 2) == spread
    figures = {
        name: studies.figure(name, summaries.load(RESULTS / "studies" / name))
        for name in ("rounds", "unseen", "model", "rate")
    }
    assert "by about ±.03 on own tasks and ±.05 on the mix" in figures["rounds"].get_suptitle()
    assert figures["unseen"].get_suptitle() == "one seed"  # of one task of the mix
    assert "±" not in figures["model"].get_suptitle()
    assert figures["rate"].get_suptitle() == "one seed"  # of a larger model
    found = {"fedit-2-0": make_summary("fedit", 0, 0.5)}
    assert studies.figure("rounds", found).get_suptitle() == "one seed"  # of synthetic rows


def test_a_task_that_nobody_holds_is_drawn_beside_where_it_is_held_and_the_base_model():
    runs = summaries.load(RESULTS / "studies" / "unseen")
    tasks = ["gigaword", "glue_qqp", "samsum", "web_nlg_en"]
    (axes,) = studies.figure("unseen", runs).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == tasks
    lines = {line.get_label(): line for line in axes.lines}
    assert len(lines) == len(axes.lines) == 4
    for method in ("fedrouter+", "fedit"):
        for what, runs_of in (("no client holds the task", tasks), ("all tasks held", ["none"] * 4)):
            line = lines[f"{method}, {what}"]
            scores = [
                runs[f"{method}-{run}-0"]["scores"]["generalisation"]["rouge1"]["per_task"][task]
                for run, task in zip(runs_of, tasks, strict=True)
            ]
            assert list(line.get_ydata()) == scores and [round(x) for x in line.get_xdata()] == [0, 1, 2, 3]
            assert (line.get_markerfacecolor() == "white") == (what == "all tasks held")
            assert line.get_linestyle() == "None"
    base = [collection.get_segments()[0][0][1] for collection in axes.collections]
    per_task = [runs[f"fedit-{task}-0"]["scores"]["base_generalisation"]["rouge1"]["per_task"][task] for task in tasks]
    assert base == pytest.approx(per_task)
