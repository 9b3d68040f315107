"""How far one method is ahead of another on the seeds that both have, from what their runs say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from fedrouter_jax.records import Row, by_seed, setting

METRIC = "rouge1", "mean"
OWN, MIX = 0, 1  # places in `records.PARTS`
REFERENCES = ("oracle", "centralised")  # they know what no method is told: nobody wants their leads


class Lead(NamedTuple):
    """One row of runs over another of the same setting."""

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


def leads(rows: Sequence[Row]) -> list[Lead]:
    """Of each setting the method that is best on own tasks over every other that shares two seeds with it.

    The best, not the first: `runs/*` names them by the alphabet. References are led over, and lead nobody.
    """
    settings: dict[tuple, list[Row]] = {}
    for row in rows:
        if not row.base and len(by_seed(row, OWN, *METRIC)) > 1:
            settings.setdefault(setting(row.runs[0]), []).append(row)
    found = []
    for rivals in settings.values():
        able = [row for row in rivals if row.runs[0].config.strategy not in REFERENCES]
        if able:
            ours = max(able, key=lambda row: np.mean([*by_seed(row, OWN, *METRIC).values()]))
            found += [_lead(ours, other) for other in rivals if other is not ours]
    return [lead for lead in found if len(lead.seeds) > 1]


def _lead(ours: Row, theirs: Row) -> Lead:
    scores = [[by_seed(row, part, *METRIC) for row in (ours, theirs)] for part in (OWN, MIX)]
    seeds = sorted(set.intersection(*(set(of) for pair in scores for of in pair)))
    return Lead(ours, theirs, seeds, *([mine[seed] - other[seed] for seed in seeds] for mine, other in scores))
