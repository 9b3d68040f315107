"""Pictures of runs, from run directories alone.

Figures are made without pyplot, so that no display and no global state is needed: saving one draws it with Agg.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedrouter_jax import cluster_plots
from fedrouter_jax.files import replaced
from fedrouter_jax.palette import DASHES, GREY, HATCHES, MARKERS, PALETTE, look
from fedrouter_jax.records import PARTS, Row, Run, latest, names, scores, tasks_of

STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.titlesize": 10,
    "axes.titlelocation": "left", "figure.dpi": 130, "figure.titlesize": 11, "font.size": 9, "legend.frameon": False,
    "grid.color": "#E3E3E3", "figure.constrained_layout.use": True, "text.parse_math": False,
}  # fmt: skip
# For tasks named in scripts that matplotlib's own font lacks: those of these that are installed.
FONTS = (
    "Noto Sans CJK SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "Noto Sans Devanagari", "Nirmala UI",
    "Arial Unicode MS",
)  # fmt: skip
TITLES = ("Personalised: own tasks", "Generalisation: all tasks")
TURNS = "\n(of a client's several local clusters one, in turn)"


def write(runs: Sequence[Run], rows: Sequence[Row], to: Path) -> list[Path]:
    """Draw what the runs have data for; returns the files written."""
    trained = [row for row in rows if not row.base]
    drawn = {}
    installed = {*font_manager.get_font_names()}  # others would be warned of
    fonts = ["sans-serif", *(name for name in FONTS if name in installed)]
    with rc_context(STYLE | {"font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as boxes; the tables have the names
        if any(run.rounds for run in runs):
            drawn["loss"] = loss(trained)
        if any(latest(run)[0] for run in runs):
            if tasks_of(rows, 0):
                drawn["tasks"] = task_bars(rows)
            if curves(rows):
                drawn["rouge"] = over_rounds(rows, "rouge1", "ROUGE-1 F1, mean over clients")
            if curves(rows) and any(scores(row, part, "loss", "mean") for row in rows for part in range(2)):
                drawn["test_loss"] = over_rounds(rows, "loss", "loss of references (nats a token)")
            if len(runs) > 1:
                drawn["scores"] = score_bars(rows)
        if len(runs) == 1 and runs[0].clusters and runs[0].clusters["clustered"]:
            drawn["clusters"] = cluster_plots.clusters(runs[0])
            if (runs[0].path / "embeddings.npy").exists():
                drawn["embedding"] = cluster_plots.embedding(runs[0])
        paths = [to / f"{name}.png" for name in drawn]
        for path, figure in zip(paths, drawn.values(), strict=True):
            with replaced(path) as beside:
                figure.savefig(beside, format="png")
    return paths


def loss(rows: Sequence[Row]) -> Figure:
    """Mean loss over rounds, a line for each row of the tables; behind a single run, what each lane had."""
    figure = Figure((7, 4))
    axes = figure.subplots()
    single = len(rows) == len(rows[0].runs) == 1
    if single:
        lanes(axes, rows[0].runs[0])
    for place, (row, name) in enumerate(zip(rows, names(rows), strict=True)):
        curves = [{record["round"]: record["loss"] for record in run.rounds} for run in row.runs if run.rounds]
        line = {"color": "black"} if single else look(place)
        over_seeds(axes, curves, **line, label=f"{name}, mean" if single else name, markersize=3)
    rounds_axis(axes)
    runs = [run for row in rows for run in row.runs]
    turns = any(run.config.rounds.clusters_per_round == 1 and several_clusters(run) for run in runs)
    axes.set_title(f"Training loss, mean over what a round trained{TURNS * turns}")
    axes.set_ylabel("cross-entropy per response token (nats)")
    axes.grid(axis="y")
    legend(figure, axes)
    return figure


def several_clusters(run: Run) -> bool:
    """Whether a client trained more than one local cluster."""
    return any(lane["cluster"] for record in run.rounds for lane in record["lanes"])


def lanes(axes: Axes, run: Run) -> None:
    """The mean loss of each local cluster that a round trained, a dot in the colour of its global cluster.

    No lines: a local cluster is not trained in every round.
    """
    found = run.clusters or {"table": [], "clusters": 0, "clustered": False}
    table, points = found["table"], {}
    for record in run.rounds:
        table = record.get("table", table)
        for lane in record["lanes"]:
            slot = table[lane["client"]][lane["cluster"]] if table else None
            mean = np.mean(np.array(lane["loss"], float))  # of None, which was not finite, no dot
            points.setdefault(slot, []).append((record["round"], mean))
    if len(points) == 1 and not found["clustered"]:  # nobody is told apart
        points = {None: next(iter(points.values()))}
    kinds = {slot: (slot, str(slot)) for slot in points if slot is not None}
    if found["clustered"]:  # in the colours of the pictures of clusters
        kinds |= cluster_plots.by_task(*reversed(cluster_plots.of_rows(found)), found["tasks"])
    for slot in sorted(points, key=lambda slot: -1 if slot is None else slot):
        look, label = {"color": GREY, "marker": "."}, "one client"
        if slot is not None:
            place, name = kinds[slot]
            look = {"color": PALETTE[place % len(PALETTE)], "marker": MARKERS[place % len(MARKERS)]}
            label = f"cluster {name}"
        label = label if len(points) <= len(PALETTE) else None
        axes.plot(*zip(*points[slot], strict=True), **look, linestyle="", markersize=4, alpha=0.7, label=label)


def over_seeds(axes: Axes, curves: Sequence[dict[int, float]], **look) -> None:
    """A line through values by round; of several seeds, each thin and pale behind their mean where all have one."""
    curves = [{t: np.nan if value is None else value for t, value in curve.items()} for curve in curves if curve]
    for curve in curves if len(curves) > 1 else ():
        axes.plot(*zip(*sorted(curve.items()), strict=True), color=look["color"], linewidth=0.8, alpha=0.35)
    rounds = sorted(set.intersection(*map(set, curves))) if curves else []
    if rounds:
        means = [np.mean([curve[t] for curve in curves]) for t in rounds]
        axes.plot(rounds, means, **{"linewidth": 2.2 if len(curves) > 1 else 1.6, "marker": "o"} | look)


def rounds_axis(axes: Axes) -> None:
    """Whole rounds on the x axis."""
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def legend(figure: Figure, axes: Axes) -> None:
    """Below the picture, where it hides nothing; none for a single entry."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = max(1, min(len(labels), 110 // (max(map(len, labels)) + 6)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def curves(rows: Sequence[Row]) -> bool:
    """Whether scores were taken on the way."""
    return any("scores" in record for row in rows for run in row.runs for record in run.rounds)


def over_rounds(rows: Sequence[Row], metric: str, what: str) -> Figure:
    """A score over the rounds it was taken after, a line for each row; the base model's as level lines."""
    trained, base = [row for row in rows if not row.base], [row for row in rows if row.base]
    figure = Figure((9, 4))
    panels = figure.subplots(1, 2, sharey=True)
    for part, axes in enumerate(panels):
        for place, (row, name) in enumerate(zip(trained, names(trained), strict=True)):
            taken = []
            for run in row.runs:
                found = {record["round"]: record["scores"] for record in run.rounds if "scores" in record}
                last, at = latest(run)
                found |= {at: last} if last else {}
                scored = {t: score[PARTS[part]] for t, score in found.items()}
                taken.append({t: score[metric]["mean"] for t, score in scored.items() if metric in score})
            over_seeds(axes, taken, **look(place), markersize=4, label=name, clip_on=False)
        for number, (row, name) in enumerate(zip(base, names(base), strict=True)):
            level = scores(row, part, metric, "mean")
            if level:
                axes.axhline(np.mean(level), color=GREY, label=name,
                             linestyle=DASHES[(number + 1) % len(DASHES)], linewidth=1.2)  # fmt: skip
        rounds_axis(axes)
        axes.set_title(TITLES[part])
        axes.grid(axis="y")
    panels[0].set_ylabel(what)
    if metric != "loss":  # last, for it ends the autoscaling of both
        panels[0].set_ylim(0, max(0.05, panels[0].get_ylim()[1]))
    legend(figure, panels[0])
    return figure


def spread_of(found: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1; NaN where there are fewer than two)."""
    return (float(np.mean(found)) if found else np.nan), float(np.std(found, ddof=1)) if len(found) > 1 else np.nan


def fills(rows: Sequence[Row]) -> list[dict]:
    """Of bars: grey for base models, then the palette in the order of the other plots, hatched where it comes again."""
    places = iter(range(len(rows)))
    trained = [None if row.base else next(places) for row in rows]
    return [
        {"color": GREY}
        if place is None
        else {
            "color": look(place)["color"],
            "hatch": HATCHES[place // len(PALETTE) % len(HATCHES)],
            "edgecolor": "white",
            "linewidth": 0,
        }
        for place in trained
    ]


def task_bars(rows: Sequence[Row]) -> Figure:
    """ROUGE-1 of each task: grouped bars, one panel for each part."""
    tasks = [tasks_of(rows, part) for part in range(2)]
    width = 0.8 / len(rows)
    inches = min(24.0, max(6.0, 1.5 + 0.22 * max(map(len, tasks)) * (len(rows) + 1)))
    figure = Figure((inches, 6.4))
    panels = figure.subplots(2, 1, sharey=True)
    for part, axes in enumerate(panels):
        for place, (row, name, fill) in enumerate(zip(rows, names(rows), fills(rows), strict=True)):
            found = [spread_of(scores(row, part, "rouge1", "per_task", task)) for task in tasks[part]]
            x = np.arange(len(found)) + (place - (len(rows) - 1) / 2) * width
            mean, deviation = np.array(found).reshape(-1, 2).T
            axes.bar(x, mean, 0.92 * width, yerr=deviation, **fill, capsize=2, label=name)
        axes.set_xticks(range(len(tasks[part])), tasks[part])
        axes.set(title=TITLES[part], ylabel="ROUGE-1 F1")
        axes.grid(axis="y")
    panels[0].set_ylim(0)  # whiskers of small scores reach below
    legend(figure, panels[0])
    explain(figure, rows, "Bars: mean over seeds; whiskers: standard deviation")
    return figure


def explain(figure: Figure, rows: Sequence[Row], text: str) -> None:
    """Say what whiskers and dots are, where there are any."""
    if any(len(row.runs) > 1 for row in rows):
        figure.suptitle(text, fontsize=8)


def score_bars(rows: Sequence[Row]) -> Figure:
    """Mean ROUGE-1 of each row with the standard deviation over seeds, and a dot for each seed."""
    figure = Figure((9, 2 + 0.4 * len(rows)))
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    for part, axes in enumerate(panels):
        for place, (row, fill) in enumerate(zip(rows, fills(rows), strict=True)):
            found = scores(row, part, "rouge1", "mean")
            mean, deviation = spread_of(found)
            axes.barh(place, mean, 0.7, xerr=deviation, **fill, capsize=3)
            if len(found) > 1:
                axes.scatter(found, [place] * len(found), s=14, color="white", edgecolor="black", zorder=3)
        axes.set(title=TITLES[part], xlabel="ROUGE-1 F1, mean over clients")
        axes.grid(axis="x")
    panels[0].set_yticks(range(len(rows)), names(rows))
    panels[0].invert_yaxis()
    explain(figure, rows, "Bars: mean over seeds; whiskers: standard deviation; dots: each seed")
    return figure
