"""Figures of `studies.py`, from summaries over seeds by (method, value)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import summaries
from fedrouter_jax.models.load import DEFAULT
from fedrouter_jax.records import PARTS

# Of a study's methods: Okabe and Ito's, told apart by all, and a grey for their yellow.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
# Own tasks and mix: the standard deviation over five seeds of fedrouter in Table 1's Dual.
SPREAD = (0.03, 0.05)
Table = Mapping[tuple[str, Any], Sequence[Mapping]]


def figure(what: str, table: Table, ticks: Mapping[Any, str]) -> Figure:
    """A panel a part: a method's means over the values, in the order of `ticks`, joined where there are seeds to mean.

    Where there is a single value, methods stand side by side.
    """
    parts = [part for part in PARTS if any(part in s["scores"] for same in table.values() for s in same)]
    methods = list(dict.fromkeys(method for method, _ in table))
    several, alone = max(map(len, table.values())) > 1, len(ticks) == 1
    joined = several and not alone and not all(isinstance(value, str) for value in ticks)  # no line between kinds
    step = 1 if alone else 0.06 if joined else 0.12
    drawn = Figure((4.6 * len(parts), 3.6))
    for axes, part in zip(drawn.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        for number, (method, colour) in enumerate(zip(methods, COLOURS[: len(methods)], strict=True)):
            aside = step * (number - (len(methods) - 1) / 2)
            points = {
                place + aside: [summaries.score(s, part) for s in table[method, value] if part in s["scores"]]
                for place, value in enumerate(ticks)
                if (method, value) in table
            }
            dots(axes, points, several, color=colour, linestyle="-" if joined else "", label=method)
        names = methods if alone else [*ticks.values()]
        first = -(len(methods) - 1) / 2 if alone else 0
        axes.set(xticks=[first + place for place in range(len(names))], xticklabels=[fill(name, 12) for name in names])
        axes.set(xlim=(first - 0.5, first + len(names) - 0.5), title=part)
        axes.grid(axis="y", color="0.9")
    drawn.axes[0].set(ylabel="ROUGE-1")
    drawn.supxlabel(f"{what}: {next(iter(ticks.values()))}" if alone else what, fontsize="medium")
    drawn.suptitle(said(table), fontsize="small")
    drawn.tight_layout()
    if not alone:
        shown = drawn.axes[0].get_legend_handles_labels()
        drawn.legend(*shown, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(methods))
    return drawn


def unseen(table: Table, ticks: Mapping[str, str]) -> Figure:
    """The scores of a task in the mix: where no client holds it, beside where clients do and the base model."""
    methods = list(dict.fromkeys(method for method, _ in table))
    tasks = [value for value in ticks if value != "none"]
    drawn = Figure((7, 3.8), layout="constrained")
    axes = drawn.subplots()
    several = max(map(len, table.values())) > 1

    def scores(part: str, method: str, value: str, task: str) -> list[float]:
        return [s["scores"][part]["rouge1"]["per_task"][task] for s in table.get((method, value), ())]

    for place, task in enumerate(tasks):
        same = [score for method in methods for score in scores("base_generalisation", method, task, task)]
        axes.hlines(np.mean(same), place - 0.3, place + 0.3, color="0.6", label="" if place else "base model")
    for number, (method, colour) in enumerate(zip(methods, COLOURS[: len(methods)], strict=True)):
        for without, mark in ((True, {}), (False, {"markerfacecolor": "white"})):
            aside = 0.24 * (number - (len(methods) - 1) / 2) + (-0.05 if without else 0.05)
            points = {
                place + aside: scores("generalisation", method, task if without else "none", task)
                for place, task in enumerate(tasks)
            }
            label = f"{method}, {'no client holds the task' if without else 'all tasks held'}"
            dots(axes, points, False, color=colour, linestyle="", label=label, **mark)
    axes.set(xticks=range(len(tasks)), xticklabels=[ticks[task] for task in tasks], ylim=(0, None))
    axes.set(xlabel="task that no client holds", ylabel="ROUGE-1 of that task in the mix")
    axes.grid(axis="y", color="0.9")
    drawn.suptitle(said(table) if several else "one seed", fontsize="small")
    drawn.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    return drawn


def dots(axes: Axes, points: Mapping[float, Sequence[float]], several: bool, **look) -> None:
    """Means by place, with a small dot for each of several seeds; where others have several, a single one is hollow."""
    points = {place: scores for place, scores in points.items() if scores}
    axes.plot([*points], [np.mean(scores) for scores in points.values()], marker="o", **look)
    for place, scores in points.items():
        if len(scores) > 1:
            axes.plot([place] * len(scores), scores, ".", color=look["color"], alpha=0.5)
        elif several:
            axes.plot([place], scores, "o", color=look["color"], markerfacecolor="white")


def said(table: Table) -> str:
    """What dots are; of one seed, how much that says, which was measured on real rows."""
    counts = {len(same) for same in table.values()}
    if max(counts) > 1:
        return "large dots: means over seeds, small ones: the seeds" + "; hollow: one seed" * (1 in counts)
    configs = [summary["config"] for same in table.values() for summary in same]
    if any(c["data"]["data"] == "synthetic" or c["model"] != DEFAULT for c in configs):
        return "one seed"
    own, mix = (f"{spread:.2f}".removeprefix("0") for spread in SPREAD)
    return (
        f"one seed; at Table 1's budget seeds of one method differ by about ±{own} on own tasks and ±{mix} on the mix"
    )
