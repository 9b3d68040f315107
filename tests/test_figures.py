"""Figures of clusters and speed show what the tables beside them say; all figures are to be read, and redrawn."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from documents import RESULTS, first_table
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from written_runs import CONFIG, make_run

from experiments import bench, clustering, clustering_figures, demo, studies, summaries, table1, table1_figures
from fedrouter_jax import presets


@pytest.fixture(scope="module")
def clusters():
    """What was measured of clusters."""
    return json.loads((RESULTS / "clustering" / "clustering.json").read_text(encoding="utf-8"))


def rings(axes) -> list[int]:
    """Where among its lines the rings are; each comes behind its line."""
    return [i for i, line in enumerate(axes.lines) if line.get_fillstyle() == "none"]


def test_a_ring_is_where_a_score_is_best_and_a_band_holds_all_seeds(clusters):
    for figure in (clustering_figures.silhouettes(clusters), clustering_figures.others(clusters)):
        for axes in figure.axes:
            best = np.argmin if axes.get_title().startswith("Davies-Bouldin") else np.argmax
            assert len(rings(axes)) == len(axes.collections) > 2
            for i, band in zip(rings(axes), axes.collections, strict=True):
                line, ring = axes.lines[i - 1], axes.lines[i]
                ks, scores = line.get_data()
                assert ring.get_xdata()[0] == ks[best(scores)] and ring.get_color() == line.get_color()
                corners = band.get_paths()[0].vertices
                least, most = ([f(corners[corners[:, 0] == k, 1]) for k in ks] for f in (min, max))
                assert (least <= scores + 1e-9).all() and (scores <= np.array(most) + 1e-9).all()
                assert (np.subtract(most, least) > 0).any()


def test_recipes_are_told_apart_by_more_than_colours_and_those_that_are_equal_are_named(clusters):
    """The same in all panels; what is drawn later is thinner and has gaps."""
    figure = clustering_figures.silhouettes(clusters)
    looks = {}
    for axes in figure.axes:
        lines = [axes.lines[i - 1] for i in rings(axes)]
        for look in (lambda line: line.get_linestyle(), lambda line: line.get_marker(), lambda line: line.get_color()):
            assert len({look(line) for line in lines}) == len(lines) == 4
        widths = [line.get_linewidth() for line in lines]
        assert widths == sorted(widths, reverse=True) and len({*widths}) == 4
        for line in lines:
            looks.setdefault(line.get_label(), set()).add((line.get_color(), line.get_linestyle(), line.get_marker()))
    assert all(len(found) == 1 for found in looks.values())
    assert figure.get_suptitle().endswith("; shallow = refined, first token kept (local, to .0005)")
    apart = [
        r | {"silhouettes": {key: {k: 0.1 for k in curve} for key, curve in r["silhouettes"].items()}}
        if r["recipe"] == "shallow" and "silhouettes" in r
        else r
        for r in clusters["records"]
    ]
    assert "=" not in clustering_figures.silhouettes(clusters | {"records": apart}).get_suptitle()


def test_silhouettes_are_means_over_clients_or_of_all_rows_and_tasks_are_marked(clusters):
    kept = [r for r in clusters["records"] if (r["set"], r["recipe"], r["few"]) == ("flan8", "refined", None)]
    for axes in clustering_figures.silhouettes(clusters).axes:
        name, part = axes.get_title().split(", ")
        if name != "flan8":
            continue
        curves = [
            curve for r in kept for key, curve in r["silhouettes"].items() if (key == "global") == (part == "global")
        ]
        assert len(curves) == (5 if part == "global" else 40)
        (line,) = (line for line in axes.lines if line.get_label() == "refined")
        assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True))[8] == pytest.approx(
            np.mean([c["8"] for c in curves])
        )
        (mark,) = (line for line in axes.lines if line.get_color() == "0.88")
        assert list(mark.get_xdata()) == [8, 8]


def test_silhouettes_of_a_measurement_that_was_stopped_are_drawn_as_far_as_it_got(clusters):
    last = next(i for i, record in enumerate(clusters["records"]) if record["set"] == "flan8")
    figure = clustering_figures.silhouettes(clusters | {"records": clusters["records"][: last + 1]})
    recipes = [[axes.lines[i - 1].get_label() for i in rings(axes)] for axes in figure.axes]
    assert recipes[0] == recipes[2] == ["paper", "shallow", "refined", "refined, first token kept"]
    assert recipes[1] == recipes[3] == ["paper"]
    assert "nan" not in clustering_figures.table(clusters | {"records": clusters["records"][:16]})


def test_rows_in_the_cluster_of_another_task_are_ringed_and_counted(clusters):
    """A cluster's task is that of most of its rows, and clusters have its name and its colour."""
    records = [record for record in clusters["records"] if "picture" in record]
    panels = np.reshape(clustering_figures.pictures(clusters).axes, (len(records), 3))
    assert len(records) == 3
    for record, (tasks, *found) in zip(records, panels, strict=True):
        colours = {d.get_label(): tuple(d.get_facecolor()[0][:3]) for d in tasks.collections}
        points, true = np.array(record["picture"]["points"]), np.array(record["tasks"])[record["picture"]["task"]]
        for axes, key in zip(found, ("first client", "slot"), strict=True):
            labels = np.array(record["picture"][key])
            here = true[: len(labels)]
            most = {
                k: max(record["tasks"], key=lambda task: sum(here[labels == k] == task)) for k in {*labels.tolist()}
            }
            wrong = np.array([most[k] != task for k, task in zip(labels.tolist(), here, strict=True)])
            assert f", {sum(wrong)} of {len(labels)} rows wrong" in axes.get_title()
            kinds = {d.get_label(): tuple(d.get_facecolor()[0][:3]) for d in axes.collections[1:-1]}
            assert kinds == {f"{k} ({task})": colours[task] for k, task in most.items()}
            ringed = axes.collections[-1]
            assert np.asarray(ringed.get_offsets()).tolist() == points[: len(labels)][wrong].tolist()
            assert tuple(ringed.get_edgecolor()[0][:3]) == to_rgb("black") and not len(ringed.get_facecolor())


@pytest.mark.parametrize("folder", [".", "h200", "no-matrix-units"])
def test_bars_of_a_bench_are_rates_of_the_table_and_ours_have_a_colour_of_their_own(folder):
    found = json.loads((RESULTS.parent / "bench" / folder / "bench.json").read_text(encoding="utf-8"))
    rows = {row[""]: row for row in first_table(RESULTS.parent / "bench" / folder / "bench.md")}
    drawn = bench.figure(found)
    for axes, (name, phase) in zip(drawn.axes, found["phases"].items(), strict=True):
        sides = [label.get_text() for label in axes.get_yticklabels()]
        bars, dots = dict(zip(sides, axes.patches, strict=True)), dict(zip(sides, axes.lines, strict=True))
        assert axes.get_title() == f"{name}: {phase['unit']} a second"
        for side, bar in bars.items():
            if side.startswith("ours"):
                row = rows[f"{name}{side.removeprefix('ours')} ({phase['unit']})"]
                assert f"{bar.get_width():,.0f}" == row["ours, a second"]
            assert (bar.get_facecolor()[:3] == to_rgb("#d55e00")) == side.startswith("ours")
            assert np.median(1 / np.array(dots[side].get_xdata())) == pytest.approx(1 / bar.get_width())
            assert len(dots[side].get_xdata()) == len(phase["seconds"][side])
    for words in (found["device"], f"{found['threads']} threads", "median", "orange: ours, blue: PyTorch"):
        assert words in drawn.get_suptitle()
    FigureCanvasAgg(drawn).draw()
    for axes in drawn.axes:
        for number, dots in zip(axes.texts, axes.lines, strict=True):  # none is struck through
            assert number.get_window_extent().x0 > axes.transData.transform(dots.get_xydata())[:, 0].max() + 3


def test_no_name_in_a_figure_lies_over_another():
    clusters = json.loads((RESULTS / "clustering" / "clustering.json").read_text(encoding="utf-8"))
    tables = [summaries.load(RESULTS / f"table1{end}" / "runs") for end in ("", "-long", "-full", "-rates")]
    benches = RESULTS.with_name("bench").glob("*cores/bench.json")
    figures = [
        clustering_figures.silhouettes(clusters),
        clustering_figures.others(clusters),
        *(draw(found) for found in tables for draw in (table1_figures.scores, table1_figures.leads)),
        *(studies.figure(path.name, summaries.load(path)) for path in (RESULTS / "studies").iterdir() if path.is_dir()),
        *(bench.figure(json.loads(path.read_text(encoding="utf-8"))) for path in benches),
    ]
    for figure in figures:
        FigureCanvasAgg(figure).draw()
        texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
        for axes in figure.axes:
            ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]  # numbers are placed by matplotlib itself
            texts += [tick for tick in ticks if any(map(str.isalpha, tick.get_text()))]
            texts += [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title]
        boxes = {text: text.get_window_extent() for text in texts if text.get_text()}
        for one, other in itertools.combinations(boxes, 2):
            assert not boxes[one].overlaps(boxes[other]), (one, other)


@pytest.mark.parametrize(
    ("script", "options", "folder", "written"),
    [
        (table1, table1.Table1(redraw=True), "table1-long", ("table1.md", "table1.png", "leads.png")),
        (studies, studies.Studies(("rounds",), redraw=True), "studies", ("rounds.md", "rounds.png")),
        (clustering, clustering.Clustering(redraw=True), "clustering", ("clustering.md", "embedding.png")),
    ],
)
def test_redrawing_writes_what_is_committed(script, options, folder, written, tmp_path, capsys):
    """`make results`; pictures are the same but for the version of what draws them."""
    shutil.copytree(RESULTS / folder, tmp_path, dirs_exist_ok=True)
    for path in (*tmp_path.glob("*.md"), *tmp_path.glob("*.png")):
        path.unlink()
    script.main(replace(options, out=tmp_path))
    page, *pictures = written
    assert (tmp_path / page).read_bytes() == (RESULTS / folder / page).read_bytes()
    for picture in pictures:
        drawn, kept = (image.imread(where / picture) for where in (tmp_path, RESULTS / folder))
        assert np.allclose(drawn.shape, kept.shape, rtol=0.05)
        assert drawn.shape != kept.shape or (drawn != kept).mean() < 0.02
    assert capsys.readouterr().out


def test_the_demo_compares_fedrouter_with_fedit(tmp_path, monkeypatch, capsys):
    """What it prints and writes of two runs, which are written by hand here."""
    made = {}

    def written(configs, out, console):
        made.update(configs)
        return [make_run(out / name, CONFIG, strategy=config.strategy) for name, config in configs.items()]

    monkeypatch.setattr(demo, "sweep", written)
    demo.main(demo.Demo(out=tmp_path))
    assert {name: (c.strategy, c.seed) for name, c in made.items()} == {
        "fedit-0": ("fedit", 0),
        "fedrouter-0": ("fedrouter", 0),
    }
    assert made["fedit-0"].rounds == made["fedrouter-0"].rounds == presets.demo().rounds
    printed = capsys.readouterr().out
    assert "fedit" in printed and f"fedrouter route {tmp_path}/fedrouter-0" in printed
    assert (tmp_path / "report.md").exists() and (tmp_path / "plots" / "scores.png").exists()
