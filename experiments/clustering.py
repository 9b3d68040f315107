"""Do clusters find the tasks? Accuracy and chosen k by recipe, layer, restarts and rows. No training.

    python -m experiments.clustering --data ../shared/data            tables and figures in docs/results/clustering/
    python -m experiments.clustering --data ... --model M --recipes paper shallow refined     another base model
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
from typing import Literal

import jax
import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score

from experiments.clustering_figures import FEW, draw, read
from experiments.measurements import show_markdown
from experiments.sweep import at_least_one
from fedrouter_jax import cluster_plots, clusters, embed, files, routing
from fedrouter_jax.data import sources, synthetic, tokens
from fedrouter_jax.data.rows import Dataset, Row, digest
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import Model, load_model
from fedrouter_jax.models.load import DEFAULT
from fedrouter_jax.terminal import guarded, parse, progress

FLAN4 = ("gigaword", "glue_qqp", "samsum", "web_nlg_en")  # the paper's four tasks, with QQP for BoolQ
MOST = 13  # the largest k the silhouette may choose
DEPTHS = {"1/3": 1 / 3, "1/2": 1 / 2, "2/3": 2 / 3, "5/6": 5 / 6, "last": None}  # shares of the layers; shallow: 1/6
REFINED = routing.RECIPES["refined"]
# Steps from the paper's recipe to ours, each a row of the tables, and what other depths and the first token would do.
SHALLOW = routing.Recipe(depth=1 / 6, standardise=True, restarts=20)
RECIPES = {
    "paper": routing.RECIPES["paper"],
    "paper, 20 starts": routing.RECIPES["paper"]._replace(restarts=20),
    "shallow": SHALLOW,
    "shallow, 1 start": SHALLOW._replace(restarts=1),
    **{f"depth {name}": SHALLOW._replace(depth=depth) for name, depth in DEPTHS.items()},
    "refined": REFINED,
    **{f"refined, {name} of the layers": REFINED._replace(depth=DEPTHS[name]) for name in ("1/2", "5/6")},
    "refined, first token kept": REFINED._replace(skip=0),
    **{
        f"refined, first token kept, {name} of the layers": REFINED._replace(depth=DEPTHS[name], skip=0)
        for name in ("1/2", "5/6")
    },
}
SEARCHED = ("paper", "shallow", "refined", "refined, first token kept")  # also find k, and are tried on few rows


@dataclass(frozen=True)
class Clustering:
    """Clusters against tasks."""

    data: Path = Path("data")
    """Folder that holds flan4/ and flan8/."""
    model: str = DEFAULT
    """The base model, as for `fedrouter run`."""
    recipes: tuple[Literal[tuple(RECIPES)], ...] = tuple(RECIPES)
    """Recipes, "refined" among them, which the figures are of; to choose a depth on five drawn tasks takes all."""
    rows: int = 96
    """Training rows of each task."""
    clients: int = 8
    """Clients that hold all tasks."""
    seeds: int = 5
    """Seeds 0 .. N-1."""
    out: Path | None = None
    """Folder for results and figures; by default docs/results/clustering, -MODEL after it where another model is given,
    or runs/smoke/clustering with --smoke."""
    smoke: bool = False
    """The tiny model on 24 synthetic rows a task, two clients, one seed, whatever else is said."""
    redraw: bool = False
    """Only draw table and figures from the clustering.json in --out."""


def main(options: Clustering) -> None:
    """Embed once by each recipe's layer, cluster for every seed, write results and draw them."""
    at_least_one(rows=options.rows, clients=options.clients, seeds=options.seeds)
    if "refined" not in options.recipes:
        raise UserError("--recipes lacks 'refined', which the figures are of; name it too")
    if options.smoke:
        options = replace(options, model="tiny", rows=24, clients=2, seeds=1)
    suffix = "" if options.model == DEFAULT else f"-{Path(options.model).name.removesuffix('.gguf')}"
    out = options.out or Path("runs/smoke/clustering" if options.smoke else f"docs/results/clustering{suffix}")
    if not options.redraw:
        measure(options, out / "clustering.json")
    elif not (out / "clustering.json").exists():
        raise UserError(f"{out} holds no clustering.json to draw; run without --redraw, or choose another --out")
    draw(out)
    show_markdown(out / "clustering.md")


def measure(options: Clustering, to: Path) -> None:
    """Add what is missing to the records in `to`; they are written after every one."""
    model, rows = load_model(options.model), rows_by_task(options)
    setting = {
        "model": model.base_name,
        "rows_a_task": options.rows,
        "clients": options.clients,
        "device": jax.devices()[0].device_kind,
        "synthetic": options.smoke,
        "data": digest(Dataset(tuple(row for of_task in rows.values() for row in of_task), (), "")),
    }
    found = read(to) or {**setting, "records": []}
    if any(found.get(key, value) != value for key, value in setting.items()):  # older files say nothing of their rows
        raise UserError(f"{to} was measured with other options or rows; choose another --out or remove it")
    jobs = {
        f"{name} {seed}, {recipe}, {few or 'all'} rows": (name, seed, tasks, recipe, few)
        for name, seed, tasks in task_sets(sorted(rows), options.seeds, options.smoke)
        for recipe, few in [*product(RECIPES, [None]), *(product(SEARCHED, FEW) if "five" not in name else ())]
    }
    known = {record["name"] for record in found["records"]}
    order = {name: place for place, name in enumerate(jobs)}  # what was measured beyond these seeds comes last
    whole = set(options.recipes) == set(RECIPES)
    states = cache(partial(embedded, model, rows, Path("runs/clustering")))
    with progress() as track, track("clustering", len(jobs)) as advance:
        before = None
        for job, (name, seed, tasks, recipe, few) in jobs.items():
            if job not in known and recipe in options.recipes and (whole or "five" not in name):
                if name != before:  # programs of other shapes are not needed again, and there are many
                    jax.clear_caches()
                before, by_task = name, states(RECIPES[recipe].depth, RECIPES[recipe].skip)
                find = recipe in SEARCHED and few is None and "five" not in name
                record = cluster({task: by_task[task] for task in tasks}, seed, recipe, options.clients, few, find)
                of = {"name": job, "set": name, "tasks": tasks, "seed": seed, "recipe": recipe, "few": few}
                found["records"].append({**of, **record})
                found["records"].sort(key=lambda record: order.get(record["name"], len(order)))
                files.write(to, json.dumps(rounded(found)) + "\n")
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
    if not (options.smoke or {*FLAN4} <= {*tasks}):
        raise UserError(
            f"{options.data} has the tasks {', '.join(tasks)}; expected flan4/ and flan8/ with {', '.join(FLAN4)} "
            "among them (docs/results.md says where ours come from)"
        )
    return {task: list(islice(dict.fromkeys(row for row in rows if row.task == task), options.rows)) for task in tasks}


def task_sets(tasks: list[str], seeds: int, smoke: bool) -> Iterator[tuple[str, int, list[str]]]:
    """(name, seed, tasks): flan4, flan8, all of them, and five drawn anew for every seed, with the five left out."""
    flan8 = [task for task in tasks if task not in ("gigaword", "samsum")]
    named = {"synthetic": tasks} if smoke else {"flan4": [*FLAN4], "flan8": flan8, "all ten": tasks}
    for name, held in named.items():
        for seed in range(seeds):
            yield name, seed, held
    for seed in range(0 if smoke else seeds):
        five = set(np.random.default_rng([seed, 5]).choice(tasks, 5, replace=False).tolist())
        yield "five drawn", seed, sorted(five)
        yield "the other five", seed, sorted(set(tasks) - five)


def embedded(
    model: Model, rows: dict[str, list[Row]], folder: Path, depth: float | None, skip: int
) -> dict[str, np.ndarray]:
    """Embeddings [row, width] of each task's rows by a share of the layers, kept in a file named by their content."""
    texts = [row.instruction for held in rows.values() for row in held]
    ids = tokens.encode_texts(model.tokenizer, texts, 1024)
    content = hashlib.sha256(json.dumps([model.fingerprint, depth, skip, ids]).encode()).hexdigest()
    path = folder / f"{content[:24]}.npy"
    if not path.exists():
        at_once = 1 if jax.default_backend() == "cpu" else 16
        layers = embed.blocks(model.config, depth)
        with progress() as track, track(f"embedding by {layers} layers", len(ids)) as advance:
            found = embed.embed(model.config, model.params, ids, depth, at_once, advance, skip=skip)
        with files.replaced(path) as beside, beside.open("wb") as file:
            np.save(file, found, allow_pickle=False)
    ends = np.cumsum([len(held) for held in rows.values()])[:-1]
    return dict(zip(rows, np.split(np.load(path, allow_pickle=False), ends), strict=True))


def cluster(
    states: dict[str, np.ndarray], seed: int, recipe: str, clients: int, few: int | None = None, find: bool = False
) -> dict:
    """One enrolment with the counts given, and with `find` another where the silhouette finds them.

    `states` holds the embeddings [row, width] of each task; with `few`, a client gets so many rows of each.
    """
    rng, tasks = np.random.default_rng([seed, 4]), len(states)
    dealt = [rng.permutation(rows)[: None if few is None else few * clients] for rows in states.values()]
    points = [np.concatenate([rows[c::clients] for rows in dealt]) for c in range(clients)]
    labels = [np.repeat(np.arange(tasks), [len(rows[c::clients]) for rows in dealt]) for c in range(clients)]
    key = jax.random.key(seed)
    given = routing.enroll(key, points, RECIPES[recipe], tasks, tasks)
    local, total = clusters.accuracy(given, labels, tasks)
    record = {"local": local, "global": total}
    if find:
        found = routing.enroll(key, points, RECIPES[recipe], None, None, MOST)
        record |= {
            "found_local": [int(row.max()) + 1 for row in found.labels],
            "found_global": found.clusters,
            "found_accuracy": clusters.accuracy(found, labels, tasks)[1],
            "silhouettes": found.silhouettes,
            "others": other_scores(given.router, points, given.labels),
        }
        if seed == 0 and recipe == "refined":
            flat = np.concatenate(points)
            picture, method = cluster_plots.project(np.asarray(routing.prepare(given.router, flat)))
            slots = [int(given.table[c, k]) for c, row in enumerate(given.labels) for k in row[: len(labels[c])]]
            record["picture"] = {
                "method": method,
                "points": np.round(picture.astype(float), 1).tolist(),
                "task": np.concatenate(labels).tolist(),
                "slot": slots,
                "first client": [int(k) for k in given.labels[0][: len(labels[0])]],  # local clusters of the first rows
            }
    return record


def other_scores(router: routing.Router, points: list[np.ndarray], labels: np.ndarray) -> dict[str, dict]:
    """Two scores against k from scikit-learn: of the first client's rows, and of all clients' centres."""
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


if __name__ == "__main__":
    arguments = parse(Clustering, prog="python -m experiments.clustering")
    sys.exit(guarded(lambda: main(arguments)))
