"""What README and docs/results.md say of the runs at the paper's budget is what these say."""

import numpy as np
import pytest
from documents import README, RESULTS, SAID, told

from experiments import studies, summaries, table1_tables


@pytest.fixture(scope="module")
def full():
    """The runs at the paper's budget."""
    return summaries.load(RESULTS / "table1-full" / "runs")


def test_the_losses_that_readme_tells_are_those_of_the_runs(full):
    table, least = table1_tables.cells(full, metric="loss"), []
    for ours in ("fedrouter+", "fedrouter"):
        for part in ("personalised", "generalisation"):
            column = ("dual", part)
            assert table1_tables.best_baseline(table, column, ours, min) == "fedit"
            leads = table1_tables.lead(table, column, ours, "fedit")
            least.append(f"{-100 * np.mean(leads) / np.mean([*table[*column, 'fedit'].values()]):.1f}")
    plus_own, plus_mix, own, mix = least
    assert plus_own == plus_mix and f"`fedrouter+` has {plus_own} % less on own tasks and on the mix" in README
    assert f"plain `fedrouter` {own} and {mix}. So" in " ".join(README.split())
    dearer = (
        told(np.array(table1_tables.lead(table, ("dual", part), "fedrouter+", "fedrouter")))
        for part in ("personalised", "generalisation")
    )
    assert "on own tasks they may raise it ({}; on the mix {}, level)".format(*dearer) in " ".join(README.split())
    assert f"and {plus_own} % less loss on both" in README


def test_what_is_said_of_qqp_is_what_the_runs_say(full):
    """Right and sure are two things."""

    def of_qqp(method, metric):
        scores = [full[f"dual-{method}-{seed}"]["scores"]["personalised"][metric] for seed in range(5)]
        return np.mean([score["per_task"]["glue_qqp"] for score in scores])

    methods = ("fedrouter+", "fedit", "clustered")
    right = "({:.0f} % of the questions of own tasks for {:.0f} and {:.0f})"
    assert right.format(*(100 * of_qqp(method, "exact") for method in methods)) in " ".join(README.split())
    losses = (f"{of_qqp(method, 'loss'):.3f}"[1:] for method in methods)
    assert "with more loss ({} for {} and {})".format(*losses) in " ".join(README.split())


@pytest.mark.parametrize("part, method", [("own tasks", "clustered"), ("the mix", "fedit"), ("the mix", "feddpa-t")])
def test_the_leads_by_task_are_those_of_the_runs(part, method, full):
    cells = [f"| {part}, over `{method}`"]
    for task in ("gigaword", "samsum", "web_nlg_en", "glue_qqp"):
        where = "personalised" if part == "own tasks" else "generalisation"
        scores = (
            [studies.by_task(full[f"dual-{name}-{seed}"], where)[task] for seed in range(5)]
            for name in ("fedrouter+", method)
        )
        cells.append(told(np.subtract(*scores)))
    assert f"{' | '.join(cells)} |" in SAID
