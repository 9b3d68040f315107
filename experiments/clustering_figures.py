"""What `clustering.py` measured, drawn: clustering.md, silhouette.png, other_scores.png and embedding.png."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from typing_extensions import TypedDict  # pydantic takes none of typing before Python 3.12

from fedrouter_jax import cluster_plots, formats
from fedrouter_jax.errors import UserError

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
    named = dict.fromkeys(record["set"] for record in found["records"] if "silhouettes" in record)
    figure = Figure((4 * len(named), 6.5))
    panels = figure.subplots(2, len(named), squeeze=False)
    for column, name in enumerate(named):
        searched = [r for r in found["records"] if r["set"] == name and "silhouettes" in r]
        for recipe in dict.fromkeys(record["recipe"] for record in searched):
            records = [record for record in searched if record["recipe"] == recipe]
            parts = {"local": lambda key: key != "global", "global": lambda key: key == "global"}
            for axes, (part, wanted) in zip(panels[:, column], parts.items(), strict=True):
                curves = [curve for r in records for key, curve in r["silhouettes"].items() if wanted(key)]
                ks = sorted({int(k) for curve in curves for k in curve})
                means = [np.mean([curve[str(k)] for curve in curves if str(k) in curve]) for k in ks]
                (line,) = axes.plot(ks, means, marker=".", label=recipe)
                best = int(np.argmax(means))
                axes.plot(ks[best], means[best], "o", markersize=10, fillstyle="none", color=line.get_color())
                axes.axvline(len(records[0]["tasks"]), color="0.7", linestyle=":", zorder=0)
                axes.set(title=f"{name}, {part}", xlabel="k", ylabel="silhouette" if column == 0 else "")
    figure.suptitle("Mean silhouette; ring: its maximum; dotted: the number of tasks")
    figure.tight_layout()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(labels))
    return figure


def others(found: dict) -> Figure:
    """The two other scores against k (mean over seeds, share of the maximum), of the refined recipe."""
    records = [r for r in found["records"] if "others" in r and r["recipe"] == "refined"]
    figure = Figure((10, 6.5))
    panels = figure.subplots(2, 2)
    for row, (score, best) in enumerate((("Calinski-Harabasz", np.argmax), ("Davies-Bouldin", np.argmin))):
        for column, part in enumerate(("local", "global")):
            axes = panels[row, column]
            for name in dict.fromkeys(record["set"] for record in records):
                curves = [r["others"][part][score] for r in records if r["set"] == name]
                ks = sorted(set.intersection(*(set(map(int, curve)) for curve in curves)))
                means = np.array([np.mean([curve[str(k)] for curve in curves]) for k in ks])
                means /= means.max()
                tasks = next(len(r["tasks"]) for r in records if r["set"] == name)
                (line,) = axes.plot(ks, means, marker=".", label=f"{name} ({tasks} tasks)")
                axes.plot(
                    ks[best(means)], means[best(means)], "o", markersize=10, fillstyle="none", color=line.get_color()
                )
            axes.set(title=f"{score}, {part}", xlabel="k", ylabel="share of the maximum" if column == 0 else "")
    panels[0, 0].legend(frameon=False)
    figure.suptitle("Ring: what the score would choose (its maximum, of Davies-Bouldin its minimum)")
    figure.tight_layout()
    return figure


def pictures(found: dict) -> Figure:
    """Embeddings in two dimensions by true task, by one client's local clusters, by global cluster.

    A cluster has the colour of the task it matches best.
    """
    records = [record for record in found["records"] if "picture" in record]
    figure = Figure((15, 5.2 * len(records)))
    for axes, record in zip(figure.subplots(len(records), 3, squeeze=False), records, strict=True):
        points, tasks = np.array(record["picture"]["points"]), record["tasks"]
        true = np.array(tasks)[record["picture"]["task"]]
        cluster_plots.scatter(axes[0], points, true, cluster_plots.in_order(tasks))
        for panel, name in zip(axes[1:], ("first client", "slot"), strict=True):
            labels = np.array(record["picture"][name])
            panel.scatter(*points[len(labels) :].T, color="0.9", s=6, linewidth=0)
            kinds = cluster_plots.by_task(labels, true[: len(labels)], tasks)
            cluster_plots.scatter(panel, points[: len(labels)], labels, kinds)
        for panel, what in zip(axes, ("true task", "local clusters of one client", "global clusters"), strict=True):
            panel.set(title=f"{record['set']}: {what}", xticks=[], yticks=[])
    figure.suptitle(
        f"Training rows of seed 0 as the {records[0]['recipe']} recipe sees them, {records[0]['picture']['method']}"
    )
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    return figure
