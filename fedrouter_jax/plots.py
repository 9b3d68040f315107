"""Pictures of runs, from run directories alone.

Colours are Okabe and Ito's, safe for colour-blind readers, and three more. Figures are made without pyplot, so that no
display and no global state is needed: saving one draws it with Agg.
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

from fedrouter_jax import routing
from fedrouter_jax.errors import UserError
from fedrouter_jax.files import guarded
from fedrouter_jax.records import PARTS, Row, Run, latest, names, scores, tasks_of

PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#000000", "#8B4513", "#9ACD32",
)  # fmt: skip
GREY, MARKERS, DASHES = "#8C8C8C", "osD^vPX*", ("-", "--", ":", "-.")
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
T_SNE_ROWS = 3000


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
            if curves(rows) or tasks_of(rows, 0):
                drawn["rouge"] = (
                    over_rounds(rows, "rouge1", "ROUGE-1 F1, mean over clients") if curves(rows) else task_bars(rows)
                )
            if curves(rows) and any(scores(row, part, "loss", "mean") for row in rows for part in range(2)):
                drawn["test_loss"] = over_rounds(rows, "loss", "loss of references (nats a token)")
            if len(runs) > 1:
                drawn["scores"] = score_bars(rows)
        if len(runs) == 1 and runs[0].clusters and runs[0].clusters["clustered"]:
            drawn["clusters"] = clusters(runs[0])
            if (runs[0].path / "embeddings.npy").exists():
                drawn["embedding"] = embedding(runs[0])
        paths = [to / f"{name}.png" for name in drawn]
        for path, figure in zip(paths, drawn.values(), strict=True):
            with guarded(path):
                to.mkdir(parents=True, exist_ok=True)
                figure.savefig(path)
    return paths


def look(place: int) -> dict:
    """Colour and dash of the n-th line; they repeat after 40."""
    return {"color": PALETTE[place % len(PALETTE)], "linestyle": DASHES[place // len(PALETTE) % len(DASHES)]}


def loss(rows: Sequence[Row]) -> Figure:
    """Mean loss over rounds, a line for each run; behind a single run, each client's local clusters."""
    figure = Figure((7, 4))
    axes = figure.subplots()
    if len(rows) == len(rows[0].runs) == 1:
        lanes: dict[tuple[int, int], list] = {}
        for record in rows[0].runs[0].rounds:
            for lane in record["lanes"]:
                mean = np.mean(np.array(lane["loss"], float))  # None, which was not finite, is drawn as a gap
                lanes.setdefault((lane["client"], lane["cluster"]), []).append((record["round"], mean))
        for number, points in enumerate(lanes.values()):
            label = "one client, one local cluster" if number == 0 else None
            axes.plot(*zip(*points, strict=True), color=GREY, alpha=0.5, linewidth=0.7, marker=".", markersize=3,
                      label=label)  # fmt: skip
    for place, (row, name) in enumerate(zip(rows, names(rows), strict=True)):
        for number, run in enumerate(run for run in row.runs if run.rounds):
            points = np.array([(record["round"], record["loss"]) for record in run.rounds], float)
            label = name if number == 0 else None
            axes.plot(*points.T, **look(place), linewidth=1.6, marker="o", markersize=3, label=label)
    rounds_axis(axes)
    axes.set(ylabel="cross-entropy per response token (nats)", title="Training loss, mean over a round")
    axes.grid(axis="y")
    legend(figure, axes)
    return figure


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
    """A score over the rounds it was taken after, a line for each run; the base model's as level lines."""
    trained, base = [row for row in rows if not row.base], [row for row in rows if row.base]
    figure = Figure((9, 4))
    panels = figure.subplots(1, 2, sharey=True)
    for part, axes in enumerate(panels):
        for place, (row, name) in enumerate(zip(trained, names(trained), strict=True)):
            for number, run in enumerate(row.runs):
                taken = {record["round"]: record["scores"] for record in run.rounds if "scores" in record}
                found, at = latest(run)
                taken |= {at: found} if found else {}
                known = [(t, found[PARTS[part]]) for t, found in sorted(taken.items()) if metric in found[PARTS[part]]]
                points = [(t, found[metric]["mean"]) for t, found in known]
                if points:
                    label = name if number == 0 else None
                    axes.plot(
                        *zip(*points, strict=True), **look(place), marker="o", markersize=4, label=label, clip_on=False
                    )
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


def colours(rows: Sequence[Row]) -> list[str]:
    """Greys for base models, then the palette in the order of the other plots."""
    trained = [id(row) for row in rows if not row.base]
    return [GREY if row.base else look(trained.index(id(row)))["color"] for row in rows]


def task_bars(rows: Sequence[Row]) -> Figure:
    """ROUGE-1 of each task: grouped bars, one panel for each part."""
    tasks = [tasks_of(rows, part) for part in range(2)]
    width = 0.8 / len(rows)
    inches = min(24.0, max(6.0, 1.5 + 0.22 * max(map(len, tasks)) * (len(rows) + 1)))
    figure = Figure((inches, 6.4))
    panels = figure.subplots(2, 1, sharey=True)
    for part, axes in enumerate(panels):
        for place, (row, name, colour) in enumerate(zip(rows, names(rows), colours(rows), strict=True)):
            found = [spread_of(scores(row, part, "rouge1", "per_task", task)) for task in tasks[part]]
            x = np.arange(len(found)) + (place - (len(rows) - 1) / 2) * width
            mean, deviation = np.array(found).reshape(-1, 2).T
            axes.bar(x, mean, 0.92 * width, yerr=deviation, color=colour, capsize=2, label=name)
        axes.set_xticks(range(len(tasks[part])), tasks[part])
        axes.set(title=TITLES[part], ylabel="ROUGE-1 F1")
        axes.grid(axis="y")
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
        for place, (row, colour) in enumerate(zip(rows, colours(rows), strict=True)):
            found = scores(row, part, "rouge1", "mean")
            mean, deviation = spread_of(found)
            axes.barh(place, mean, 0.7, xerr=deviation, color=colour, capsize=3)
            if len(found) > 1:
                axes.scatter(found, [place] * len(found), s=14, color="white", edgecolor="black", zorder=3)
        axes.set(title=TITLES[part], xlabel="ROUGE-1 F1, mean over clients")
        axes.grid(axis="x")
    panels[0].set_yticks(range(len(rows)), names(rows))
    panels[0].invert_yaxis()
    explain(figure, rows, "Bars: mean over seeds; whiskers: standard deviation; dots: each seed")
    return figure


def clusters(run: Run) -> Figure:
    """Training rows by true task and global cluster, and by each client's local cluster and true task."""
    found = run.clusters
    tasks, total = found["tasks"], found["clusters"]
    order = sorted(range(total), key=lambda slot: ["", *tasks].index(found["slot_tasks"][slot]))
    counts = np.zeros((len(tasks), total), int)
    local: dict[tuple[int, int], np.ndarray] = {}
    founders = len(found["clients"]) - run.config.data.newcomers
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
    right.set(xlabel="true task", ylabel="client, local cluster \u2192 global cluster")
    right.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", rotation_mode="anchor")
    names = [f"{client}, {here} \u2192 {found['table'][client][here]}" for client, here in held]
    step = -(-len(held) // 80)
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
    true = np.array([task for client in clients for task in client["tasks"]])
    slots = np.array([slot for client in clients for slot in client["global"]])
    owners = np.array([client["client"] for client in clients for _ in client["rows"]])
    colourings = {
        "true task": (true, tasks),
        "global cluster": (slots, by_task(slots, true, tasks)),
        "client": (owners, np.unique(owners)),
    }
    figure = Figure((13, 5))
    panels = figure.subplots(1, 3)
    for (name, (labels, kinds)), axes in zip(colourings.items(), panels, strict=True):
        scatter(axes, points, labels, kinds)
        axes.set(title=f"Colour: {name}", xticks=[], yticks=[], xlabel=f"{method} 1")
    panels[0].set_ylabel(f"{method} 2")
    figure.suptitle(f"Embeddings of {len(points)} training rows, {method} ({run.clusters['recipe']} recipe)")
    return figure


def by_task(labels: np.ndarray, true: np.ndarray, tasks: Sequence[str]) -> list[int]:
    """The clusters among rows' labels, those first that match the tasks best, in the order of the tasks."""
    from scipy.optimize import linear_sum_assignment  # here, for it takes a third of a second

    clusters = np.unique(labels)
    shared = np.array([[np.sum((true == task) & (labels == cluster)) for cluster in clusters] for task in tasks])
    best = linear_sum_assignment(shared, maximize=True)[1].tolist()
    return clusters[[*best, *sorted(set(range(len(clusters))) - set(best))]].tolist()


def embedded(run: Run) -> np.ndarray:
    """The training rows as they were clustered, float [row, width]; raises `UserError` for an odd file."""
    path, clients = run.path / "embeddings.npy", run.clusters["clients"]
    ends = np.cumsum([len(client["rows"]) for client in clients])
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a NumPy array ({error}); delete the file and resume the run") from None
    if rows.ndim != 2 or len(rows) < ends[-1] or not np.isfinite(rows).all():
        raise UserError(
            f"{path}: an array of shape {rows.shape}, expected at least {ends[-1]} rows of finite numbers; delete it "
            "and resume the run"
        )
    rows = rows[: ends[-1]]
    if not routing.RECIPES[run.config.cluster.recipe].standardise:
        return rows
    founders = np.split(rows, ends[:-1])[: len(clients) - run.config.data.newcomers]
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


def scatter(axes: Axes, points: np.ndarray, labels: np.ndarray, kinds: Sequence) -> None:
    """Points by kind: a colour and a marker each, or a colour scale where there are more kinds than those."""
    if len(kinds) > 2 * len(PALETTE):
        numbers = np.searchsorted(np.sort(kinds), labels)
        drawn = axes.scatter(*points.T, c=numbers, s=9, cmap="viridis")
        axes.figure.colorbar(drawn, ax=axes, location="bottom", label="number", shrink=0.7)
        return
    for place, kind in enumerate(kinds):
        colour, marker = PALETTE[place % len(PALETTE)], MARKERS[(place // len(PALETTE) + place) % len(MARKERS)]
        shown = str(kind).lstrip("_") or "no task"  # a label that begins with _ is hidden
        axes.scatter(*points[labels == kind].T, color=colour, marker=marker, s=14, linewidth=0, alpha=0.8, label=shown)
    columns = max(1, min(len(kinds), 64 // (max(len(str(kind)) for kind in kinds) + 5)))
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=columns, handletextpad=0.1, columnspacing=1.0, fontsize=8
    )
