"""Plots of run directories written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import written_runs
from documents import RESULTS
from matplotlib import image
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from written_runs import CLIENTS, CONFIG, ROWS, TASKS, WIDTH, make_run

from fedrouter_jax import cluster_plots, plots, records, report, routing
from fedrouter_jax.config import EvaluationConfig
from fedrouter_jax.errors import UserError
from fedrouter_jax.palette import PALETTE


def check_picture(path: Path) -> None:
    """A PNG that decodes, of a size to be read, and not blank."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)
    assert 300 < pixels.shape[0] < 4000 and 500 < pixels.shape[1] < 4000
    assert 0.01 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.9


def test_a_clusters_colour_is_that_of_its_task_in_all_pictures_of_a_run(tmp_path):
    """Whatever its number: of the losses as of the embedded rows."""
    path = make_run(tmp_path / "one", strategy="fedrouter")
    found, moved = json.loads((path / "clusters.json").read_text(encoding="utf-8")), [2, 0, 1]
    found["table"] = [[moved[slot] for slot in row] for row in found["table"]]
    found["slot_tasks"] = [TASKS[moved.index(slot)] for slot in range(3)]
    for client in found["clients"]:
        client["global"] = [moved[slot] for slot in client["global"]]
    (path / "clusters.json").write_text(json.dumps(found), encoding="utf-8")
    *lanes, _ = plots.loss(trained([path])).axes[0].lines
    colours = {line.get_label(): line.get_color() for line in lanes}
    assert colours == {f"cluster {moved[n]} ({task})": PALETTE[n] for n, task in enumerate(TASKS)}


def trained(paths: list[Path]) -> list[records.Row]:
    """The rows of runs without their base model."""
    return [row for row in records.rows_of(records.read_all(paths)) if not row.base]


@pytest.mark.parametrize("strategy", ["fedit", "fedrouter"])
def test_the_plot_of_losses_of_a_run_has_a_dot_for_each_that_trained_in_the_colour_of_its_cluster(strategy, tmp_path):
    """And none where a loss is missing; the mean alone is a line."""
    path = make_run(tmp_path / "one", strategy=strategy)
    rounds = [json.loads(line) for line in (path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    rounds[1]["lanes"][2]["loss"][0] = None
    (path / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rounds), encoding="utf-8")
    axes = plots.loss(trained([path])).axes[0]
    *lanes, mean = axes.lines
    np.testing.assert_array_equal(mean.get_xydata(), [(record["round"], record["loss"]) for record in rounds])
    assert mean.get_linestyle() == "-" and {line.get_linestyle() for line in lanes} == {"None"}
    held = {}
    for t, lane in ((record["round"], lane) for record in rounds for lane in record["lanes"]):
        if None in lane["loss"]:
            continue
        slot = (lane["client"] + lane["cluster"]) % 3
        label = f"cluster {slot} ({TASKS[slot]})" if strategy == "fedrouter" else "one client"
        held.setdefault(label, set()).add((t, np.mean(lane["loss"])))
    drawn = {line.get_label(): {(int(t), y) for t, y in line.get_xydata() if np.isfinite(y)} for line in lanes}
    assert drawn == held and sum(map(len, held.values())) == 3 * CLIENTS - 1
    assert len({line.get_color() for line in lanes}) == len(held)
    assert axes.get_title().startswith("Training loss, mean over what a round trained")
    assert ("in turn" in axes.get_title()) == (strategy == "fedrouter")  # FedIT's clients have one cluster
    for count in (0, 2):  # all, and as many as each client has
        rounds = replace(CONFIG.rounds, clusters_per_round=count)
        together = make_run(tmp_path / f"together {count}", rounds=rounds)
        assert "in turn" not in plots.loss(trained([together])).axes[0].get_title()


@pytest.mark.parametrize("told", [2, 1])  # FedLEASE finds more groups than clusters.json, written before, can know of
def test_a_change_of_clusters_on_the_way_changes_the_colour(told, tmp_path):
    path = make_run(tmp_path / "one", strategy="clustered")
    written_runs.change_json(path / "clusters.json", clusters=told, slot_tasks=[""] * told, table=[[0, 0]] * CLIENTS)
    rounds = [json.loads(line) for line in (path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    rounds[1]["table"] = [[1, 1]] * CLIENTS
    (path / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rounds), encoding="utf-8")
    *lanes, _ = plots.loss(trained([path])).axes[0].lines
    found = {line.get_label(): {int(t) for t in line.get_xdata()} for line in lanes}
    assert found == {"cluster 0": {1}, "cluster 1": {2, 3}}


def test_of_several_seeds_the_mean_is_thick_and_each_seed_thin_and_pale(tmp_path):
    taken = {"taken_at": (1, 2), "evaluation": EvaluationConfig(evaluate_at=(1, 2))}
    paths = [make_run(tmp_path / f"{seed}", seed=seed, **taken) for seed in range(3)]
    rows = trained(paths)
    of_seeds = [[record["loss"] for record in run.rounds] for run in rows[0].runs]
    *scored, last = (
        [record["scores"]["generalisation"]["rouge1"]["mean"] for record in run.rounds[:2]]
        + [run.scores["generalisation"]["rouge1"]["mean"]]
        for run in rows[0].runs
    )
    for figure, panel, wanted in (
        (plots.loss(rows), 0, of_seeds),
        (plots.over_rounds(rows, "rouge1", ""), 1, [*scored, last]),
    ):
        *seeds, mean = figure.axes[panel].lines
        np.testing.assert_allclose([line.get_ydata() for line in seeds], wanted)
        np.testing.assert_allclose(mean.get_ydata(), np.mean(wanted, axis=0))
        assert len(seeds) == 3 and mean.get_label() == "fedrouter, 3 seeds"
        assert all(line.get_linewidth() < 1 < 2 < mean.get_linewidth() and line.get_alpha() < 0.5 for line in seeds)
        assert {line.get_color() for line in seeds} == {mean.get_color()}


def test_bars_are_of_the_part_that_their_panel_names(tmp_path):
    path = make_run(tmp_path / "one")
    rows = trained([path, make_run(tmp_path / "two", strategy="fedit")])
    scores = [run.scores for row in rows for run in row.runs]
    for part, name in enumerate(records.PARTS[:2]):
        means, tasks = plots.score_bars(rows).axes[part], plots.task_bars(rows).axes[part]
        assert [bar.get_width() for bar in means.patches] == [of[name]["rouge1"]["mean"] for of in scores]
        by_task = [[bar.get_height() for bar in group] for group in tasks.containers if isinstance(group, BarContainer)]
        assert by_task == [[of[name]["rouge1"]["per_task"][task] for task in sorted(TASKS)] for of in scores]


def test_bars_of_tasks_begin_at_nothing_and_colours_that_come_again_are_hatched(tmp_path):
    names = "fedrouter fedit local fedsa feddpa-t clustered ifca fedex flora ditto oracle".split()
    paths = [make_run(tmp_path / f"{name}-{seed}", strategy=name, seed=seed) for name in names for seed in (0, 1)]
    for axes in plots.task_bars(records.rows_of(records.read_all(paths))).axes:
        bars = {
            group.get_label().split(",")[0]: group[0] for group in axes.containers if isinstance(group, BarContainer)
        }
        assert [name for name, bar in bars.items() if bar.get_hatch()] == ["oracle"]
        assert len({bar.get_facecolor() for bar in bars.values()}) == len(bars) - 1 == 11
        assert min(max(bar.get_facecolor()[:3]) for bar in bars.values()) > 0.2  # none is black: whiskers are
    demo = plots.task_bars(records.rows_of(records.read_all(sorted((RESULTS / "demo").glob("fed*")))))
    for axes in demo.axes:
        whiskers = [group.lines[2][0] for group in axes.containers if not isinstance(group, BarContainer)]
        assert axes.get_ylim()[0] == 0
        assert min(segment.min() for lines in whiskers for segment in lines.get_segments()) < 0 or axes is demo.axes[1]


def test_plots_of_one_run_and_of_several(tmp_path):
    taken = EvaluationConfig(evaluate_at=(1,))
    one = make_run(tmp_path / "one", taken_at=(1,), evaluation=taken)
    several = [one, *(make_run(tmp_path / f"two-{seed}", strategy="fedit", seed=seed) for seed in (0, 1))]
    curves = {"loss.png", "tasks.png", "rouge.png", "test_loss.png"}
    for to, runs, names in (
        (one, [one], curves | {"clusters.png", "embedding.png"}),
        (tmp_path / "all", several, curves | {"scores.png"}),
        (tmp_path / "bars", several[1:], {"loss.png", "tasks.png", "scores.png"}),  # no scores on the way
    ):
        report.write(runs, to)
        assert {picture.name for picture in (to / "plots").iterdir()} == names
    for picture in tmp_path.glob("**/*.png"):
        check_picture(picture)


@pytest.mark.filterwarnings("error")
def test_tasks_may_be_named_in_any_script(tmp_path, monkeypatch, caplog):
    """A report says nothing of glyphs or fonts that are missing."""
    monkeypatch.setattr(written_runs, "TASKS", ["\u6458\u8981", "\u0938\u093e\u0930", "sort"])
    path = make_run(tmp_path / "one", strategy="fedit")
    report.write([path], path)
    assert (path / "plots" / "tasks.png").exists() and not caplog.records


def test_clusters_plot_shows_the_counts(tmp_path):
    run = records.read(make_run(tmp_path / "one"))
    left, right = cluster_plots.clusters(run).axes
    counts = np.asarray(left.images[0].get_array())
    assert counts.sum() == CLIENTS * ROWS and counts.tolist() == np.diag([18, 18, 12]).tolist()
    assert np.asarray(right.images[0].get_array()).shape == (2 * CLIENTS, len(TASKS))
    assert [label.get_text() for label in right.get_yticklabels()][:3] == [
        "client 0, cluster 0 → 0",
        "cluster 1 → 1",
        "client 1, cluster 0 → 1",
    ]


@pytest.mark.parametrize("newcomers", [0, 1])
def test_embeddings_are_drawn_as_they_were_clustered(newcomers, tmp_path):
    """Against the router's own preparation; test rows, at the end, and clients that joined have no part in it."""
    data = replace(CONFIG.data, newcomers=newcomers)
    run = records.read(make_run(tmp_path / "one", data=data))
    raw = np.load(run.path / "embeddings.npy")[: CLIENTS * ROWS]
    trained = raw[: (CLIENTS - newcomers) * ROWS]
    router = routing.Router(np.zeros((0, WIDTH)), trained.mean(axis=0), trained.std(axis=0), np.asarray(True))
    np.testing.assert_allclose(cluster_plots.embedded(run), routing.prepare(router, raw), atol=1e-5)
    counts = np.asarray(cluster_plots.clusters(run).axes[0].images[0].get_array())
    assert counts.sum() == len(trained)  # whom the accuracy in the title is of
    for odd in (np.float32(1.0), np.full_like(raw, np.nan)):
        np.save(run.path / "embeddings.npy", odd)
        with pytest.raises(UserError, match="rows of finite numbers; delete it"):
            cluster_plots.embedded(run)
    paper = make_run(tmp_path / "paper", cluster=replace(CONFIG.cluster, recipe="paper"))
    np.testing.assert_array_equal(
        cluster_plots.embedded(records.read(paper)), np.load(paper / "embeddings.npy")[: CLIENTS * ROWS]
    )


def test_a_cluster_has_the_colour_and_the_name_of_its_task():
    true = np.array(["a", "a", "a", "b", "b", "c", "c", "c"])
    clusters = np.array([7, 7, 5, 5, 5, 3, 3, 9])
    found = {7: (0, "7 (a)"), 5: (1, "5 (b)"), 3: (2, "3 (c)")}
    assert cluster_plots.by_task(clusters, true, ["a", "b", "c"]) == found | {9: (3, "9")}
    del found[7]
    assert cluster_plots.by_task(clusters[3:7], true[3:7], ["a", "b", "c"]) == found  # fewer clusters than tasks
    assert cluster_plots.by_task(clusters[:2], np.array(["", ""]), [""]) == {7: (0, "7")}


@pytest.mark.filterwarnings("error")
def test_rows_without_a_task_have_a_name_in_the_legend():
    axes = Figure().subplots()
    cluster_plots.scatter(axes, np.zeros((2, 2)), np.array(["", ""]), cluster_plots.in_order([""]))
    assert axes.get_legend().get_texts()[0].get_text() == "no task"


def test_projection_keeps_groups_apart():
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1], 20)
    points, method = cluster_plots.project(rng.normal(size=(40, 8)) + 20 * groups[:, None])
    assert method == "t-SNE" and points.shape == (40, 2)
    centres = np.array([points[groups == g].mean(axis=0) for g in (0, 1)])
    nearest = np.linalg.norm(points[:, None] - centres, axis=-1).argmin(axis=1)
    assert (nearest == groups).all()
    assert cluster_plots.project(np.ones((1, 3)))[0].shape == (1, 2)
    assert cluster_plots.project(np.ones((40, 3)))[0].shape == (40, 2)
