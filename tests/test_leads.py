"""What README and docs/results.md say of one method beside another is what the committed runs say."""

import numpy as np
import pytest
from documents import README, RESULTS, SAID, told

from experiments import studies, summaries, table1_tables
from experiments.methods import LABELS
from fedrouter_jax.leads import interval


@pytest.fixture(scope="module")
def runs():
    """The runs of Table 1 at the reduced budget."""
    return summaries.load(RESULTS / "table1" / "runs")


IN_ALL = ("fedlease", "ffalora", "fedex", "flexlora", "feddpa-f", "fedalt", "ifca", "scaffold")


@pytest.mark.parametrize(
    ("method", "seeds"),
    [
        ("clustered", 20),
        ("fedlease", 20),
        ("feddpa-t", 5),
        ("feddpa-f", 5),
        ("fedex", 5),
        ("flexlora", 5),
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


@pytest.mark.parametrize("method", IN_ALL)
def test_the_leads_in_all_are_those_of_the_runs(method, runs):
    assert leads_in("all", method, 5, table1_tables.cells(runs)) in SAID


def test_what_is_said_of_all_without_qqp_is_what_the_runs_say(runs):
    cells = table1_tables.cells(runs, LABELS)
    names = ("ifca", "flexlora", "fedex")
    leads = [table1_tables.lead(cells, ("all", "personalised"), "fedrouter+", name) for name in names]
    ifca, fedex = (told(np.array(lead)) for lead in leads[::2])
    flexlora = "{:.4f} ± {:.4f}".format(*interval(leads[1])).replace("0.", ".")
    assert f"(without QQP beyond it, {ifca}, just so {flexlora}, and {fedex}, in five of five each)" in SAID
    assert all(lead > 0 for lead in np.ravel(leads))
    beyond = {}
    for method in IN_ALL:
        mean, half = interval(table1_tables.lead(cells, ("all", "generalisation"), "fedrouter+", method))
        beyond[method] = mean > half
    assert [method for method in beyond if beyond[method]] == [
        "fedlease", "ffalora", "feddpa-f", "fedalt", "ifca", "scaffold"
    ]  # fmt: skip
    assert "(without QQP those over FlexLoRA and FedEx-LoRA alone)" in SAID


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
            " ± ".join(f"{value:.3f}"[1:] for value in interval(values))
            for values in ([theirs[seed] for seed in range(seeds)], leads)
        )
        percent = 100 * np.mean(leads) / np.mean([theirs[seed] for seed in range(seeds)])
        share = f" ({percent:.1f} %)" if part == "personalised" else ""
        cells += [scored, f"{lead}{share}, in {sum(lead > 0 for lead in leads)} of {seeds}"]
    return " | ".join(cells) + " |"


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


@pytest.mark.parametrize(("study", "value"), [("rate-0.5b", "0.001"), ("eight-clients", "8")])
@pytest.mark.parametrize("method", ["fedit", "clustered", "fedlease"])
def test_the_leads_in_studies_of_five_seeds_are_those_of_their_runs(study, value, method):
    """With the middle model, and with eight clients."""
    found = summaries.load(RESULTS / "studies" / study)

    def values(method, part, metric):
        return np.array([summaries.score(found[f"{method}-{value}-{seed}"], part, metric) for seed in range(5)])

    cells = [f"| `{method}`"]
    for part in ("personalised", "generalisation"):
        theirs, loss = values(method, part, "rouge1"), values(method, part, "loss")
        lead, less = values("fedrouter+", part, "rouge1") - theirs, loss - values("fedrouter+", part, "loss")
        percent = f"{100 * less.mean() / loss.mean():.1f} %"
        cells += [told(theirs), f"{told(lead)}, in {(lead > 0).sum()} of 5"]
        cells += [f"{percent} ({told(less)}), in {(less > 0).sum()} of 5"]
    assert " | ".join(cells) + " |" in SAID


NAMES = {"fedit": "FedIT", "clustered": "Clustered", "fedlease": "FedLEASE", "feddpa-t": "FedDPA-T", "local": "Local"}
NAMES |= {"fedex": "FedEx-LoRA", "ffalora": "FFA-LoRA", "fedsa": "FedSA"}
THREE = dict.fromkeys(("fedit", "clustered", "fedlease"), "")
BEST = {"fedrouter+": "-0.01", "fedit": "-0.02", "clustered": "-0.01", "fedlease": "-0.02"}
SHORT = {  # what README calls it: folder of runs, what a run is called before its seed, seeds, others and what they add
    "four clients, one rate (20)": ("table1/runs", "dual-{}", range(20), THREE),
    "four clients, each its rate (5)": ("table1-rates/runs", "dual-{}", range(10, 15), THREE | {"feddpa-t": ""}),
    "eight clients, one rate (5)": ("studies/eight-clients", "{}-8", range(5), THREE),
    "eight clients, each its best rate (5)": ("studies/rate-eight-clients", "{}", range(5), BEST),
    "0.5B, four clients, a fifth of the rate (5)": ("studies/rate-0.5b", "{}-0.001", range(5), THREE),
    "four clients with one task each, one rate (5)": ("table1/runs", "single-{}", range(5), NAMES),
    "four clients with all four tasks each, one rate (10)": ("table1/runs", "all-{}", range(10), NAMES),
}
SHORT_IN_README = [*SHORT][:4]
PERCENT = {
    "four clients, each its rate (5)": "`fedrouter+` is ahead of FedIT by {:.1f} % (four clients)",
    "eight clients, each its best rate (5)": "and {:.1f} % (eight) on own tasks",
}


@pytest.mark.parametrize("label", SHORT)
def test_the_leads_in_short_are_those_of_the_runs(label):
    """Over FedIT, and over the best of the other baselines that have all these seeds; README has those of Dual."""
    folder, pattern, seeds, added = SHORT[label]
    found, cells, percents = summaries.load(RESULTS / folder), [f"| {label}"], []

    def scores(method, part):
        name = pattern.format(method) + (added.get(method, "") if added is BEST else "")
        return np.array([summaries.score(found[f"{name}-{seed}"], part) for seed in seeds if f"{name}-{seed}" in found])

    for part in ("personalised", "generalisation"):
        known = {method: scores(method, part) for method in ("fedrouter+", *added)}
        known = {method: values for method, values in known.items() if len(values) == len(seeds)}
        ours, fedit = known.pop("fedrouter+"), known.pop("fedit")
        best = max(known, key=lambda method: known[method].mean())
        cells += [told(ours - fedit), f"{told(ours - known[best])} {NAMES[best]}"]
        percents.append(100 * (ours - fedit).mean() / fedit.mean())
    line = f"{' | '.join(cells)} |"
    assert line in SAID and (line in README) == (label in SHORT_IN_README)
    if label in PERCENT:  # at the top, on own tasks
        assert PERCENT[label].format(percents[0]) in README


def beside(runs: dict, method: str, other: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores of two methods in Dual, by seed, on own tasks and on the mix."""
    return [
        tuple(np.array([summaries.score(runs[f"dual-{m}-{seed}"], part) for seed in range(5)]) for m in (method, other))
        for part in ("personalised", "generalisation")
    ]


def test_what_is_said_of_an_oracle_of_the_same_turns_is_what_its_runs_say(runs):
    found = beside(runs, "oracle+", "fedrouter+")
    scores = [told(oracle) for oracle, _ in found]
    assert f"scores {scores[0]} and {scores[1]}: in three seeds that is what `fedrouter+` has to a thousandth" in SAID
    leads = [ours - oracle for oracle, ours in found]
    for lead in leads:  # in seeds 0 and 2
        np.testing.assert_allclose(lead[[1, 3, 4]], 0, atol=1e-3)
    (own, mix) = (" and ".join(f"{value:.3f}".replace("0.", ".") for value in lead[[0, 2]]) for lead in leads)
    assert f"`fedrouter+` is {own} ahead on own tasks, {mix} on the mix" in SAID


@pytest.mark.parametrize(
    ("ours", "theirs", "column", "without", "said"),
    [
        ("flexlora", "fedrouter", "personalised", LABELS, "level with the best, FlexLoRA ({} and"),
        ("flexlora", "fedrouter", "generalisation", LABELS, "and {} behind), and behind FedLEASE"),
        ("fedlease", "fedrouter", "personalised", LABELS, "and behind FedLEASE by {} on own tasks"),
        ("fedit", "fedrouter", "generalisation", LABELS, "and FedIT by {} on the mix"),
    ],
)
def test_what_is_said_of_plain_fedrouter_with_all_tasks_is_what_its_runs_say(ours, theirs, column, without, said, runs):
    cells = table1_tables.cells(runs, without)
    lead = table1_tables.lead(cells, ("all", column), ours, theirs)
    assert len(lead) == 5 and said.format(told(np.array(lead))) in " ".join(README.split())


def test_what_staggered_turns_bring_with_all_tasks_is_what_the_runs_say(runs):
    cells = table1_tables.cells(runs)
    leads = (
        told(np.array(table1_tables.lead(cells, ("all", part), "fedrouter+", "fedrouter")))
        for part in ("personalised", "generalisation")
    )
    assert "There `fedrouter+` is {} and {} ahead of it".format(*leads) in " ".join(SAID.split())


def test_what_is_said_of_fedrouter_as_released_is_what_its_runs_say(runs):
    found = beside(runs, "fedrouter-released", "fedrouter")
    scores, leads = ([told(values) for values in kind] for kind in ((r for r, _ in found), (r - p for r, p in found)))
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
    mean, half = interval([mine - other for mine, other in zip(*in_words, strict=True)])
    assert f"Without QQP it is {mean:.3f} ± {half:.3f} behind".replace("0.", ".") in SAID
