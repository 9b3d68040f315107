"""Which method is best, and how far ahead of another on the seeds that both have, from what their runs say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from fedrouter_jax.records import Row, budget, by_seed, setting

METRIC = "rouge1", "mean"
OWN, MIX = 0, 1  # places in `records.PARTS`
TOLD_MORE = ("oracle", "centralised")  # than any method is: nobody wants their leads


class Lead(NamedTuple):
    """One row of runs over another of the same setting and budget."""

    ours: Row
    theirs: Row
    seeds: list[int]  # that both have, two at least
    own: list[float]  # the difference by seed in the main metric, personalised
    mix: list[float]  # generalisation


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t; 0 for one value)."""
    if len(values) < 2:
        return float(np.mean(values)), 0.0
    half = stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)


def told(values: Sequence[float]) -> str:
    """A lead as tables have it."""
    mean, half = interval(values)
    return f"{round(mean, 3) + 0.0:+.3f} ± {half:.3f}"  # no "-0.000"


def leads(rows: Sequence[Row]) -> list[Lead]:
    """Of each setting and budget the method that is best on own tasks over every other that shares two seeds with it.

    The best, not the first: `runs/*` names them by the alphabet; over the seeds that all that may lead have, or where
    there are none over its own. References are led over, and lead nobody.
    """
    settings: dict[tuple, list[Row]] = {}
    for row in rows:
        if not row.base and len(by_seed(row, OWN, *METRIC)) > 1:
            settings.setdefault((setting(row.runs[0]), budget(row.runs[0])), []).append(row)
    found = []
    for rivals in settings.values():
        pairs = [_lead(ours, theirs) for ours in rivals for theirs in rivals if ours is not theirs]
        pairs = [lead for lead in pairs if len(lead.seeds) > 1]
        if best := _best([lead.ours for lead in pairs]):
            found += [lead for lead in pairs if lead.ours is best]
    return found


def best_rows(
    rows: Sequence[Row], values: Sequence[Sequence[float]], best: Callable, form: Callable[[float], str]
) -> list[int]:
    """The places of the rows whose means are best, as shown, of those that compare; `values` are a score's by row.

    Finished runs compare that are of the same setting and budget; the base model, which takes no steps, does with those
    of its seeds; references are left out. Where rivals have other seeds, or not all have the score for all their runs,
    or all are alike, none is the best.
    """
    means, seeds = {}, {}
    for i, (row, found) in enumerate(zip(rows, values, strict=True)):
        told_more = not row.base and row.runs[0].config.strategy in TOLD_MORE
        if found and not told_more and all(run.scores is not None for run in row.runs):
            means[i] = float(np.mean(found))
            seeds[i] = (*(run.config.seed for run in row.runs), len(found) == len(row.runs))

    def rivals(i: int, k: int) -> bool:
        one, other = rows[i].runs[0], rows[k].runs[0]
        if rows[k].base and not rows[i].base and seeds[k] != seeds[i]:
            return False
        return setting(one) == setting(other) and (rows[i].base or rows[k].base or budget(one) == budget(other))

    chosen = []
    for i in means:
        others = [k for k in means if rivals(i, k)]
        comparable = seeds[i][-1] and {seeds[k] for k in others} == {seeds[i]}
        shown = {form(means[k]) for k in others}
        if comparable and len(shown) > 1 and form(means[i]) == form(best(means[k] for k in others)):
            chosen.append(i)
    return chosen


def _best(rows: Sequence[Row]) -> Row | None:
    scores = [(row, by_seed(row, OWN, *METRIC)) for row in rows if row.runs[0].config.strategy not in TOLD_MORE]
    shared = set.intersection(*(set(of) for _, of in scores)) if scores else set()

    def mean(pair: tuple[Row, dict[int, float]]) -> float:
        return float(np.mean([value for seed, value in pair[1].items() if seed in shared or not shared]))

    return max(scores, key=mean)[0] if scores else None


def _lead(ours: Row, theirs: Row) -> Lead:
    scores = [[by_seed(row, part, *METRIC) for row in (ours, theirs)] for part in (OWN, MIX)]
    seeds = sorted(set.intersection(*(set(of) for pair in scores for of in pair)))
    return Lead(ours, theirs, seeds, *([mine[seed] - other[seed] for seed in seeds] for mine, other in scores))
