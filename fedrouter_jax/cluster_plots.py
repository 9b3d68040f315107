"""Pictures of a run's clusters: how many rows of each task lie in each, and the embedded rows in two dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedrouter_jax import routing
from fedrouter_jax.errors import UserError, one_line
from fedrouter_jax.formats import Clusters
from fedrouter_jax.palette import GREY, MARKERS, PALETTE
from fedrouter_jax.records import Run

T_SNE_ROWS = 3000
Kinds = Mapping[Any, tuple[int, str]]  # the place of a kind's colour and marker, and its name in the legend


def clusters(run: Run) -> Figure:
    """Training rows by true task and global cluster, and by each client's local cluster and true task."""
    found = run.clusters
    tasks, total = found["tasks"], found["clusters"]
    order = sorted(range(total), key=lambda slot: ["", *tasks].index(found["slot_tasks"][slot]))
    counts = np.zeros((len(tasks), total), int)
    local: dict[tuple[int, int], np.ndarray] = {}
    founders = run.config.data.founders
    for client in found["clients"]:
        for task, here, slot in zip(client["tasks"], client["local"], client["global"], strict=True):
            counts[tasks.index(task), slot] += client["client"] < founders
            local.setdefault((client["client"], here), np.zeros(len(tasks), int))[tasks.index(task)] += 1
    held = sorted(local)
    size = (4 + 0.55 * (len(tasks) + total), min(20.0, 1.6 + max(0.5 * len(tasks), 0.24 * len(held))))
    ratios = [max(total, 2), max(len(tasks), 2)]
    figure = Figure(size)
    (left, right) = figure.subplots(1, 2, width_ratios=ratios)
    who = "Clients that train" if run.config.data.newcomers else "All clients"
    right_share = {level: f": accuracy {share:.1%}" for level, share in (found["accuracy"] or {}).items()}
    heat(left, counts[:, order], who + right_share.get("global", ""))
    left.set(xlabel="global cluster", ylabel="true task")
    left.set_xticks(range(total), order)
    left.set_yticks(range(len(tasks)), tasks)
    heat(right, np.array([local[place] for place in held]), "Each client" + right_share.get("local", ""))
    right.set(xlabel="true task", ylabel="local cluster \u2192 global cluster")
    right.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", rotation_mode="anchor")
    step = -(-len(held) // 80)
    first = {place for place, (client, _) in enumerate(held) if step > 1 or place == 0 or held[place - 1][0] != client}
    names = [
        f"client {client}, " * (place in first) + f"cluster {here} \u2192 {found['table'][client][here]}"
        for place, (client, here) in enumerate(held)
    ]
    right.set_yticks(range(0, len(held), step), names[::step])
    for place in range(1, len(held)):
        if held[place][0] != held[place - 1][0]:
            right.axhline(place - 0.5, color="black", linewidth=0.6)
    figure.suptitle("Training rows in clusters")
    return figure


def heat(axes: Axes, counts: np.ndarray, title: str) -> None:
    """A heat map with its numbers, where there is room for them."""
    axes.imshow(counts, cmap="Blues", aspect="auto", vmin=0, interpolation="nearest")
    axes.set_title(title)
    axes.tick_params(length=0)
    if counts.shape[0] <= 80:
        for (i, j), count in np.ndenumerate(counts):
            colour = "white" if count > 0.6 * counts.max() else "black" if count else GREY
            axes.text(j, i, count, ha="center", va="center", color=colour, fontsize=8)


def embedding(run: Run) -> Figure:
    """Embeddings of the training rows in two dimensions, three times: by true task, global cluster and client."""
    points, method = project(embedded(run))
    tasks, clients = run.clusters["tasks"], run.clusters["clients"]
    true, slots = of_rows(run.clusters)
    owners = np.array([client["client"] for client in clients for _ in client["rows"]])
    colourings = {
        "true task": (true, in_order(tasks)),
        "global cluster": (slots, by_task(slots, true, tasks)),
        "client": (owners, in_order(np.unique(owners))),
    }
    figure = Figure((13, 5))
    panels = figure.subplots(1, 3)
    for (name, (labels, kinds)), axes in zip(colourings.items(), panels, strict=True):
        scatter(axes, points, labels, kinds)
        axes.set(title=f"Colour: {name}", xticks=[], yticks=[], xlabel=f"{method} 1")
    panels[0].set_ylabel(f"{method} 2")
    figure.suptitle(f"Embeddings of {len(points)} training rows, {method} ({run.clusters['recipe']} recipe)")
    return figure


def of_rows(found: Clusters) -> tuple[np.ndarray, np.ndarray]:
    """The task and the global cluster of each training row, [row]."""
    clients = found["clients"]
    tasks, slots = ([kind for client in clients for kind in client[name]] for name in ("tasks", "global"))
    return np.array(tasks), np.array(slots)


def in_order(kinds: Sequence) -> Kinds:
    """Kinds as `scatter` takes them, under their own names."""
    return {kind: (place, str(kind)) for place, kind in enumerate(kinds)}


def by_task(labels: np.ndarray, true: np.ndarray, tasks: Sequence[str]) -> Kinds:
    """The clusters among rows' labels: those that match a task best have its place and name, others come behind."""
    from scipy.optimize import linear_sum_assignment  # here, for it takes a third of a second

    clusters = np.unique(labels).tolist()
    shared = np.array([[np.sum((true == task) & (labels == cluster)) for cluster in clusters] for task in tasks])
    pairs = zip(*(places.tolist() for places in linear_sum_assignment(shared, maximize=True)), strict=True)
    found = {clusters[which]: task for task, which in pairs if shared[task, which]}
    rest = [cluster for cluster in clusters if cluster not in found]
    named = {cluster: f"{cluster} ({tasks[task]})" if tasks[task] else str(cluster) for cluster, task in found.items()}
    return {cluster: (found[cluster], name) for cluster, name in named.items()} | {
        cluster: (len(tasks) + place, str(cluster)) for place, cluster in enumerate(rest)
    }


def embedded(run: Run) -> np.ndarray:
    """The training rows as they were clustered, float [row, width]; raises `UserError` for an odd file."""
    path, clients = run.path / "embeddings.npy", run.clusters["clients"]
    ends = np.cumsum([len(client["rows"]) for client in clients])
    try:
        rows = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy reads headers as Python, and raises what that does
        raise UserError(f"{path}: not a NumPy array ({one_line(error)}); delete the file and resume the run") from None
    if rows.ndim != 2 or len(rows) < ends[-1] or not np.isfinite(rows).all():
        raise UserError(
            f"{path}: an array of shape {rows.shape}, expected at least {ends[-1]} rows of finite numbers; delete it "
            "and resume the run"
        )
    rows = rows[: ends[-1]]
    if not routing.RECIPES[run.config.cluster.recipe].standardise:
        return rows
    founders = np.split(rows, ends[:-1])[: run.config.data.founders]
    router = routing.Router(np.zeros((0, rows.shape[1])), *routing.statistics(founders), np.asarray(True))
    return np.asarray(routing.prepare(router, rows))


def project(rows: np.ndarray) -> tuple[np.ndarray, str]:
    """Rows in two dimensions, and the name of the method: t-SNE, or PCA where there are too many rows or too few."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(rows) < 3 or not np.ptp(rows, axis=0).any():  # of equal rows PCA divides by zero, and t-SNE crashes
        return np.pad(rows, [(0, 0), (0, 2)])[:, :2], "dimension"
    reduced = PCA(min(50, *rows.shape), random_state=0).fit_transform(rows)
    if 10 <= len(rows) <= T_SNE_ROWS:
        perplexity = min(30.0, (len(rows) - 1) / 3)
        with threadpool_limits(1):  # its threads wait by spinning: ten times slower where cores are shared
            return TSNE(perplexity=perplexity, max_iter=500, random_state=0).fit_transform(reduced), "t-SNE"
    return np.pad(reduced, [(0, 0), (0, 2)])[:, :2], "PCA"


def scatter(axes: Axes, points: np.ndarray, labels: np.ndarray, kinds: Kinds) -> None:
    """Points by kind: a colour and a marker each, or a colour scale where there are more kinds than those."""
    if len(kinds) > 2 * len(PALETTE):
        numbers = np.searchsorted(np.sort([*kinds]), labels)
        drawn = axes.scatter(*points.T, c=numbers, s=9, cmap="viridis")
        axes.figure.colorbar(drawn, ax=axes, location="bottom", label="number", shrink=0.7)
        return
    for kind, (place, name) in kinds.items():
        colour, marker = PALETTE[place % len(PALETTE)], MARKERS[(place // len(PALETTE) + place) % len(MARKERS)]
        shown = name.lstrip("_") or "no task"  # a label that begins with _ is hidden
        axes.scatter(*points[labels == kind].T, color=colour, marker=marker, s=14, linewidth=0, alpha=0.8, label=shown)
    columns = max(1, min(len(kinds), 72 // (max(len(name) for _, name in kinds.values()) + 5)))
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=columns, handletextpad=0.1, columnspacing=1.0, fontsize=8
    )
