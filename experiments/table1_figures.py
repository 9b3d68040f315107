"""Figures of `table1.py`: the scores of all methods, and the leads of fedrouter+ over each baseline, seed by seed.

A row of panels a scenario, own tasks on the left and the mix on the right, as high as it has methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.methods import BOUNDS, OURS
from experiments.table1_tables import COLUMNS, UNTRAINED, cells, comparable, paired, shown
from fedrouter_jax.leads import interval, told

COLOURS = {"fedrouter+": "#d55e00", "fedrouter": "#e69f00", UNTRAINED: "0.6"} | dict.fromkeys(BOUNDS, "0.8")
PARTS = {"personalised": "own tasks", "generalisation": "the mix"}
Column = tuple[str, str]  # scenario and part


def scores(found: dict[str, dict]) -> Figure:
    """Bars are means over seeds, dots the seeds; what has one seed, where others have several, is hatched and last."""
    table = cells(found)
    columns = [column for column in COLUMNS if any(key[:2] == column for key in table)]
    found_scores = {column: comparable(table, column) for column in columns}
    drawn, panels = grid({column: len(methods) for column, methods in found_scores.items()})
    counts = {len(seeds) for methods in found_scores.values() for m, seeds in methods.items() if m != UNTRAINED}
    hatched = min(counts) == 1 < max(counts)
    for column, axes in panels.items():
        values = {method: [*seeds.values()] for method, seeds in found_scores[column].items()}
        once = {m for m in values if hatched and len(values[m]) == 1}
        methods = sorted(values, key=lambda m, v=values, once=once: (m in once, -np.mean(v[m])))
        for place, method in enumerate(methods):
            colour = COLOURS.get(method, "#0072b2")
            look = {"color": "white", "edgecolor": colour, "hatch": "////"} if method in once else {"color": colour}
            axes.barh(place, np.mean(values[method]), **look)
            axes.plot(values[method], [place] * len(values[method]), "k.", markersize=4)
        axes.set(yticks=range(len(methods)), yticklabels=methods, title=f"{column[1]}, {column[0]}", xlabel="ROUGE-1")
    said = ["bars: means over seeds", "dots: the seeds"] if max(counts) > 1 else ["one seed"]
    said += ["hatched: one seed"] * hatched
    said += ["light grey: references"] * any(m in BOUNDS for methods in found_scores.values() for m in methods)
    drawn.suptitle(f"{setting(found)}\n{'; '.join(said)}", fontsize="medium")
    return drawn


def leads(found: dict[str, dict]) -> Figure:
    """How far fedrouter+ is ahead of each baseline: mean and 95 % interval of the differences of seeds both have."""
    leading = paired(cells(found))
    drawn, panels = grid({column: len(methods) for column, methods in leading.items()})
    counts = {len(values) for methods in leading.values() for values in methods.values()}
    for column, axes in panels.items():
        methods = sorted(leading[column].items(), key=lambda pair: np.mean(pair[1]))  # the closest first
        for place, (_, values) in enumerate(methods):
            mean, half = interval(values)
            axes.errorbar(mean, place, xerr=half, fmt="o", color=COLOURS[OURS[0]], capsize=3, markersize=5)
            axes.text(1.02, place, told(values), transform=axes.get_yaxis_transform(), va="center", fontsize="small")
        names = [f"{method} ({len(values)})" if len(counts) > 1 else method for method, values in methods]
        axes.set(yticks=range(len(methods)), yticklabels=names, title=f"{PARTS[column[1]]}, {column[0]}")
        axes.set_xlabel(f"lead of {OURS[0]} in ROUGE-1")
        axes.axvline(0, color="0.4", linewidth=1, zorder=1)
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
    seeds = "in brackets: seeds that both have" if len(counts) > 1 else f"{counts.pop()} seeds"
    said = f"lead of {OURS[0]} over each baseline: mean of the differences by seed and its 95 % interval; {seeds}"
    drawn.suptitle(f"{setting(found)}\n{said}", fontsize="medium")
    return drawn


def grid(rows: Mapping[Column, int]) -> tuple[Figure, dict[Column, Axes]]:
    """A panel for each column of the tables with that many rows, which are as high in all of them; first on top."""
    scenarios, parts = (list(dict.fromkeys(names)) for names in zip(*rows, strict=True))
    most = [max(count for (scenario, _), count in rows.items() if scenario == name) for name in scenarios]
    drawn = Figure((11, 0.7 + sum(0.8 + 0.22 * count for count in most)), layout="constrained")
    panels = drawn.subplots(len(scenarios), len(parts), squeeze=False, sharex=True, height_ratios=most)
    found = {}
    for scenario, count, line in zip(scenarios, most, panels, strict=True):
        for part, axes in zip(parts, line, strict=True):
            axes.set_ylim(count - 0.4, -0.6)
            axes.tick_params(labelbottom=True)
            if (scenario, part) in rows:
                found[scenario, part] = axes
            else:
                axes.remove()
    return drawn, found


def setting(found: dict[str, dict]) -> str:
    """Model, clients and steps, which all runs of a table share."""
    config = next(iter(shown(found).values()))["config"]
    steps = config["rounds"]["rounds"] * config["local"]["steps"]
    return f"{Path(config['model']).name}, {config['data']['clients']} clients, {steps} optimiser steps a client"
