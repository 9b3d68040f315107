"""Plots of run directories written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import written_runs
from matplotlib import image
from matplotlib.figure import Figure
from written_runs import CLIENTS, CONFIG, ROWS, TASKS, WIDTH, make_run

from fedrouter_jax import plots, records, report, routing
from fedrouter_jax.config import EvaluationConfig
from fedrouter_jax.errors import UserError


def check_picture(path: Path) -> None:
    """A PNG that decodes, of a size to be read, and not blank."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)
    assert 300 < pixels.shape[0] < 4000 and 500 < pixels.shape[1] < 4000
    assert 0.01 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.9


def test_the_plot_of_losses_shows_them_and_a_gap_where_one_is_missing(tmp_path):
    path = make_run(tmp_path / "one", strategy="fedit")
    rounds = [json.loads(line) for line in (path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    rounds[1]["lanes"][2]["loss"][0] = None
    (path / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rounds), encoding="utf-8")
    figure = plots.loss([row for row in records.rows_of(records.read_all([path])) if not row.base])
    *lanes, mean = figure.axes[0].lines
    np.testing.assert_array_equal(mean.get_xydata(), [(record["round"], record["loss"]) for record in rounds])
    drawn = {(int(t), y) for line in lanes for t, y in line.get_xydata() if np.isfinite(y)}
    held = {(r["round"], np.mean(lane["loss"])) for r in rounds for lane in r["lanes"] if None not in lane["loss"]}
    assert drawn == held and len(held) == 3 * CLIENTS - 1


def test_plots_of_one_run_and_of_several(tmp_path):
    taken = EvaluationConfig(evaluate_at=(1,))
    one = make_run(tmp_path / "one", taken_at=(1,), evaluation=taken)
    report.write([one], one)
    assert {p.name for p in (one / "plots").iterdir()} == {
        "loss.png",
        "rouge.png",
        "test_loss.png",
        "clusters.png",
        "embedding.png",
    }
    several = [
        one,
        make_run(tmp_path / "two", strategy="fedit"),
        make_run(tmp_path / "three", strategy="fedit", seed=1),
    ]
    report.write(several, tmp_path / "all")
    assert {p.name for p in (tmp_path / "all/plots").iterdir()} == {
        "loss.png",
        "rouge.png",
        "test_loss.png",
        "scores.png",
    }
    report.write(several[1:], tmp_path / "bars")  # no intermediate scores: bars of each task
    for picture in tmp_path.glob("**/*.png"):
        check_picture(picture)


@pytest.mark.filterwarnings("error")
def test_tasks_may_be_named_in_any_script(tmp_path, monkeypatch, caplog):
    """A report says nothing of glyphs or fonts that are missing."""
    monkeypatch.setattr(written_runs, "TASKS", ["\u6458\u8981", "\u0938\u093e\u0930", "sort"])
    path = make_run(tmp_path / "one", strategy="fedit")
    report.write([path], path)
    assert (path / "plots" / "rouge.png").exists() and not caplog.records


def test_clusters_plot_shows_the_counts(tmp_path):
    run = records.read(make_run(tmp_path / "one"))
    left, right = plots.clusters(run).axes
    counts = np.asarray(left.images[0].get_array())
    assert counts.sum() == CLIENTS * ROWS and counts.tolist() == np.diag([18, 18, 12]).tolist()
    assert np.asarray(right.images[0].get_array()).shape == (2 * CLIENTS, len(TASKS))
    assert [label.get_text() for label in right.get_yticklabels()][:2] == ["0, 0 → 0", "0, 1 → 1"]


@pytest.mark.parametrize("newcomers", [0, 1])
def test_embeddings_are_drawn_as_they_were_clustered(newcomers, tmp_path):
    """Against the router's own preparation; test rows, at the end, and clients that joined have no part in it."""
    data = replace(CONFIG.data, newcomers=newcomers)
    run = records.read(make_run(tmp_path / "one", data=data))
    raw = np.load(run.path / "embeddings.npy")[: CLIENTS * ROWS]
    trained = raw[: (CLIENTS - newcomers) * ROWS]
    router = routing.Router(np.zeros((0, WIDTH)), trained.mean(axis=0), trained.std(axis=0), np.asarray(True))
    np.testing.assert_allclose(plots.embedded(run), routing.prepare(router, raw), atol=1e-5)
    counts = np.asarray(plots.clusters(run).axes[0].images[0].get_array())
    assert counts.sum() == len(trained)  # whom the accuracy in the title is of
    for odd in (np.float32(1.0), np.full_like(raw, np.nan)):
        np.save(run.path / "embeddings.npy", odd)
        with pytest.raises(UserError, match="rows of finite numbers; delete it"):
            plots.embedded(run)
    paper = make_run(tmp_path / "paper", cluster=replace(CONFIG.cluster, recipe="paper"))
    np.testing.assert_array_equal(
        plots.embedded(records.read(paper)), np.load(paper / "embeddings.npy")[: CLIENTS * ROWS]
    )


def test_a_cluster_has_the_colour_of_its_task():
    true = np.array(["a", "a", "a", "b", "b", "c", "c", "c"])
    clusters = np.array([7, 7, 5, 5, 5, 3, 3, 9])
    assert plots.by_task(clusters, true, ["a", "b", "c"]) == [7, 5, 3, 9]
    assert plots.by_task(clusters[:5], true[:5], ["a", "b", "c"]) == [7, 5]  # fewer clusters than tasks


@pytest.mark.filterwarnings("error")
def test_rows_without_a_task_have_a_name_in_the_legend():
    axes = Figure().subplots()
    plots.scatter(axes, np.zeros((2, 2)), np.array(["", ""]), [""])
    assert axes.get_legend().get_texts()[0].get_text() == "no task"


def test_projection_keeps_groups_apart():
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1], 20)
    points, method = plots.project(rng.normal(size=(40, 8)) + 20 * groups[:, None])
    assert method == "t-SNE" and points.shape == (40, 2)
    centres = np.array([points[groups == g].mean(axis=0) for g in (0, 1)])
    nearest = np.linalg.norm(points[:, None] - centres, axis=-1).argmin(axis=1)
    assert (nearest == groups).all()
    assert plots.project(np.ones((1, 3)))[0].shape == (1, 2)
    assert plots.project(np.ones((40, 3)))[0].shape == (40, 2)
