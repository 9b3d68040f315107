"""README and docs/results.md say of scores and clusters what the committed JSON says; the tables are made from it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import clustering_figures, studies, summaries, table1_tables
from experiments.methods import HEADLINE, LABELS
from fedrouter_jax import records, report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
README, SAID = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md"))


@pytest.fixture(scope="module")
def runs():
    """The runs of Table 1 at the reduced budget."""
    return summaries.load(RESULTS / "table1" / "runs")


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
    assert [cells[3] for cells in scores.cells] == ["0.138", "0.359", "0.434"]


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
    both = [[100 * r["found_accuracy"] for r in found["records"] if wanted(r, tasks)] for tasks in SETS]
    assert f"`refined`: accuracy with both found | {' | '.join(map(clustering_figures.spread, both))} |" in SAID


@pytest.mark.parametrize("name", ["table1", "table1-long", "table1-full"])
def test_a_table_of_methods_is_that_of_the_committed_runs(name):
    drawn = table1_tables.markdown(summaries.load(RESULTS / name / "runs"))
    assert drawn == (RESULTS / name / "table1.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(path.name for path in (RESULTS / "studies").iterdir() if path.is_dir()))
def test_a_study_is_that_of_the_committed_runs(name):
    drawn = studies.markdown(name, summaries.load(RESULTS / "studies" / name))
    assert drawn == (RESULTS / "studies" / f"{name}.md").read_text(encoding="utf-8")


def test_the_headline_tables_and_gains_are_those_of_the_runs(runs):
    full = table1_tables.scores(table1_tables.cells(summaries.load(RESULTS / "table1-full" / "runs")), HEADLINE)
    assert "\n".join(full) in README
    headline = table1_tables.scores(table1_tables.cells(runs), HEADLINE)
    assert "\n".join(headline) in SAID
    gains = next(line for line in headline if line.startswith("| **fedrouter+, gain")).split("|")[2:-1]
    for column in (1, 2, 4, 5):  # dual and all
        gain = gains[column].strip()
        assert re.sub(r" over \w+ \(\+0(.*) ± 0(.*); .*\)", r" (\1 ± \2)", gain) in SAID and gain.split()[0] in README


@pytest.mark.parametrize(
    ("scenario", "method", "named"),
    [
        ("dual", "fedrouter+", "two tasks a client, `fedrouter+`"),
        ("dual", "fedrouter", "two tasks, plain `fedrouter`"),
        ("single", "fedrouter+", "one task, where the two are the same"),
    ],
)
def test_the_gains_in_short_are_those_of_the_papers_budget(scenario, method, named):
    """Level where the interval of the lead holds zero."""
    found = summaries.load(RESULTS / "table1-full" / "runs")
    row = [named]
    for without in ((), LABELS):
        table = table1_tables.cells(found, without)
        for part in ("personalised", "generalisation"):
            gain = table1_tables.gain(table, (scenario, part), method, max)
            percent, mean, half = re.fullmatch(r"(\S+) % over \S+ \((\S+) ± (\S+); 5 seeds\)", gain).groups()
            row.append(f"{percent} %" if float(mean) > float(half) else "level")
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


@pytest.mark.parametrize(
    ("method", "seeds"),
    [
        ("clustered", 20),
        ("fedlease", 20),
        ("feddpa-t", 5),
        ("feddpa-f", 5),
        ("fedex", 5),
        ("ifca", 5),
        ("flora", 5),
        ("ffalora", 10),
        ("rolora", 5),
        ("fedalt", 5),
        ("fedprox", 5),
        ("scaffold", 5),
        ("ditto", 5),
        ("fedavgm", 5),
        ("fedadagrad", 5),
        ("fedadam", 5),
        ("fedyogi", 5),
    ],
)
def test_the_leads_in_dual_are_those_of_the_runs(method, seeds, runs):
    assert leads_in("dual", method, seeds, table1_tables.cells(runs)) in SAID


@pytest.mark.parametrize("method", ["fedlease", "ffalora", "fedex"])
def test_the_leads_in_all_are_those_of_the_runs(method, runs):
    assert leads_in("all", method, 5, table1_tables.cells(runs)) in SAID


@pytest.mark.parametrize("method", ["ffalora", "fedex"])
def test_the_leads_in_single_are_those_of_the_runs(method, runs):
    assert leads_in("single", method, 5, table1_tables.cells(runs)) in SAID


def leads_in(scenario: str, method: str, seeds: int, found: table1_tables.Cells) -> str:
    """A line of a table of leads: a method's scores and how far `fedrouter+` is ahead."""
    cells = [f"| `{method}`"]
    for part in ("personalised", "generalisation"):
        ours, theirs = (found[scenario, part, name] for name in ("fedrouter+", method))
        leads = [ours[seed] - theirs[seed] for seed in range(seeds)]
        scored, lead = (
            " ± ".join(f"{value:.3f}"[1:] for value in summaries.interval(values))
            for values in ([theirs[seed] for seed in range(seeds)], leads)
        )
        percent = 100 * np.mean(leads) / np.mean([theirs[seed] for seed in range(seeds)])
        share = f" ({percent:.1f} %)" if part == "personalised" else ""
        cells += [scored, f"{lead}{share}, in {sum(lead > 0 for lead in leads)} of {seeds}"]
    return " | ".join(cells) + " |"


def told(values) -> str:
    """A mean and half of its interval."""
    return " ± ".join(f"{value:.3f}".replace("0.", ".") for value in summaries.interval(values))


def test_what_is_said_of_the_middle_models_rate_is_what_its_runs_say():
    found = summaries.load(RESULTS / "studies" / "rate-0.5b")

    def scores(method, rate, seeds, part, metric="rouge1"):
        return [summaries.score(found[f"{method}-{rate}-{seed}"], part, metric) for seed in range(seeds)]

    parts = ("personalised", "generalisation")
    for method, name in (("fedrouter+", "FedRouter+"), ("fedit", "FedIT")):
        low, high = (
            " / ".join(told(scores(method, rate, seeds, part)) for part in parts)
            for rate, seeds in (("0.001", 5), ("0.005", 3))
        )
        assert f"{name} {low} for {high}" in SAID
    leads, losses = (
        [np.subtract(*(scores(m, "0.001", 5, part, metric) for m in ("fedrouter+", "fedit"))) for part in parts]
        for metric in ("rouge1", "loss")
    )
    assert f"ahead by {told(leads[0])} / {told(leads[1])}, in three and five of five seeds" in SAID
    assert [sum(lead > 0) for lead in leads] == [3, 5] and all((loss < 0).all() for loss in losses)
    assert f"per cent less ({told(-losses[0])}, {told(-losses[1])}), in five of five each" in SAID


def test_what_is_said_of_eight_tasks_is_what_their_runs_say():
    found = summaries.load(RESULTS / "studies" / "eight-tasks")
    parts, methods = ("personalised", "generalisation"), ("fedrouter+", "fedit", "clustered")

    def short(value, digits=3):
        return f"{value:.{digits}f}".removeprefix("0")

    means = {}
    for part in parts:
        values = {m: [summaries.score(found[f"{m}-8-{seed}"], part) for seed in (0, 1)] for m in methods}
        own = part == "personalised"
        names = ("FedRouter+ {} on own tasks", "FedIT {}", "Clustered {}") if own else ("{}",) * 3
        pairs = [" and ".join(map(short, values[m])) for m in methods]
        assert ", ".join(name.format(pair) for name, pair in zip(names, pairs, strict=True)) in SAID
        shown = [short(np.mean(values[m])) for m in methods]
        scored = "`fedrouter+` scores {}, FedIT {}, Clustered {}" if own else "on the mix {}, {} and {}"
        assert scored.format(*shown) in SAID
        for m in methods:
            means[m, part] = np.mean([summaries.score(found[f"{m}-8-{seed}"], part, "loss") for seed in (0, 1)])
    told = (f"{' / '.join(short(means[m, part]) for part in parts)}" for m in methods)
    assert "{}, FedIT {}, Clustered {}, so".format(*told) in SAID
    less = [100 * (1 - means["fedrouter+", part] / means["fedit", part]) for part in parts]
    assert "{:.1f} and {:.1f} per cent less than FedIT's".format(*less) in SAID
    assert all(f"{value:.1f} per cent less" in README for value in less)


@pytest.mark.parametrize(("study", "value"), [("rate-0.5b", "0.001"), ("eight-clients", "8")])
@pytest.mark.parametrize(("method", "name"), [("fedit", "FedIT"), ("clustered", "Clustered"), ("fedlease", "FedLEASE")])
def test_the_leads_in_studies_of_five_seeds_are_those_of_their_runs(study, value, method, name):
    """With the middle model, and with eight clients."""
    found = summaries.load(RESULTS / "studies" / study)

    def values(method, part, metric):
        return np.array([summaries.score(found[f"{method}-{value}-{seed}"], part, metric) for seed in range(5)])

    cells, short = [f"| `{method}`"], [f"| {name}"]
    for part in ("personalised", "generalisation"):
        theirs, loss = values(method, part, "rouge1"), values(method, part, "loss")
        lead, less = values("fedrouter+", part, "rouge1") - theirs, loss - values("fedrouter+", part, "loss")
        percent = f"{100 * less.mean() / loss.mean():.1f} %"
        cells += [told(theirs), f"{told(lead)}, in {(lead > 0).sum()} of 5"]
        cells += [f"{percent} ({told(less)}), in {(less > 0).sum()} of 5"]
        short += [f"{told(lead)}, {percent}"]
    assert " | ".join(cells) + " |" in SAID and " | ".join(short) + " |" in README


@pytest.mark.parametrize("scenario", ["single", "dual"])
@pytest.mark.parametrize("seed", range(5))
def test_clustered_found_the_clients_of_equal_tasks_at_the_papers_budget(scenario, seed):
    """Clients of a group have one adapter, so the same scores on the mix; these of eight hold the same tasks."""
    run = summaries.read(RESULTS / "table1-full" / "runs" / f"{scenario}-clustered-{seed}.json")
    own, mix = (run["scores"][part]["rouge1"]["per_client"] for part in ("personalised", "generalisation"))
    groups = {score: {client for client in mix if mix[client] == score} for score in mix.values()}
    assert len(own) == 8 and sorted(map(sorted, groups.values())) == [["0", "4"], ["1", "5"], ["2", "6"], ["3", "7"]]


def test_what_is_said_of_rates_with_eight_clients_is_what_their_runs_say():
    found = summaries.load(RESULTS / "studies" / "rate-eight-clients")
    readme, results = (" ".join(text.split()) for text in (README, SAID))
    best = {"fedrouter+": "0.01", "fedit": "0.02", "clustered": "0.01", "fedlease": "0.01"}
    rates, parts = ("0.0025", "0.005", "0.01", "0.02"), ("personalised", "generalisation")

    def values(method, rate, part, metric="rouge1", seeds=(0, 1)):
        return np.array([summaries.score(found[f"{method}-{rate}-{seed}"], part, metric) for seed in seeds])

    def short(value):
        return f"{value:.3f}".removeprefix("0")

    for method, chosen in best.items():
        cells = []
        for rate in rates:
            scores = [short(values(method, rate, part).mean()) for part in parts]
            losses = [short(values(method, rate, part, "loss").mean()) for part in parts]
            cells.append(f"{' / '.join(scores)}, {' / '.join(losses)}")
        assert f"| `{method}` | {' | '.join(cells)} |" in results
        assert min(rates, key=lambda rate, m=method: values(m, rate, parts[0], "loss").mean()) == chosen
    fresh = []
    for method, rate, named in (
        ("fedrouter+", "0.01", "`fedrouter+`"),
        ("fedit", "0.02", "FedIT"),
        ("clustered", "0.01", "Clustered"),
        ("fedlease", "0.01", "FedLEASE, by its loss"),
        ("fedlease", "0.02", "FedLEASE, by its score"),
    ):
        written = f"{float(rate):.0e}".replace("e-0", "e-")
        cells, brief = [f"| `{method}` | {written}"], [f"| {named} | {written}"]
        for part in parts:
            theirs, loss = (values(method, rate, part, metric, range(5)) for metric in ("rouge1", "loss"))
            lead = values("fedrouter+", "0.01", part, seeds=range(5)) - theirs
            less = loss - values("fedrouter+", "0.01", part, "loss", range(5))
            percent = f" ({100 * lead.mean() / theirs.mean():.1f} %)" if part == "personalised" else ""
            ours = method == "fedrouter+"
            cells += [told(theirs), "" if ours else f"{told(lead)}{percent}, in {(lead > 0).sum()} of 5"]
            share = f"{100 * less.mean() / loss.mean():.1f} % ({told(less)}), in {(less > 0).sum()} of 5"
            cells += ["" if ours else share]
            brief += [told(theirs), "" if ours else told(lead)]
            if part == "personalised" and not ours:
                fresh.append(lead[2:])
        assert " ".join(f"{' | '.join(cells)} |".split()) in results
        assert " ".join(f"{' | '.join(brief)} |".split()) in readme
    *most, last = map(told, fresh)
    counts = [f"{sum(lead > 0)}" for lead in fresh]
    assert f"{', '.join(most)} and {last}, in {', '.join(counts[:-1])} and {counts[-1]} of three" in results
    words = [
        [
            np.mean([mine[task] - other[task] for task in mine if task not in LABELS])
            for mine, other in (
                [studies.by_task(found[f"{run}-{seed}"], part) for run in ("fedrouter+-0.01", "fedit-0.02")]
                for seed in range(5)
            )
        ]
        for part in parts
    ]
    assert "the lead over FedIT is {} on own tasks and {} on the mix".format(*map(told, words)) in results


def test_what_is_said_of_fedrouter_as_released_is_what_its_runs_say(runs):
    scores, leads = [], []
    for part in ("personalised", "generalisation"):
        found, plain = (
            np.array([summaries.score(runs[f"dual-{name}-{seed}"], part) for seed in range(5)])
            for name in ("fedrouter-released", "fedrouter")
        )
        scores.append(told(found))
        leads.append(told(found - plain))
    said = f"scores {scores[0]} and {scores[1]}, {leads[0]} and {leads[1]} more than plain `fedrouter`"
    assert said in " ".join(SAID.split())
    mix = [
        [studies.by_task(runs[f"dual-{name}-{seed}"], "generalisation") for seed in range(5)]
        for name in ("fedrouter-released", "fedrouter")
    ]
    lead = [
        np.mean([mine[task] - other[task] for task in mine if task not in LABELS])
        for mine, other in zip(*mix, strict=True)
    ]
    assert f"answered in words it is {told(lead).replace('-0', '-')}" in " ".join(SAID.split())
    questions = [round(6 * (mine["glue_qqp"] - other["glue_qqp"])) for mine, other in zip(*mix, strict=True)]
    assert questions == [1, 1, 1, 0, 1] and "one question of six more in four of the seeds" in SAID


def test_the_lead_over_fedlease_in_words_is_that_of_the_runs(runs):
    by_task = (
        [studies.by_task(runs[f"dual-{name}-{seed}"], "personalised") for seed in range(20)]
        for name in ("fedrouter+", "fedlease")
    )
    in_words = ([np.mean([each[task] for task in each if task not in LABELS]) for each in same] for same in by_task)
    mean, half = summaries.interval([mine - other for mine, other in zip(*in_words, strict=True)])
    assert f"Without QQP it is {mean:.3f} ± {half:.3f} behind".replace("0.", ".") in SAID
