"""What README and docs/results.md say of methods with a learning rate each is what the committed runs say."""

import itertools

import numpy as np
import pytest
from documents import README, RESULTS, SAID, told

from experiments import learning_rates, studies, summaries
from experiments.methods import LABELS


def plain(rate: str) -> str:
    """A rate as tables write it."""
    return f"{float(rate):.0e}".replace("e-0", "e-")


def line_of_leads(method: str, rate: str, ours: dict, theirs: dict) -> str:
    """A method at its rate, and how far `ours` is ahead of `theirs`, {(part, metric): values by seed}."""
    cells = [f"| `{method}` | {plain(rate)}"]
    for part in ("personalised", "generalisation"):
        scores, losses = theirs[part, "rouge1"], theirs[part, "loss"]
        lead, less = ours[part, "rouge1"] - scores, losses - ours[part, "loss"]
        percent = f" ({100 * lead.mean() / scores.mean():.1f} %)" if part == "personalised" else ""
        share = f"{100 * less.mean() / losses.mean():.1f} % ({told(less)}), in {(less > 0).sum()} of {len(less)}"
        leads = [f"{told(lead)}{percent}, in {(lead > 0).sum()} of {len(lead)}", share]
        cells += [told(scores), *(leads if method != "fedrouter+" else ["", ""])]
    return " ".join(f"{' | '.join(cells)} |".split())


def test_what_is_said_of_rates_with_eight_clients_is_what_their_runs_say():
    found = summaries.load(RESULTS / "studies" / "rate-eight-clients")
    results = " ".join(SAID.split())
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
    ours = {(part, m): values("fedrouter+", "0.01", part, m, range(5)) for part in parts for m in ("rouge1", "loss")}
    fresh = []
    for method, rate in (*best.items(), ("fedlease", "0.02")):
        theirs = {(part, metric): values(method, rate, part, metric, range(5)) for part, metric in ours}
        assert line_of_leads(method, rate, ours, theirs) in results
        if method != "fedrouter+":
            fresh.append((ours["personalised", "rouge1"] - theirs["personalised", "rouge1"])[2:])
    *most, last = map(told, fresh)
    counts = [f"{sum(lead > 0)}" for lead in fresh]
    assert f"{', '.join(most)} and {last}, in {', '.join(counts[:-1])} and {counts[-1]} of three" in results
    assert f"On the other three the lead over FedIT on own tasks is {told(fresh[0])}." in " ".join(README.split())
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
    assert f"and {told(words[0])} with eight" in README


def test_what_is_said_of_rates_with_four_clients_is_what_their_runs_say():
    """Rates by held-out rows of seed 0; what is reported is of others."""
    found, tried = (summaries.load(RESULTS / "table1-rates" / part) for part in ("runs", "rates"))
    runs = summaries.load(RESULTS / "table1" / "runs")  # at the rate that all share
    best, seeds = {"fedrouter+": "0.005", "fedit": "0.02", "clustered": "0.005", "feddpa-t": "0.01"}, range(10, 15)
    assert learning_rates.chosen(tried) == {f"dual-{method}": float(rate) for method, rate in best.items()}

    def values(method):
        same = [found[f"dual-{method}-{seed}"] for seed in seeds]
        pairs = itertools.product(("personalised", "generalisation"), ("rouge1", "loss"))
        return {pair: np.array([summaries.score(run, *pair) for run in same]) for pair in pairs}

    for method, rate in best.items():
        assert line_of_leads(method, rate, values("fedrouter+"), values(method)) in " ".join(SAID.split())
    ours, parts = values("fedrouter+"), ("personalised", "generalisation")
    words = [
        [
            np.mean([mine[task] - other[task] for task in mine if task not in LABELS])
            for mine, other in (
                [studies.by_task(found[f"dual-{method}-{seed}"], part) for method in ("fedrouter+", "fedit")]
                for seed in seeds
            )
        ]
        for part in parts
    ]
    assert "the lead over FedIT is {} there and {} on the mix.".format(*map(told, words)) in SAID
    assert f"Without QQP, each at its rate, that lead is {told(words[0])} with four clients" in " ".join(README.split())
    shared = [
        ours[part, "rouge1"] - [summaries.score(runs[f"dual-fedit-{seed}"], part) for seed in seeds] for part in parts
    ]
    assert "At the rate that all share it is {} and {} on these seeds".format(*map(told, shared)) in SAID


@pytest.mark.parametrize(
    ("method", "rate"), [("fedrouter+", 0.01), ("fedit", 0.02), ("clustered", 0.01), ("fedlease", 0.01)]
)
def test_what_another_rate_brings_is_what_the_runs_say(method, rate):
    """Less loss on own tasks than at the usual one, eight clients."""
    tuned, usual = (summaries.load(RESULTS / "studies" / name) for name in ("rate-eight-clients", "eight-clients"))
    losses = (
        [summaries.score(found[f"{method}-{value}-{seed}"], "personalised", "loss") for seed in range(5)]
        for found, value in ((usual, 8), (tuned, rate))
    )
    assert told(np.subtract(*losses)) in SAID
