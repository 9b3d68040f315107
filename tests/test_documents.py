"""README and docs/results.md say of scores and clusters what the committed JSON says; the tables are made from it."""

import json
import re

import numpy as np
import pytest
from documents import README, RESULTS, SAID

from experiments import clustering_figures, learning_rates, studies, summaries, table1_tables
from experiments.methods import HEADLINE, LABELS
from fedrouter_jax import records, report


def test_the_numbers_of_the_demo_are_those_of_the_committed_runs():
    """README and docs/results.md, against docs/results/demo."""
    rows = records.rows_of(records.read_all(sorted((RESULTS / "demo").glob("fed*"))))
    assert [len(row.runs) for row in rows] == [5, 5, 5]
    for row in rows:
        for part in (0, 1):
            found = records.scores(row, part, "rouge1", "mean")
            mean, deviation = f"{np.mean(found):.3f}", f"{np.std(found, ddof=1):.3f}"
            assert f"{mean} ± {deviation}" in README
            if not row.base:
                assert f"{mean[1:]} ± {deviation[1:]}" in SAID
                assert " | ".join(f"{value:.3f}"[1:] for value in found) in SAID


def test_older_runs_that_the_docs_name_can_still_be_reported():
    """docs/results.md: `fedrouter report docs/results/flan4-dual-cpu/*`; they were scored before exact match was."""
    runs = records.read_all(sorted((RESULTS / "flan4-dual-cpu").iterdir()))
    assert [run.config.strategy for run in runs] == ["fedit", "fedrouter"]
    (scores, *_) = report.tables(records.rows_of(runs))
    column = scores.header.index("pers. ROUGE-1")
    assert [cells[column] for cells in scores.cells] == ["0.138", "0.359", "0.434"]


def test_the_differences_on_real_rows_are_those_of_the_committed_scores():
    """docs/results.md: mean and standard error of FedRouter's rows less FedIT's; a row of the mix counts once."""
    folder = RESULTS / "flan4-dual-cpu"
    fedit, ours = (json.loads((folder / name / "row_scores.json").read_text()) for name in ("fedit", "fedrouter"))
    for part, count, said in (("personalised", 128, "error .{:03d}, 128"), ("generalisation", 48, "(.{:03d}, 48")):
        assert [row[:2] for row in fedit[part]] == [row[:2] for row in ours[part]]
        found = {}
        for (_, row, theirs), (_, _, score) in zip(fedit[part], ours[part], strict=True):
            found.setdefault(row, score - theirs)
        differences = list(found.values())
        assert len(differences) == count
        error = np.std(differences, ddof=1) / np.sqrt(count)
        assert f".{round(1000 * np.mean(differences)):03d}" in SAID
        assert said.format(round(1000 * error)) in SAID


def test_what_other_questions_would_do_is_what_the_rows_of_a_run_say():
    """One standard error of a lead on own tasks with 800 questions, 600 of them answered in words."""
    folder = RESULTS / "flan4-dual-cpu"
    fedit, ours = (json.loads((folder / name / "row_scores.json").read_text()) for name in ("fedit", "fedrouter"))
    pairs = [(a[2], b[2]) for a, b in zip(fedit["personalised"], ours["personalised"], strict=True)]
    in_words = [pair for pair in pairs if not {*pair} <= {0.0, 1.0}]  # nearly: both may be wholly wrong in words, too
    errors = [np.std(np.subtract(*zip(*of, strict=True)), ddof=1) for of in (pairs, in_words)]
    assert f"a standard deviation of {errors[0]:.2f}".replace("0.", ".") in SAID
    told = [f"{error / np.sqrt(count):.3f}"[1:] for error, count in zip(errors, (800, 600), strict=True)]
    assert "by up to {} (one standard error; {} without QQP)".format(*told) in " ".join(README.split())


SETS = ("flan4", "flan8", "all ten")


def wanted(record: dict, tasks: str, recipe: str = "refined") -> bool:
    """Whether a record of a clustering is of these tasks and this recipe, with all rows."""
    return (record["set"], record["recipe"], record["few"]) == (tasks, recipe, None)


@pytest.mark.parametrize("name", ["clustering", "clustering-qwen2.5-coder-0.5b"])
def test_the_clusters_are_those_of_the_committed_json(name):
    found = json.loads((RESULTS / name / "clustering.json").read_text(encoding="utf-8"))
    assert clustering_figures.table(found) == (RESULTS / name / "clustering.md").read_text(encoding="utf-8")
    for recipe in ("paper", "refined"):
        cells, ks = [], []
        for tasks in SETS:
            same = [r for r in found["records"] if wanted(r, tasks, recipe)]
            cells.append(clustering_figures.spread([100 * r["global"] for r in same]))
            ks.append(", ".join(str(r["found_global"]) for r in same))
        assert f"`{recipe}`: accuracy, n_g given | {' | '.join(cells)} |" in SAID
        assert f"`{recipe}`: n_g found, seed by seed | {' | '.join(ks)} |" in SAID
        if recipe == "paper" and name == "clustering":
            shares = " | ".join(f"{cell.split()[0]} %" for cell in cells)
            assert f"| `paper`, told how many: rows in the cluster of their task | {shares} |" in README
            assert "| `paper`: tasks found | 4 in three seeds of five | 2 or 3 | 4 |" in README
            assert [sorted(set(cell.split(", "))) for cell in ks] == [["4", "5", "6"], ["2", "3"], ["4"]]
    both = [[100 * r["found_accuracy"] for r in found["records"] if wanted(r, tasks)] for tasks in SETS]
    assert f"`refined`: accuracy with both found | {' | '.join(map(clustering_figures.spread, both))} |" in SAID
    shares = [f"{np.mean(found):.1f}" for found in both]
    if name == "clustering":
        cells = " | ".join(f"{k} in every seed, {share} %" for k, share in zip((4, 8, 10), shares, strict=True))
        assert f"tasks found, rows in the cluster of their task | {cells} |" in README
        assert f"with {shares[2]} to {shares[1]} % of the rows in the right cluster" in README
    else:
        assert "with {}, {} and {} per cent of the rows".format(*shares) in README


@pytest.mark.parametrize("name", ["table1", "table1-long", "table1-full", "table1-rates"])
def test_a_table_of_methods_is_that_of_the_committed_runs(name):
    found, tried = (summaries.load(RESULTS / name / part) for part in ("runs", "rates"))
    drawn = table1_tables.markdown(found, learning_rates.markdown(tried, found))
    assert drawn == (RESULTS / name / "table1.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(path.name for path in (RESULTS / "studies").iterdir() if path.is_dir()))
def test_a_study_is_that_of_the_committed_runs(name):
    drawn = studies.markdown(name, summaries.load(RESULTS / "studies" / name))
    assert drawn == (RESULTS / "studies" / f"{name}.md").read_text(encoding="utf-8")


def test_the_headline_tables_and_gains_are_those_of_the_runs():
    runs = summaries.load(RESULTS / "table1" / "runs")
    full = table1_tables.scores(table1_tables.cells(summaries.load(RESULTS / "table1-full" / "runs")), HEADLINE)
    assert "\n".join(line for line in full if "gain over" not in line) in README
    headline = table1_tables.scores(table1_tables.cells(runs), HEADLINE)
    assert "\n".join(headline) in SAID
    gains = next(line for line in headline if line.startswith("| **fedrouter+, gain")).split("|")[2:-1]
    for column in (1, 2, 4, 5):  # dual and all
        assert re.sub(r" over \w+ \(\+0(.*) ± 0(.*); .*\)", r" (\1 ± \2)", gains[column].strip()) in SAID


@pytest.mark.parametrize(
    ("scenario", "method", "named"),
    [
        ("dual", "fedrouter+", "two tasks a client, `fedrouter+`"),
        ("dual", "fedrouter", "two tasks, plain `fedrouter`"),
        ("single", "fedrouter+", "one task, where the two are the same"),
    ],
)
def test_the_gains_in_short_are_those_of_the_papers_budget(scenario, method, named):
    found = summaries.load(RESULTS / "table1-full" / "runs")
    row = [named]
    for without in ((), LABELS):
        table = table1_tables.cells(found, without)
        for part in ("personalised", "generalisation"):
            gain = table1_tables.gain(table, (scenario, part), method, max)
            percent, lead = re.fullmatch(r"(\S+) % over \S+ \((\S+ ± \S+); 5 seeds\)", gain).groups()
            row.append(f"{percent} % ({lead.removeprefix('+').replace('0.', '.')})")
            best = table1_tables.best_baseline(table, (scenario, part), method, max)
            second = (scenario, part, without) == ("dual", "generalisation", ())  # README: but FedDPA-T there
            assert best == ("feddpa-t" if second else "clustered" if part == "personalised" else "fedit")
    assert f"| {' | '.join(row)} |" in README


@pytest.mark.parametrize(
    ("scenario", "methods", "gains"),
    [
        ("dual", "feddpa-t fedit local fedsa clustered fedrouter fedrouter+ oracle", "fedrouter+ fedrouter"),
        ("single", "fedit local fedsa clustered fedrouter+", "fedrouter+"),
    ],
)
def test_the_tables_of_the_papers_budget_are_those_of_the_runs(scenario, methods, gains):
    """docs/results.md: scores with and without QQP, and gains over the best baseline."""
    runs = summaries.load(RESULTS / "table1-full" / "runs")
    tables = [table1_tables.cells(runs, without) for without in ((), LABELS)]
    columns = [(table, part) for table in tables for part in ("personalised", "generalisation")]

    shown = [re.sub("[*`]", "", line).split(" | ") for line in SAID.splitlines()]

    def short(text):
        return re.sub(r"\b0\.", ".", text.removeprefix("+"))

    for method in [table1_tables.UNTRAINED, *methods.split()]:
        scores = [[table[scenario, part, method][seed] for seed in range(5)] for table, part in columns]
        cells = [short(table1_tables.text(values, False)) for values in scores]
        assert any(
            line[0].startswith(f"| {method}") and " | ".join(line[1:]) == " | ".join(cells) + " |" for line in shown
        )
    for ours in gains.split():
        wanted = []
        for table, part in columns:
            gain = table1_tables.gain(table, (scenario, part), ours, max)
            percent, over, lead = re.fullmatch(r"(\S+) % over (\S+) \((\S+ ± \S+); 5 seeds\)", gain).groups()
            percent = percent[0] + short(percent[1:])
            wanted.append(re.escape(percent) + f" %( over {over})? " + re.escape(f"({short(lead)})"))
        pattern = re.compile(r"\| [^|]* \| " + r" \| ".join(wanted) + r" \|", re.IGNORECASE)
        assert any(pattern.fullmatch(" | ".join(line)) for line in shown)


@pytest.mark.parametrize("scenario", ["single", "dual"])
@pytest.mark.parametrize("seed", range(5))
def test_clustered_found_the_clients_of_equal_tasks_at_the_papers_budget(scenario, seed):
    """Clients of a group have one adapter, so the same scores on the mix; these of eight hold the same tasks."""
    run = summaries.read(RESULTS / "table1-full" / "runs" / f"{scenario}-clustered-{seed}.json")
    own, mix = (run["scores"][part]["rouge1"]["per_client"] for part in ("personalised", "generalisation"))
    groups = {score: {client for client in mix if mix[client] == score} for score in mix.values()}
    assert len(own) == 8 and sorted(map(sorted, groups.values())) == [["0", "4"], ["1", "5"], ["2", "6"], ["3", "7"]]
