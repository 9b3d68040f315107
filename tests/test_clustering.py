"""What the experiment on clusters measures, on points whose clusters are known, and what it makes of damaged files."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import clustering, clustering_figures
from fedrouter_jax import clusters, routing
from fedrouter_jax.data.rows import Row
from fedrouter_jax.errors import UserError

MEASURED = Path(__file__).resolve().parents[1] / "docs" / "results" / "clustering" / "clustering.json"
TASKS = ("a", "b", "c")


@pytest.fixture(scope="module")
def states():
    """Points of three tasks, far apart, of each another number."""
    rng = np.random.default_rng(0)
    return {
        task: rng.normal(size=8) + 0.1 * rng.normal(size=(rows, 8))
        for task, rows in zip(TASKS, (24, 20, 16), strict=True)
    }


@pytest.fixture(autouse=True, scope="module")
def fewer():
    """Fewer counts are tried, each of which is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clustering, "MOST", 4)
        yield


@pytest.fixture(scope="module")
def record(states):
    return clustering.cluster(states, 0, "refined", 2, find=True)


def test_tasks_that_are_far_apart_are_found(record):
    assert record["local"] == record["global"] == record["found_accuracy"] == 1
    assert record["found_local"] == [3, 3] and record["found_global"] == 3
    for part, scores in record["others"].items():
        variance, davies = scores["Calinski-Harabasz"], scores["Davies-Bouldin"]
        assert variance[3] > variance[2] and davies[3] < davies[2]
        if part == "local":  # of six centres, four clusters may be better still
            assert max(variance, key=variance.get) == min(davies, key=davies.get) == 3


def test_a_picture_shows_every_row_by_its_task_and_its_clusters(record):
    picture = record["picture"]
    assert picture["task"] == 2 * ([0] * 12 + [1] * 10 + [2] * 8)  # client by client
    assert len(picture["points"]) == len(picture["slot"]) == 60
    for labels in (picture["slot"], picture["first client"]):
        assert len({*zip(picture["task"], labels, strict=False)}) == 3
    assert len(picture["first client"]) == 30


def test_a_client_has_so_many_rows_of_each_task(states, monkeypatch):
    held = []
    enrolment = routing.Enrolment(np.array([[0, 1, 2]] * 2), 3, (), np.zeros((2, 30), int), {})
    monkeypatch.setattr(routing, "enroll", lambda key, points, *_: held.append(points) or enrolment)
    monkeypatch.setattr(clusters, "accuracy", lambda enrolment, labels, tasks: (0.25, 0.75))
    monkeypatch.setattr(clustering, "other_scores", lambda *_: {})
    assert clustering.cluster(states, 1, "paper", 2, 4) == {"local": 0.25, "global": 0.75}
    for points in held[0]:
        assert [sum(row.tolist() in states[task].tolist() for row in points) for task in TASKS] == [4] * 3
    found = clustering.cluster(states, 1, "paper", 2, find=True)
    assert [len(points) for points in held[1]] == [30, 30] and found["found_accuracy"] == 0.75  # of global clusters


def test_five_tasks_are_drawn_and_the_others_left_out():
    tasks = sorted(["gigaword", "glue_qqp", "samsum", "web_nlg_en", "cola", "fix_punct", "snli", "trec", "wic", "dpr"])
    sets = {(name, seed): held for name, seed, held in clustering.task_sets(tasks, 2, False)}
    assert len(sets) == 10 and sets["all ten", 1] == tasks
    assert sorted({*tasks} - {*sets["flan8", 0]}) == ["gigaword", "samsum"] and len(sets["flan4", 0]) == 4
    for seed in (0, 1):
        drawn, others = sets["five drawn", seed], sets["the other five", seed]
        assert len(drawn) == len(others) == 5 and sorted([*drawn, *others]) == tasks
    assert sets["five drawn", 0] != sets["five drawn", 1]


def test_a_row_that_is_there_twice_counts_once(monkeypatch):
    rows = [Row(f"{task} {i // 2}", "", task) for task in "ab" for i in range(8)]
    monkeypatch.setattr(clustering.synthetic, "make", lambda *_: type("Made", (), {"train": rows}))
    found = clustering.rows_by_task(clustering.Clustering(rows=3, smoke=True))
    assert {task: [row.instruction for row in held] for task, held in found.items()} == {
        task: [f"{task} {i}" for i in range(3)] for task in "ab"
    }


def test_a_measurement_goes_on_with_fewer_seeds_than_there_are(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(clustering, "embedded", lambda model, rows, *_: rows)
    monkeypatch.setattr(
        clustering, "cluster", lambda tasks, seed, recipe, *_: jobs.append(recipe) or {"local": 1.0, "global": 1.0}
    )
    made = clustering.Clustering(model="tiny", rows=2, clients=2, smoke=True)
    for recipes, seeds in ((("refined",), 2), (("paper", "refined"), 1), (("paper", "refined"), 1)):
        options = {"recipes": recipes, "seeds": seeds}
        clustering.measure(clustering.replace(made, **options), tmp_path / "clustering.json")
    assert jobs == ["refined"] * 8 + ["paper"] * 4  # all rows, and three times few
    found = json.loads((tmp_path / "clustering.json").read_text())["records"]
    assert [record["recipe"] for record in found[:2]] == ["paper", "refined"] and len(found) == 12
    assert {record["seed"] for record in found[8:]} == {1}


@pytest.mark.parametrize("redraw", [True, False])
@pytest.mark.parametrize(
    "text, expected", [("{", "not a JSON object"), ("{}", "Field required"), ('{"records": [{}]}', "Field required")]
)
def test_a_damaged_measurement_of_clusters_is_named(text, expected, redraw, tmp_path):
    (tmp_path / "clustering.json").write_text(text)
    with pytest.raises(UserError, match=f"clustering.json: .*{expected}.*; restore the file, or remove it"):
        clustering.main(clustering.Clustering(smoke=True, redraw=redraw, out=tmp_path))


def test_a_measurement_of_clusters_that_was_stopped_is_drawn_as_far_as_it_got(tmp_path):
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    whole = clustering_figures.left_out(found)
    last = next(i for i, r in enumerate(found["records"]) if (r["set"], r["seed"]) == ("the other five", 1))
    assert clustering_figures.left_out(found | {"records": found["records"][: last + 2]}) == whole[:6]
    (tmp_path / "clustering.json").write_text(json.dumps(found | {"records": found["records"][:1]}))
    with pytest.raises(UserError, match="holds no picture of 'refined' yet"):
        clustering_figures.draw(tmp_path)


def test_recipes_without_the_one_that_is_drawn_are_refused(tmp_path):
    with pytest.raises(UserError, match="--recipes lacks 'refined'"):
        clustering.main(clustering.Clustering(recipes=("paper",), smoke=True, out=tmp_path))


@pytest.mark.parametrize("wrong, expected", [(0, 1.0), (4, 0.8)])
def test_clustering_accuracy_matches_clusters_to_tasks(wrong, expected):
    tasks = [np.repeat([0, 1], 5), np.repeat([0, 1], 5)]
    labels = np.stack([1 - tasks[0], tasks[1]]).astype(np.int32)  # the numbers of clusters mean nothing
    labels[0, :wrong] = 0
    found = routing.Enrolment(np.array([[1, 0], [0, 1]]), 2, (), labels, {})
    assert clusters.accuracy(found, tasks, 2) == (expected, expected)
