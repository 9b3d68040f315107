"""What `clustering.py` measured, drawn: clustering.md, silhouette.png, other_scores.png and embedding.png."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from typing_extensions import TypedDict  # pydantic takes none of typing before Python 3.12

from fedrouter_jax import cluster_plots, formats
from fedrouter_jax.errors import UserError
from fedrouter_jax.palette import DASHES, MARKERS, PALETTE

WHAT = ("local clusters of one client", "global clusters")  # that are drawn beside the true tasks
BANDS = "bands: from the least to the most of the seeds"
FEW = (2, 4, 8)  # training rows of a task on each client, beside all there are
Record = TypedDict("Record", {
    "name": str, "set": str, "tasks": list[str], "seed": int, "recipe": str, "few": int | None, "local": float,
    "global": float,
})  # fmt: skip  # "global" is a word of Python


class Measured(TypedDict):
    """clustering.json."""

    model: str
    rows_a_task: int
    clients: int
    device: str
    synthetic: bool
    records: list[Record]


def read(path: Path) -> dict | None:
    """What was measured so far; None where nothing was. Raises `UserError` for another file."""
    return formats.read_json(path, Measured, "remove it")


def draw(out: Path) -> None:
    """clustering.md, silhouette.png and embedding.png from clustering.json."""
    found = read(out / "clustering.json")
    if not any("picture" in record for record in found["records"]):
        raise UserError(f"{out / 'clustering.json'} holds no picture of 'refined' yet; run without --redraw")
    (out / "clustering.md").write_text(table(found), encoding="utf-8")
    silhouettes(found).savefig(out / "silhouette.png", dpi=100, bbox_inches="tight")
    others(found).savefig(out / "other_scores.png", dpi=100, bbox_inches="tight")
    pictures(found).savefig(out / "embedding.png", dpi=100, bbox_inches="tight")


def table(found: dict) -> str:
    """Markdown: a row a (set of tasks, recipe), mean and standard deviation over seeds."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in found["records"]:
        if record["few"] is None:
            groups.setdefault((record["set"], record["recipe"]), []).append(record)
    seeds = len({record["seed"] for record in found["records"]})
    kind = "**synthetic** rows" if found["synthetic"] else "rows of flan4 and flan8"
    lines = [
        "# Clusters against tasks",
        "",
        f"{found['model']}, {kind}, at most {found['rows_a_task']} a task, {found['clients']} clients that hold all "
        f"tasks; {seeds} seeds, device {found['device']}. Accuracy: per cent of rows, mean and spread "
        "over seeds, the counts given. Found: what was chosen where none is given (n_g by the silhouette; n_l too, but "
        "in `refined` by what a client has of the global clusters); n_l, how many of all clients have the number of "
        "tasks; n_g, seed by seed.",
        "",
        "| tasks | recipe | local accuracy | global accuracy | found n_l right | found n_g | accuracy with found |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, recipe), records in groups.items():
        count = len(records[0]["tasks"])
        cells = [spread([100 * record[part] for record in records]) for part in ("local", "global")]
        if "found_global" in records[0]:
            chosen = [k for record in records for k in record["found_local"]]
            cells.append(f"{sum(k == count for k in chosen)} of {len(chosen)}")
            cells.append(", ".join(str(record["found_global"]) for record in records))
            cells.append(spread([100 * record["found_accuracy"] for record in records]))
        else:
            cells += [""] * 3
        lines.append(f"| {name} ({count}) | {recipe} | {' | '.join(cells)} |")
    lines += ["", "Global accuracy with few rows of each task on each client, the counts given:", ""]
    lines += [
        "| tasks | recipe | " + " | ".join(f"{few} rows" for few in FEW) + " | all |",
        "|---" * (len(FEW) + 3) + "|",
    ]
    for name in dict.fromkeys(record["set"] for record in found["records"]):
        for recipe in dict.fromkeys(r["recipe"] for r in found["records"] if r["set"] == name and r["few"]):
            same = [r for r in found["records"] if (r["set"], r["recipe"]) == (name, recipe)]
            cells = [spread([100 * r["global"] for r in same if r["few"] == few]) for few in (*FEW, None)]
            lines.append(f"| {name} ({len(same[0]['tasks'])}) | {recipe} | {' | '.join(cells)} |")
    lines += left_out(found)
    figures = ("silhouette", "other_scores", "embedding")
    return "\n".join([*lines, *(text for name in figures for text in ("", f"![{name}]({name}.png)")), ""])


def left_out(found: dict) -> list[str]:
    """The depth that is best on five tasks, tried on the other five: a recipe that was not tuned to its tasks."""
    scores = {(r["set"], r["seed"], r["recipe"]): r for r in found["records"] if "five" in r["set"]}
    recipes = dict.fromkeys(key[2] for key in scores)
    depths = [recipe for recipe in recipes if recipe == "shallow" or recipe.startswith("depth")]
    seeds = [
        seed
        for seed in dict.fromkeys(key[1] for key in scores)
        if all((five, seed, r) in scores for five in ("five drawn", "the other five") for r in (*depths, "paper"))
    ]  # those that were measured whole
    lines = ["", "The depth chosen on five drawn tasks (by accuracy, of equals the shallower), on those left out:", ""]
    lines += ["| seed | left out | depth chosen | accuracy there | the best of all depths there | paper there |"]
    lines += ["|---|---|---|---|---|---|"]
    for seed in seeds:
        chosen = max(depths, key=lambda recipe, s=seed: scores["five drawn", s, recipe]["global"])
        there = {recipe: scores["the other five", seed, recipe] for recipe in (*depths, "paper")}
        best = max(there[recipe]["global"] for recipe in depths)
        cells = [there[chosen]["global"], best, there["paper"]["global"]]
        tasks = ", ".join(there[chosen]["tasks"])
        lines.append(f"| {seed} | {tasks} | {chosen} | {' | '.join(f'{100 * value:.1f}' for value in cells)} |")
    return lines if seeds else []


def spread(values: list[float]) -> str:
    """Mean and, of several, standard deviation; nothing of none."""
    if not values:
        return ""
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def silhouettes(found: dict) -> Figure:
    """Silhouette against k, locally (mean over clients and seeds) and globally, for every set of tasks."""
    drawn = [record for record in found["records"] if "silhouettes" in record]
    named, recipes = (dict.fromkeys(record[key] for record in drawn) for key in ("set", "recipe"))
    figure = Figure((4 * len(named), 6.5))
    panels = figure.subplots(2, len(named), squeeze=False)
    means: dict[tuple[str, str], dict[str, dict]] = {}  # by part and recipe, then by set
    for column, name in enumerate(named):
        for place, recipe in enumerate(recipes):
            records = [record for record in drawn if (record["set"], record["recipe"]) == (name, recipe)]
            parts = {"local": lambda key: key != "global", "global": lambda key: key == "global"}
            for axes, (part, wanted) in zip(panels[:, column], parts.items(), strict=True):
                seeds = [[c for key, c in record["silhouettes"].items() if wanted(key)] for record in records]
                if seeds:
                    line = over_seeds(axes, [mean(curves) for curves in seeds], place, np.argmax, recipe)
                    means.setdefault((part, recipe), {})[name] = line
                axes.set(title=f"{name}, {part}", xlabel="k", ylabel="silhouette" if column == 0 else "")
        for axes in panels[:, column]:
            tasks = next(len(record["tasks"]) for record in drawn if record["set"] == name)
            axes.axvline(tasks, color="0.88", linewidth=6, zorder=0)
    pairs = ((part, a, b) for part in ("local", "global") for a, b in combinations(recipes, 2))
    equal = [f"{a} = {b} ({part}, to .0005)" for part, a, b in pairs if alike(means[part, a], means[part, b])]
    said = ["mean silhouette", "ring: its maximum", "grey: the number of tasks", BANDS, *equal]
    figure.suptitle(f"{'; '.join(said[:3])}\n{'; '.join(said[3:])}")
    figure.tight_layout()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(labels))
    return figure


def alike(some: Mapping[str, dict], others: Mapping[str, dict], least: float = 5e-4) -> bool:
    """Whether curves by set lie on each other, so that a reader is told of the lower ones."""
    keys = [{(name, k) for name, curve in curves.items() for k in curve} for curves in (some, others)]
    return keys[0] == keys[1] and all(abs(some[name][k] - others[name][k]) < least for name, k in keys[0])


def others(found: dict) -> Figure:
    """The two other scores against k (mean over seeds, share of the maximum), of the refined recipe."""
    records = [r for r in found["records"] if "others" in r and r["recipe"] == "refined"]
    figure = Figure((10, 6.5))
    panels = figure.subplots(2, 2)
    for row, (score, best) in enumerate((("Calinski-Harabasz", np.argmax), ("Davies-Bouldin", np.argmin))):
        for column, part in enumerate(("local", "global")):
            axes = panels[row, column]
            for place, name in enumerate(dict.fromkeys(record["set"] for record in records)):
                seeds = [mean([r["others"][part][score]]) for r in records if r["set"] == name]
                most = max(mean(seeds).values())
                shares = [{k: value / most for k, value in curve.items()} for curve in seeds]
                tasks = next(len(r["tasks"]) for r in records if r["set"] == name)
                over_seeds(axes, shares, place, best, f"{name} ({tasks} tasks)")
            axes.set(title=f"{score}, {part}", xlabel="k", ylabel="share of the maximum" if column == 0 else "")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.suptitle(f"Ring: what the score would choose (its maximum, of Davies-Bouldin its minimum)\n{BANDS}")
    figure.tight_layout()
    figure.legend(handles, labels, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(labels))
    return figure


def mean(curves: Sequence[Mapping]) -> dict[int, float]:
    """The mean of curves by k, over those that have it."""
    ks = sorted({int(k) for curve in curves for k in curve})
    values = [{int(k): value for k, value in curve.items()} for curve in curves]  # JSON has no numbers as keys
    return {k: float(np.mean([curve[k] for curve in values if k in curve])) for k in ks}


def over_seeds(axes: Axes, curves: Sequence[dict[int, float]], place: int, best: Callable, label: str) -> dict:
    """Draw the n-th line: the mean of the seeds' curves, which it returns, with a band and a ring where it is best.

    Later lines are thinner and have gaps, so what lies under them is seen, equal as it may be.
    """
    means = mean(curves)
    ks, values = [*means], [*means.values()]
    line = {"color": PALETTE[place], "marker": MARKERS[place], "linestyle": DASHES[place % len(DASHES)]}
    axes.plot(ks, values, **line, linewidth=max(2.6 - 0.5 * place, 1), markersize=4, label=label)
    at = [[curve[k] for curve in curves if k in curve] for k in ks]
    axes.fill_between(ks, [*map(min, at)], [*map(max, at)], color=PALETTE[place], alpha=0.15, linewidth=0)
    where = int(best(values))
    axes.plot(ks[where], values[where], "o", markersize=10, fillstyle="none", color=PALETTE[place])
    return means


def pictures(found: dict) -> Figure:
    """Embeddings in two dimensions by true task, by one client's local clusters, by global cluster.

    A cluster has the colour of the task it matches best; rows of another task are ringed.
    """
    records = [record for record in found["records"] if "picture" in record]
    figure = Figure((15, 5.3 * len(records)))
    for axes, record in zip(figure.subplots(len(records), 3, squeeze=False), records, strict=True):
        points, tasks = np.array(record["picture"]["points"]), record["tasks"]
        places = np.array(record["picture"]["task"])
        true = np.array(tasks)[places]
        cluster_plots.scatter(axes[0], points, true, cluster_plots.in_order(tasks))
        axes[0].set(title=f"{record['set']}: true task", xticks=[], yticks=[])
        for panel, key, what in zip(axes[1:], ("first client", "slot"), WHAT, strict=True):
            labels = np.array(record["picture"][key])
            here, of = points[: len(labels)], places[: len(labels)]
            kinds = cluster_plots.by_task(labels, true[: len(labels)], tasks)
            panel.scatter(*points[len(labels) :].T, color="0.9", s=6, linewidth=0)
            cluster_plots.scatter(panel, here, labels, kinds)
            wrong = np.array([kinds[label][0] for label in labels.tolist()]) != of
            panel.scatter(*here[wrong].T, s=55, facecolor="none", edgecolor="black", linewidth=1)
            panel.set(title=f"{record['set']}: {what}, {sum(wrong)} of {len(wrong)} rows wrong", xticks=[], yticks=[])
    figure.suptitle(
        f"Training rows of seed 0 as the {records[0]['recipe']} recipe sees them, {records[0]['picture']['method']}; "
        "black rings: rows in the cluster of another task"
    )
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    return figure
