"""Do clusters find the tasks? Accuracy and chosen k by recipe, layer, restarts and rows. No training.

    python -m experiments.clustering --data ../shared/data            tables and figures in docs/results/clustering/
    python -m experiments.clustering --smoke                          the tiny model on synthetic rows

Rows of a task are dealt to clients as in the paper's All scenario: every client holds every task. Each seed deals the
rows anew and starts K-Means elsewhere. Accuracy is the share of rows on the best matching of clusters to tasks
(FedRouter, arXiv 2604.00050, reports 95.4 % for four tasks). "Found k" is what the silhouette chooses; two other scores
that could choose (Calinski and Harabasz 1974, Davies and Bouldin 1979) are drawn beside it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice, product
from pathlib import Path

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown
from sklearn.cluster import KMeans
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score

from fedrouter_jax import embed, evaluate, plots, routing, runs
from fedrouter_jax.cli import guarded, keep_programs, progress
from fedrouter_jax.data import sources, synthetic, tokens
from fedrouter_jax.data.rows import Row
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import Model, load_model

MOST = 13  # the largest k the silhouette may choose
RECIPES = {
    "paper": routing.RECIPES["paper"],
    "paper, 20 starts": routing.RECIPES["paper"]._replace(restarts=20),
    "standardised": routing.RECIPES["standardised"],
    "standardised, 1 start": routing.RECIPES["standardised"]._replace(restarts=1),
    "standardised, last layer": routing.Recipe(depth=None, standardise=True, restarts=20),
    **{
        f"standardised, {name} of the layers": routing.Recipe(depth=depth, standardise=True, restarts=20)
        for name, depth in (("1/6", 1 / 6), ("1/3", 1 / 3), ("1/2", 1 / 2), ("2/3", 2 / 3))
    },
}
FEW = (2, 4, 8)  # training rows of a task on each client, beside all there are


@dataclass(frozen=True)
class Clustering:
    """Clusters against tasks."""

    data: Path = Path("data")
    """Folder that holds flan4/ and flan8/."""
    rows: int = 96
    """Training rows of each task."""
    clients: int = 8
    """Clients that hold all tasks."""
    seeds: int = 5
    """Seeds 0 .. N-1."""
    out: Path | None = None
    """Folder for results and figures; by default docs/results/clustering, or runs/smoke/clustering with --smoke."""
    smoke: bool = False
    """The tiny model on a few synthetic rows, one seed."""
    redraw: bool = False
    """Only draw table and figures from the clustering.json in --out."""


def main(options: Clustering) -> None:
    """Embed once by each recipe's layer, cluster for every seed, write results and draw them."""
    keep_programs()
    if options.smoke:
        options = replace(options, rows=24, clients=2, seeds=1)
    out = options.out or Path("runs/smoke/clustering" if options.smoke else "docs/results/clustering")
    if not options.redraw:
        measure(options, out / "clustering.json")
    draw(out)
    Console().print(Markdown((out / "clustering.md").read_text(encoding="utf-8")))


def measure(options: Clustering, to: Path) -> None:
    """Add what is missing to the records in `to`; they are written after every one."""
    model = load_model("tiny" if options.smoke else "smollm2-135m")
    setting = {
        "model": model.base_name,
        "rows_a_task": options.rows,
        "clients": options.clients,
        "device": jax.devices()[0].device_kind,
        "synthetic": options.smoke,
    }
    found = json.loads(to.read_text(encoding="utf-8")) if to.exists() else {**setting, "records": []}
    if {key: value for key, value in found.items() if key != "records"} != setting:
        raise UserError(f"{to} was measured with other options; choose another --out or remove it")
    jobs = {
        f"{name} {seed}, {recipe}, {few or 'all'} rows": (name, seed, tasks, recipe, few)
        for name, seed, tasks in task_sets(sorted(rows_by_task(options)), options.seeds, options.smoke)
        for recipe, few in [*((recipe, None) for recipe in RECIPES), *product(routing.RECIPES, FEW)]
    }
    known = {record["name"] for record in found["records"]}
    states = cache(partial(embedded, model, rows_by_task(options), Path("runs/clustering")))
    with progress() as track, track("clustering", len(jobs)) as advance:
        before = None
        for job, (name, seed, tasks, recipe, few) in jobs.items():
            if job not in known:
                if name != before:  # programs of other shapes are not needed again, and there are many
                    jax.clear_caches()
                before, by_task = name, states(RECIPES[recipe].depth)
                record = cluster({task: by_task[task] for task in tasks}, seed, recipe, options.clients, few)
                of = {"name": job, "set": name, "tasks": tasks, "seed": seed, "recipe": recipe, "few": few}
                found["records"].append({**of, **record})
                runs.write(to, json.dumps(rounded(found), indent=None) + "\n")
            advance(1, job)


def rounded(value):
    """Floats at five digits, through lists and dictionaries."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return round(value, 5) if isinstance(value, float) else value


def rows_by_task(options: Clustering) -> dict[str, list[Row]]:
    """Training rows of all tasks of flan4 and flan8 (or the synthetic ones), at most `rows` distinct ones a task."""
    if options.smoke:
        rows = synthetic.make(0, options.rows, 1).train
    else:
        folders = [options.data / name for name in ("flan4", "flan8")]
        rows = [row for folder in folders for row in sources.load(str(folder), {}, seed=0).train]
    tasks = sorted({row.task for row in rows})
    return {task: list(islice(dict.fromkeys(row for row in rows if row.task == task), options.rows)) for task in tasks}


def task_sets(tasks: list[str], seeds: int, smoke: bool) -> Iterator[tuple[str, int, list[str]]]:
    """(name, seed, tasks): flan4, flan8, all of them, and six drawn anew for every seed."""
    flan4 = ["gigaword", "glue_qqp", "samsum", "web_nlg_en"]
    flan8 = [task for task in tasks if task not in ("gigaword", "samsum")]
    named = {"synthetic": tasks} if smoke else {"flan4": flan4, "flan8": flan8, "all ten": tasks}
    for name, held in named.items():
        for seed in range(seeds):
            yield name, seed, held
    for seed in range(0 if smoke else seeds):
        yield "six of ten", seed, sorted(np.random.default_rng([seed, 6]).choice(tasks, 6, replace=False).tolist())


def embedded(model: Model, rows: dict[str, list[Row]], folder: Path, depth: float | None) -> dict[str, np.ndarray]:
    """Embeddings [row, width] of each task's rows by a share of the layers, kept in a file named by their content."""
    texts = [row.instruction for held in rows.values() for row in held]
    ids = tokens.encode_texts(model.tokenizer, texts, 1024)
    content = hashlib.sha256(json.dumps([model.fingerprint, depth, ids]).encode()).hexdigest()
    path = folder / f"{content[:24]}.npy"
    if not path.exists():
        at_once = 1 if jax.default_backend() == "cpu" else 16
        name = "all layers" if depth is None else f"{round(depth * model.config.layers)} layers"
        with progress() as track, track(f"embedding by {name}", len(ids)) as advance:
            found = embed.embed(model.config, model.params, ids, depth, at_once, advance)
        with runs.replaced(path) as beside, beside.open("wb") as file:
            np.save(file, found, allow_pickle=False)
    ends = np.cumsum([len(held) for held in rows.values()])[:-1]
    return dict(zip(rows, np.split(np.load(path, allow_pickle=False), ends), strict=True))


def cluster(states: dict[str, np.ndarray], seed: int, recipe: str, clients: int, few: int | None = None) -> dict:
    """One enrolment with the counts given, and for the two named recipes one where the silhouette finds them.

    `states` holds the embeddings [row, width] of each task; with `few`, a client gets so many rows of each.
    """
    rng, tasks = np.random.default_rng([seed, 4]), len(states)
    dealt = [rng.permutation(rows)[: None if few is None else few * clients] for rows in states.values()]
    points = [np.concatenate([rows[c::clients] for rows in dealt]) for c in range(clients)]
    labels = [np.repeat(np.arange(tasks), [len(rows[c::clients]) for rows in dealt]) for c in range(clients)]
    key = jax.random.key(seed)
    given = routing.enroll(key, points, RECIPES[recipe], tasks, tasks)
    local, total = accuracy(given, labels, tasks)
    record = {"local": local, "global": total}
    if recipe in routing.RECIPES and few is None:
        found = routing.enroll(key, points, RECIPES[recipe], None, None, MOST)
        record |= {
            "found_local": [int(row.max()) + 1 for row in found.labels],
            "found_global": found.clusters,
            "found_accuracy": accuracy(found, labels, tasks)[1],
            "silhouettes": found.silhouettes,
            "others": other_scores(given.router, points, given.labels),
        }
        if seed == 0 and recipe == "standardised":
            flat = np.concatenate(points)
            router = given.router._replace(centroids=given.router.centroids[:0])
            picture, method = plots.project(np.asarray(routing.prepare(router, flat)))
            slots = [int(given.table[c, k]) for c, row in enumerate(given.labels) for k in row[: len(labels[c])]]
            record["picture"] = {
                "method": method,
                "points": np.round(picture.astype(float), 1).tolist(),
                "task": np.concatenate(labels).tolist(),
                "slot": slots,
            }
    return record


def other_scores(router: routing.Router, points: list[np.ndarray], labels: np.ndarray) -> dict[str, dict]:
    """Two scores against k from scikit-learn: of the first client's rows, and of all clients' centres."""
    router = router._replace(centroids=router.centroids[:0])
    rows = [np.asarray(routing.prepare(router, held)) for held in points]
    centres = [
        r[lab[: len(r)] == k].mean(axis=0) for r, lab in zip(rows, labels, strict=True) for k in set(lab[: len(r)])
    ]
    found: dict[str, dict] = {}
    for part, x in (("local", rows[0]), ("global", np.stack(centres))):
        fits = {k: KMeans(k, n_init=10, random_state=0).fit_predict(x) for k in range(2, min(MOST, len(x) - 1) + 1)}
        scores = {"Calinski-Harabasz": calinski_harabasz_score, "Davies-Bouldin": davies_bouldin_score}
        found[part] = {name: {k: float(score(x, y)) for k, y in fits.items()} for name, score in scores.items()}
    return found


def accuracy(enrolment: routing.Enrolment, tasks: list[np.ndarray], count: int) -> tuple[float, float]:
    """The share of rows in the right local cluster, and in the right global one, under the best matching."""
    table, rows = np.asarray(enrolment.table), sum(map(len, tasks))
    slots, right = np.zeros((count, enrolment.clusters), int), 0.0
    for client, true in enumerate(tasks):
        labels = enrolment.labels[client][: len(true)]
        own = np.zeros((count, table.shape[1]), int)
        np.add.at(own, (true, labels), 1)
        np.add.at(slots, (true, table[client, labels]), 1)
        right += evaluate.matched(own) * len(true)
    return right / rows, evaluate.matched(slots)


def draw(out: Path) -> None:
    """clustering.md, silhouette.png and embedding.png from clustering.json."""
    found = json.loads((out / "clustering.json").read_text(encoding="utf-8"))
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
        "over seeds, the counts given. Found: what the silhouette chose; n_l, how many of all clients chose the number "
        "of tasks; n_g, seed by seed.",
        "",
        "| tasks | recipe | local accuracy | global accuracy | found n_l right | found n_g | accuracy with found |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, recipe), records in sorted(groups.items()):
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
        for recipe in routing.RECIPES:
            same = [r for r in found["records"] if (r["set"], r["recipe"]) == (name, recipe)]
            cells = [spread([100 * r["global"] for r in same if r["few"] == few]) for few in (*FEW, None)]
            lines.append(f"| {name} ({len(same[0]['tasks'])}) | {recipe} | {' | '.join(cells)} |")
    figures = ("silhouette", "other_scores", "embedding")
    return "\n".join([*lines, *(text for name in figures for text in ("", f"![{name}]({name}.png)")), ""])


def spread(values: list[float]) -> str:
    """Mean and, of several, standard deviation."""
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def silhouettes(found: dict) -> Figure:
    """Silhouette against k, locally (mean over clients and seeds) and globally, for every set of tasks."""
    named = dict.fromkeys(record["set"] for record in found["records"] if record["set"] != "six of ten")
    figure = Figure((4 * len(named), 6.5))
    panels = figure.subplots(2, len(named), squeeze=False)
    for column, name in enumerate(named):
        for recipe in routing.RECIPES:
            records = [r for r in found["records"] if (r["set"], r["recipe"], r["few"]) == (name, recipe, None)]
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
        panels[0, 0].legend(frameon=False)
    figure.suptitle("Mean silhouette; ring: its maximum; dotted: the number of tasks")
    figure.tight_layout()
    return figure


def others(found: dict) -> Figure:
    """The two other scores against k (mean over seeds, share of the maximum), of the standardised recipe."""
    records = [
        r for r in found["records"] if "others" in r and r["recipe"] == "standardised" and r["set"] != "six of ten"
    ]
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
    """Embeddings in two dimensions: true tasks beside global clusters, for every set of tasks."""
    records = [record for record in found["records"] if "picture" in record and record["set"] != "six of ten"]
    figure = Figure((10, 4.6 * len(records)))
    for axes, record in zip(figure.subplots(len(records), 2, squeeze=False), records, strict=True):
        points, tasks = np.array(record["picture"]["points"]), record["tasks"]
        plots.scatter(axes[0], points, np.array([tasks[i] for i in record["picture"]["task"]]), tasks)
        slots = np.array(record["picture"]["slot"])
        plots.scatter(axes[1], points, slots, sorted(set(slots.tolist())))
        for panel, what in zip(axes, ("true task", "global cluster"), strict=True):
            panel.set(title=f"{record['set']}: {what}", xticks=[], yticks=[])
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    arguments = tyro.cli(Clustering, prog="python -m experiments.clustering")
    sys.exit(guarded(lambda: main(arguments)))
