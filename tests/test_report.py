"""Reports from run directories written by hand: what the tables say against what the files hold."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from written_runs import CLIENTS, CONFIG, TASKS, change_json, make_round, make_run, scores_of, write_json

from fedrouter_jax import config as config_lib
from fedrouter_jax import records, report
from fedrouter_jax.cli import main
from fedrouter_jax.config import DataConfig
from fedrouter_jax.data.schedule import RoundConfig
from fedrouter_jax.errors import UserError


def table_of(paths: list[Path], title: str) -> dict[str, dict[str, str]]:
    """{method: {column: text}} of one table."""
    found = next(t for t in report.tables(records.rows_of(records.read_all(paths))) if t.title.startswith(title))
    return {cells[0]: dict(zip(found.header, cells, strict=True)) for cells in found.cells}


def test_tables_hold_the_numbers_of_the_files(tmp_path):
    path = make_run(tmp_path / "one")
    scores = scores_of(path)
    table = table_of([path], "Scores")
    assert list(table) == ["base model", "fedrouter"]
    for row, parts in (("base model", records.BASE_PARTS), ("fedrouter", records.PARTS)):
        for short, part in zip(report.SHORT, parts, strict=True):
            assert table[row][f"{short} ROUGE-1"] == f"{scores[part]['rouge1']['mean']:.3f}"
            assert table[row][f"{short} ROUGE-L"] == f"{scores[part]['rougeL']['mean']:.3f}"
    assert "joined after training" in report.note(records.rows_of(records.read_all([path])))
    accuracy = table_of([path], "Clustering")
    assert list(accuracy) == ["fedrouter"]
    assert accuracy["fedrouter"]["rows in right cluster"] == "75.0%"
    assert accuracy["fedrouter"]["gen. rows routed right"] == "62.5%"
    assert table["fedrouter"]["seed"] == "0" and "scenario" not in table["fedrouter"]  # of several only
    assert "4 clients, dual" in report.setups(records.rows_of(records.read_all([path])))[0]

    cost = table_of([path], "Cost")["fedrouter"]
    assert cost["sent up"] == "121.0 kB"  # 3 x 40 kB of adapters and 1 kB of enrolment
    assert cost["sent down"] == "152.0 kB"
    assert cost["steps per client and round"] == "8"  # 10, 10 and 4
    assert (cost["seconds total"], cost["seconds training"]) == ("9.5", "3.8")

    for part in records.PARTS:
        by_task = table_of([path], f"ROUGE-1 of each task, {part}")["fedrouter"]
        expected = {task: f"{value:.3f}" for task, value in scores[part]["rouge1"]["per_task"].items()}
        assert {task: by_task[task] for task in TASKS} == expected


def test_newcomers_have_columns_only_where_there_are_any(tmp_path):
    path = make_run(tmp_path / "one")
    write_json(path / "scores.json", {k: v for k, v in scores_of(path).items() if "newcomers" not in k})
    assert not any("new." in column for column in table_of([path], "Scores")["fedrouter"])
    assert "joined after training" not in report.note(records.rows_of(records.read_all([path])))


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path):
    paths = [
        make_run(tmp_path / f"{s}-{seed}", seed=seed, strategy=s) for s in ("fedrouter", "fedit") for seed in (2, 0)
    ]
    table = table_of(paths, "Scores")
    assert list(table) == ["base model", "fedrouter", "fedit"]
    for row, part, two in (
        ("fedrouter", "personalised", paths[:2]),
        ("fedit", "personalised", paths[2:]),
        ("base model", "base", paths[:2]),  # the first run of each seed
    ):
        found = [scores_of(path)[part]["rouge1"]["mean"] for path in two]
        assert table[row]["pers. ROUGE-1"] == f"{np.mean(found):.3f} ± {np.std(found, ddof=1):.3f}"
        assert table[row]["seed"] == "0, 2"
    other = make_run(tmp_path / "other", strategy="fedit", lora=replace(CONFIG.lora, rank=2))
    assert list(table_of([*paths, other], "Scores"))[1:] == ["fedrouter (rank 8)", "fedit (rank 8)", "fedit (rank 2)"]
    assert len(records.read_all([paths[0], paths[0] / ".", paths[1]])) == 2
    coded = make_run(tmp_path / "coded", quantise="int8", seed=2)
    assert list(table_of([paths[0], coded], "Scores"))[:2] == [f"base model (quantise {q})" for q in ("none", "int8")]
    ordered = make_run(tmp_path / "ordered", rounds=replace(CONFIG.rounds, turns="staggered"))
    labels = ["fedrouter", "fedit", "fedrouter (turns staggered)"]  # FedIT has no turns
    assert list(table_of([paths[0], paths[2], ordered], "Scores"))[1:] == labels
    twice = make_run(tmp_path / "twice", seed=0)
    many = [
        make_run(tmp_path / f"m{i}" / "x", seed=7, lora=replace(CONFIG.lora, rank=i, alpha=i, dropout=i / 9))
        for i in (1, 2)
    ]
    labels = [row.label for row in records.rows_of(records.read_all(many))]
    assert len(set(labels)) == len(labels) == 3 and all("x" in label for label in labels[1:])
    with pytest.raises(UserError, match="are one run twice .equal configs, seed 0."):
        records.rows_of(records.read_all([*paths, twice]))


def test_the_best_of_a_setting_is_bold(tmp_path):
    paths = [make_run(tmp_path / s, strategy=s) for s in ("fedrouter", "fedit", "local")]
    single = DataConfig(clients=CLIENTS, scenario="single")
    paths += [make_run(tmp_path / f"single-{s}", strategy=s, data=single, seed=7) for s in ("fedit", "local")]
    rows = records.rows_of(records.read_all(paths))
    table = report.tables(rows)[0]
    column = table.header.index("gen. ROUGE-1")
    [losses] = [other for other in report.tables(rows) if other.title.startswith("Loss")]
    for scenario in ("dual", "single"):
        here = [i for i, cells in enumerate(table.cells) if cells[1] == scenario]
        for shown, place, best in ((table, column, max), (losses, losses.header.index("gen. rows"), min)):
            numbers = {i: float(shown.cells[i][place]) for i in here}
            marked = [i for i in numbers if (i, place) in shown.bold]
            assert marked == [best(numbers, key=numbers.get)]
    report.write(paths, tmp_path / "all")
    best = max(float(cells[column]) for cells in table.cells if cells[1] == "dual")
    assert f"**{best:.3f}**" in (tmp_path / "all" / "report.md").read_text(encoding="utf-8")


def test_markdown_of_one_run(tmp_path):
    path = make_run(tmp_path / "my run", taken_at=(1,))
    report.write([path], path)
    text = (path / "report.md").read_text(encoding="utf-8")
    assert "synthetic data" in text and "model tiny" in text and "recipe refined" in text
    assert "routing local (personalised), global (generalisation)" in text and "3 rounds x 10 steps x batch 16" in text
    assert "- answer: (empty)" in text and r"- reference: yes \| no" in text and r"Say \<b\>" in text
    assert len(re.findall(r"instruction: (.*)", text)[0]) < 170
    links = re.findall(r"\]\((.*?)\)", text)
    assert {"scores.json", "plots/loss.png", "plots/embedding.png"} <= set(links)
    assert all((path / target).exists() for target in links)
    rows = [line for line in text.split("\n") if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (5, 7, 9) for line in rows)  # `sort|odd` makes no column
    assert text.index("## Settings") > text.index("## ROUGE-1 of each task, newcomers")

    elsewhere = report.to_markdown(records.read_all([path]), [], tmp_path / "else where")
    assert "](../my%20run/scores.json)" in elsewhere


def test_answers_shown_are_those_to_clients_own_tasks(tmp_path):
    run = records.read(make_run(tmp_path / "one"))
    path = run.path / "predictions.jsonl"
    others = [line for line in path.read_text("utf-8").splitlines(keepends=True) if '"personalised"' not in line]
    assert report.samples(run) and others
    path.write_text("".join(others), "utf-8")
    assert report.samples(run) == []


def test_runs_whose_rows_or_weights_had_one_name_and_were_others_are_not_compared(tmp_path):
    paths = [make_run(tmp_path / name, strategy=name, seed=seed) for name, seed in (("fedrouter", 0), ("fedit", 0))]
    paths.append(make_run(tmp_path / "other seed", seed=1))  # whose rows may be split otherwise
    named = {"data": "rows", "model": "weights", "described": "configuration or tokenizer"}
    for key, values in (("data", "aab"), ("model", "aaa"), ("described", "aaa")):  # only rows are the seed's
        for path, value in zip(paths, values, strict=True):
            change_json(path / "clusters.json", **{key: value})
        records.rows_of(records.read_all(paths))
        change_json(paths[1] / "clusters.json", **{key: "b"})
        with pytest.raises(UserError, match=f"name the same {named[key]}"):
            records.rows_of(records.read_all(paths))
        change_json(paths[1] / "clusters.json", **{key: "a"})


def test_the_seconds_of_a_run_that_took_work_over_are_not_those_of_all_of_it(tmp_path):
    path = make_run(tmp_path / "one")
    assert records.cost(records.read(path))["seconds_total"] == 9.5
    change_json(path / "timings.json", taken_over=[])
    assert records.cost(records.read(path))["seconds_total"] == 9.5
    change_json(path / "timings.json", taken_over=["base answers"])
    assert "seconds_total" not in records.cost(records.read(path))


def test_csv_tells_runs_of_one_name_apart(tmp_path):
    paths = [make_run(tmp_path / folder / "mine", seed=seed) for seed, folder in enumerate("ab")]
    lines = csv.DictReader(io.StringIO(report.to_csv(records.read_all(paths))))
    assert {line["run"] for line in lines} == {str(path) for path in paths}


def test_csv_is_tidy(tmp_path):
    path = make_run(tmp_path / "one")
    lines = list(csv.DictReader(io.StringIO(report.to_csv(records.read_all([path])))))
    keys = [(line["run"], line["part"], line["metric"], line["level"], line["name"]) for line in lines]
    assert len(set(keys)) == len(keys)
    found = {key[1:]: float(line["value"]) for key, line in zip(keys, lines, strict=True)}
    scores = scores_of(path)
    assert found["generalisation", "rouge2", "mean", ""] == scores["generalisation"]["rouge2"]["mean"]
    assert found["base", "rouge1", "client", "3"] == scores["base"]["rouge1"]["per_client"]["3"]
    assert (
        found["personalised", "rougeL", "task", "sort|odd"] == scores["personalised"]["rougeL"]["per_task"]["sort|odd"]
    )
    assert found["clusters", "accuracy_local", "mean", ""] == 0.875
    assert found["cost", "bytes_up", "mean", ""] == 121_000
    assert {line["round"] for line in lines} == {"3"} and {line["finished"] for line in lines} == {"True"}


def test_unfinished_runs_are_reported_as_far_as_they_got(tmp_path):
    config = replace(CONFIG, rounds=RoundConfig(rounds=4))
    path = make_run(tmp_path / "part", config, done=3, taken_at=(1, 2))
    with (path / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 4, "lo')  # killed in the middle of a line
    table = table_of([path], "Scores")
    assert list(table) == ["fedrouter (unfinished: 3 of 4 rounds)"]
    record = json.loads((path / "rounds.jsonl").read_text(encoding="utf-8").split("\n")[1])
    expected = record["scores"]["personalised"]["rouge1"]["mean"]
    assert table["fedrouter (unfinished: 3 of 4 rounds)"]["pers. ROUGE-1"] == f"{expected:.3f}"
    read = records.read_all([path])
    (said,) = report.setups(records.rows_of(read))
    assert f"unfinished, the scores are of round 2; continue with: fedrouter resume {path}." in said
    lines = list(csv.DictReader(io.StringIO(report.to_csv(read))))
    assert {(line["round"], line["finished"]) for line in lines} == {("2", "False")}

    finished = make_run(tmp_path / "whole", config, done=4)
    assert len(table_of([path, finished], "Scores")) == 3  # never a mean of scores of different rounds
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(config_lib.to_json(CONFIG), encoding="utf-8")
    report.write([bare], bare)
    assert "0 of 3 rounds" in (bare / "report.md").read_text(encoding="utf-8")
    assert not (bare / "plots").exists()


def test_rejected_lanes_and_losses_that_are_not_finite(tmp_path):
    paths = [make_run(tmp_path / str(seed), strategy="fedit", seed=seed) for seed in range(2)]
    for path in paths:
        record = make_round(3, np.random.default_rng(0)) | {"loss": float("nan")}
        for lane in record["lanes"][:2]:
            lane |= {"loss": [float("nan")] * 2, "rejected": "not finite"}
        lines = (path / "rounds.jsonl").read_text(encoding="utf-8").split("\n")[:2]
        (path / "rounds.jsonl").write_text("\n".join([*lines, json.dumps(record), ""]), encoding="utf-8")
    report.write(paths[:1], paths[0])
    assert "lanes rejected as not finite: 2" in (paths[0] / "report.md").read_text(encoding="utf-8")
    assert "lanes rejected as not finite: 4" in report.setups(records.rows_of(records.read_all(paths)))[0]


def test_what_the_user_of_a_finished_run_should_know(tmp_path):
    path = make_run(tmp_path / "run")
    clusters = json.loads((path / "clusters.json").read_text())

    def noted(**changed):
        write_json(path / "clusters.json", clusters | changed)
        return records.notes(records.read(path))

    (random,) = noted()
    assert noted(seen_rows=3, test_rows=20)[1].startswith(
        "3 of 20 test rows have an instruction that is among the train"
    )
    assert random.startswith("the model is random")
    rows = sum(len(client["rows"]) for client in clusters["clients"])
    assert noted(training_rows=rows) == [random]
    assert noted(training_rows=100) == [random]  # of rows that are made for the run
    for most, said in ((600, ""), (len(clusters["clients"][0]["rows"]), ", at most 12 each (--train-rows)")):
        mine = make_run(tmp_path / f"mine {most}", data=replace(CONFIG.data, data="mine", train_rows=most))
        change_json(mine / "clusters.json", training_rows=rows)
        assert records.notes(records.read(mine)) == [random]
        change_json(mine / "clusters.json", training_rows=100)
        told = records.notes(records.read(mine))[1]
        assert told == f"clients hold {rows} of 100 training rows{said}; the rest is left out"
    more = {"clusters": 5, "slot_tasks": [*TASKS, "", ""]}
    filled = [[*row, -1] for row in clusters["table"]]  # of three clusters that a client may hold, two
    empty, _, missed = noted(**more, table=filled, never_trained=[[0, 1], [2, 0]])
    assert empty.startswith("2 of 5 global clusters hold no rows of any client")
    assert missed.startswith("too few rounds: 2 local clusters were never trained")
    assert noted(**more, clustered=False) == [random]


@pytest.mark.parametrize(
    ("strategy", "weighed"),
    [
        ("fedit", True),
        ("fedrouter", True),
        ("fedalt", False),
        ("local", False),
        ("centralised", False),
        ("no:such", True),
    ],
)
def test_a_report_says_whether_averages_are_weighted(strategy, weighed, tmp_path):
    (line,) = report.setups(records.rows_of([records.read(make_run(tmp_path / "run", strategy=strategy))]))
    assert ("averages weighted by cluster" in line, "no weighted averages" in line) == (weighed, not weighed)


def test_a_servers_rate_that_is_far_too_high_is_told(tmp_path):
    notes = {}
    for server, rate in (("adam", 1.0), ("adam", 0.01), ("momentum", 1.0)):
        rounds = replace(CONFIG.rounds, server=server, server_rate=rate)
        path = make_run(tmp_path / f"{server}{rate}", strategy="fedit", rounds=rounds)
        notes[server, rate] = " ".join(records.notes(records.read(path)))
    assert ["--server-rate a round" in said for said in notes.values()] == [True, False, False]


def test_all_runs_of_a_folder_are_reported_again_beside_their_report(tmp_path, monkeypatch, capsys):
    """`fedrouter report runs/*`, twice."""
    monkeypatch.chdir(tmp_path)
    for strategy in ("fedrouter", "fedit"):
        make_run(Path("runs") / strategy, strategy=strategy)
    Path("runs/sweep").mkdir()
    Path("runs/notes.txt").touch()
    for _ in range(2):
        assert main(["report", *map(str, Path("runs").iterdir())]) == 0
    found = " ".join(capsys.readouterr().out.split())
    others = [str(Path("runs") / name) for name in ("notes.txt", "report", "sweep")]
    assert all(name in found.rpartition("passed over, no run directories:")[2] for name in others)
    assert {path.name for path in Path("runs").iterdir()} == {"fedrouter", "fedit", "report", "sweep", "notes.txt"}
    assert Path("runs/report/report.md").read_text(encoding="utf-8").startswith("# 2 runs")
    for alone in ("runs/report", "runs/notes.txt"):
        assert main(["report", alone]) == 2
        assert f"{Path(alone)} is none: it has no config.json" in capsys.readouterr().err
    assert main(["report", "runs/fedit", "runs/fedita"]) == 2  # a misspelt one is not passed over
    assert "fedita" in capsys.readouterr().err


def test_a_run_that_was_refused_is_no_row(tmp_path, monkeypatch, capsys):
    """It has left its config."""
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/fedit"), strategy="fedit")
    refused = Path("runs/refused")
    refused.mkdir()
    (refused / "config.json").write_text(config_lib.to_json(CONFIG), encoding="utf-8")
    (refused / "run.lock").touch()
    assert main(["report", *sorted(map(str, Path("runs").iterdir())), "--to", "to"]) == 0
    found = " ".join(capsys.readouterr().out.split())
    assert "passed over, nothing done yet: runs/refused" in found and "no run directories" not in found
    assert "refused" not in Path("to/report.md").read_text() and "unfinished" not in found
    assert main(["report", "runs/refused"]) == 2
    assert capsys.readouterr().err.endswith("nothing to report yet; go on with it by: fedrouter resume runs/refused\n")
