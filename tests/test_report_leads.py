"""Leads of one method over another in reports: differences by seed, of runs written by hand and the committed demo."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from documents import README, RESULTS, told
from scipy.stats import ttest_1samp
from written_runs import CONFIG, make_run, write_json

from experiments.methods import BOUNDS, METHODS
from fedrouter_jax import leads, records, report
from fedrouter_jax.config import ComputeConfig

SHIFTS = {"fedrouter": [0.05, 0.07, 0.03], "fedit": [0.0, 0.02, -0.05], "local": [0.01, 0.0, 0.0]}


def test_an_interval_is_students():
    values = [0.3, 0.4, 0.55]
    mean, half = leads.interval(values)
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose([mean - half, mean + half], [low, high])
    assert leads.interval([0.2]) == (0.2, 0.0)


def scored(path: Path, strategy: str, seed: int, own: float, mix: float, **changes) -> Path:
    """A run with such scores."""
    make_run(path, strategy=strategy, seed=seed, **changes)
    scores = json.loads((path / "scores.json").read_text())
    scores["personalised"]["rouge1"]["mean"], scores["generalisation"]["rouge1"]["mean"] = own, mix
    write_json(path / "scores.json", scores)
    return path


@pytest.fixture
def paths(tmp_path):
    """Three methods; the best on own tasks is named second, and one has two of the three seeds."""
    return [
        scored(tmp_path / f"{name}{seed}", name, seed, 0.5 + shift, 0.4 - shift)
        for name in ("fedit", "fedrouter", "local")
        for seed, shift in enumerate(SHIFTS[name])
        if (name, seed) != ("local", 0)
    ]


def table_of(paths):
    """The table of leads, if there is one."""
    found = report.tables(records.rows_of(records.read_all(paths)))
    assert found[0].title == "Scores"
    return found[1] if found[1].title == "Leads" else None


def test_leads_are_those_of_the_differences_by_seed(paths):
    table = table_of(paths)
    assert [cells[0] for cells in table.cells] == ["fedrouter over fedit", "fedrouter over local"]
    for cells, other, seeds in zip(table.cells, ("fedit", "local"), ([0, 1, 2], [1, 2]), strict=True):
        own = [SHIFTS["fedrouter"][seed] - SHIFTS[other][seed] for seed in seeds]
        expected = [records.ranges(seeds)]
        for values in (own, [-value for value in own]):
            low, high = ttest_1samp(values, 0).confidence_interval(0.95)
            expected += [f"{np.mean(values):+.3f} ± {(high - low) / 2:.3f}"]
            expected += [f"{sum(value > 0 for value in values)} of {len(seeds)}"]
        assert cells[1:] == expected
    assert "half of its 95 % interval" in table.note and "best on own tasks" in table.note and not table.bold


def test_only_what_shares_two_seeds_in_one_setting_is_compared(paths, tmp_path):
    assert table_of(paths[:3] + paths[6:7]) is None  # fedit alone, and one seed of another
    other = replace(CONFIG.data, scenario="single")
    single = [scored(tmp_path / f"single{seed}", "fedit", seed, 0.9, 0.9, data=other) for seed in range(3)]
    assert len(table_of(paths + single).cells) == 2  # not over the runs of another setting
    single += [scored(tmp_path / f"single-local{seed}", "local", seed, 0.95, 0.9, data=other) for seed in range(3)]
    table = table_of(paths + single)
    assert [cells[1] for cells in table.cells] == ["dual", "dual", "single"] and table.header[1] == "scenario"
    for change in ({"model": "other"}, {"dtype": "bfloat16"}, {"quantise": "nf4"}):
        apart = [scored(tmp_path / f"{change}{seed}", "fedit", seed, 0.9, 0.9, **change) for seed in range(3)]
        assert len(table_of(paths + apart).cells) == 2  # nor over those of other frozen weights
    best = [scored(tmp_path / f"oracle{seed}", "oracle", seed, 0.99, 0.99) for seed in range(3)]
    named = [cells[0] for cells in table_of(paths + best).cells]  # a reference leads nobody
    assert named == [f"fedrouter over {name}" for name in ("fedit", "local", "oracle")]
    (paths[5] / "scores.json").unlink()  # unfinished: it stands alone
    assert [cells[1] for cells in table_of(paths[:6]).cells] == ["0, 1"]


def test_a_method_on_seeds_of_its_own_neither_leads_nor_hides_others(paths, tmp_path):
    """However high it scores there: another with more seeds is the best of the seeds that both have."""
    lucky = [scored(tmp_path / f"ditto{seed}", "ditto", seed, 0.9, 0.9) for seed in (10, 11)]
    assert [cells[0] for cells in table_of(paths + lucky).cells] == ["fedrouter over fedit", "fedrouter over local"]
    shared = [scored(tmp_path / f"scaffold{seed}", "scaffold", seed, own, 0.5) for seed, own in ((1, 0.55), (2, 0.51))]
    low = scored(tmp_path / "low", "fedrouter", 3, 0.1, 0.1)  # without this seed it is the best still
    assert [cells[0].split()[0] for cells in table_of([*paths, *shared, low]).cells] == ["fedrouter"] * 3


def bold_of(paths, column="pers. ROUGE-1"):
    """The methods that are bold in a column of the scores."""
    table = report.tables(records.rows_of(records.read_all(paths)))[0]
    return [table.cells[i][0] for i, j in sorted(table.bold) if table.header[j] == column]


def test_what_changes_only_speed_sets_no_seeds_apart(paths, tmp_path):
    unrolled = ComputeConfig(unroll=True)
    more = [scored(tmp_path / f"u{seed}", "fedrouter", seed, 0.6, 0.4, compute=unrolled) for seed in (3, 4)]
    rows = [row for row in records.rows_of(records.read_all(paths + more)) if not row.base]
    assert [(row.label, len(row.runs)) for row in rows] == [("fedit", 3), ("fedrouter", 5), ("local", 2)]
    again = [scored(tmp_path / "again", "fedrouter", 0, 0.6, 0.4, compute=unrolled)]  # whose seconds are compared
    rows = [row for row in records.rows_of(records.read_all(paths[3:4] + again)) if not row.base]
    assert [row.label for row in rows] == ["fedrouter (unroll False)", "fedrouter (unroll True)"]
    # Neither those of another method, nor an unfinished one, part the seeds of a method.
    other = scored(tmp_path / "other", "fedit", 0, 0.6, 0.4, compute=unrolled)
    unfinished = scored(tmp_path / "unfinished", "fedrouter", 0, 0.6, 0.4)
    (unfinished / "scores.json").unlink()
    rows = [row for row in records.rows_of(records.read_all([*paths, *more, other, unfinished])) if not row.base]
    assert sorted(len(row.runs) for row in rows if row.runs[0].config.strategy == "fedrouter") == [1, 5]
    assert sorted(len(row.runs) for row in rows if row.runs[0].config.strategy == "fedit") == [1, 3]
    (costs,) = (table for table in report.tables(rows) if table.title == "Cost")
    assert "are of several compute settings" in costs.note


def test_bold_is_the_best_of_finished_runs_over_the_same_seeds(paths, tmp_path):
    """Of fedrouter and fedit the first is; not beside one of fewer seeds, and not for an unfinished run."""
    assert bold_of(paths[:6]) == ["fedrouter"]
    assert bold_of(paths) == []  # local has two seeds of three, and so the highest mean may be its seeds'
    unfinished = scored(tmp_path / "local7", "local", 7, 0.99, 0.99)
    (unfinished / "scores.json").unlink()
    assert bold_of([*paths[:6], unfinished]) == ["fedrouter"]
    told_more = [scored(tmp_path / f"o{seed}", "oracle", seed, 0.99, 0.99) for seed in range(3)]
    assert bold_of(paths[:6] + told_more) == ["fedrouter"]


def test_methods_after_other_numbers_of_steps_are_not_compared(paths, tmp_path):
    long = replace(CONFIG.local, steps=2 * CONFIG.local.steps)
    more = [scored(tmp_path / f"long{seed}", "ditto", seed, 0.9, 0.9, local=long) for seed in range(3)]
    wide = replace(CONFIG.local, batch=2 * CONFIG.local.batch)
    others = [scored(tmp_path / f"wide{seed}", "ditto", seed, 0.9, 0.9, local=wide) for seed in range(3)]
    once = replace(CONFIG.rounds, rounds=2)
    few = [scored(tmp_path / f"few{seed}", "ditto", seed, 0.9, 0.9, rounds=once, done=2) for seed in range(3)]
    for unequal in (more, others, few):
        table = table_of(paths + unequal)
        assert [cells[0].split(" (")[0] for cells in table.cells] == ["fedrouter"] * 2
    assert [name.split(" (")[0] for name in bold_of(paths[:6] + more)] == ["fedrouter", "ditto"]  # over the base, each
    once = [scored(tmp_path / f"once{seed}", "local", seed, own, 0.4, local=long) for seed, own in ((7, 0.8), (8, 0.7))]
    assert [name.split(" (")[0] for name in bold_of(paths[:6] + once)] == ["fedrouter"]  # whatever seeds the base has
    every = replace(CONFIG.rounds, clusters_per_round=0)  # twice the steps
    twice = [scored(tmp_path / f"every{seed}", "fedrouter", seed, 0.9, 0.9, rounds=every) for seed in range(3)]
    assert [name.split(" (")[0] for name in bold_of(paths[:6] + twice)] == ["fedrouter"] * 2


def test_a_cell_of_fewer_seeds_says_of_how_many(paths):
    """Of three seeds two hold a task; and a method without a loss in one is not the best by the others."""
    for path in (paths[0], paths[3]):
        scores = json.loads((path / "scores.json").read_text())
        del scores["personalised"]["rouge1"]["per_task"]["count"]
        if path == paths[0]:
            del scores["personalised"]["loss"]
        write_json(path / "scores.json", scores)
    found = {table.title: table for table in report.tables(records.rows_of(records.read_all(paths[:6])))}
    tasks, losses = found["ROUGE-1 of each task, personalised"], found["Loss of the reference answers, nats a token"]
    for table, cell in ((tasks, (1, 1)), (tasks, (2, 1)), (losses, (1, 1))):
        assert re.fullmatch(r"0\.\d{3} ± 0\.\d{3} \(2\)", table.cells[cell[0]][cell[1]])
        assert table.note == report.FEWER.strip() and not any(column == 1 for _, column in table.bold)
    assert report.FEWER not in found["Scores"].note


def test_who_leads_nobody_is_who_is_told_more():
    assert {METHODS[name][0] for name in BOUNDS} == {*leads.TOLD_MORE}


def test_a_lead_of_nothing_has_no_sign_of_less():
    assert leads.told([-1e-4, 0.0]).startswith("+0.000 ± ")


def test_the_leads_of_the_demo_are_those_that_readme_tells():
    (cells,) = table_of(sorted((RESULTS / "demo").glob("fed*"))).cells
    assert cells[0] == "fedrouter over fedit" and cells[1] == "0-4" and cells[3] == cells[5] == "5 of 5"
    own, mix = (cell.removeprefix("+").replace("0.", ".") for cell in (cells[2], cells[4]))
    assert f"ahead in each of five seeds on both, by {own} and {mix}" in re.sub(r"\s+", " ", README)
    assert told([0.1, 0.2, 0.3]) == ".200 ± .248"
