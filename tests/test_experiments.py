"""What the experiments run: budgets, presets, processes that share a table, studies; and that nothing runs again."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from written_runs import make_summary

from experiments import equal, learning_rates, measurements, studies, summaries, table1
from experiments.methods import METHODS
from fedrouter_jax import config as config_lib
from fedrouter_jax.errors import UserError
from fedrouter_jax.lora import LoRAConfig
from fedrouter_jax.presets import PRESETS, demo

ROOT = Path(__file__).resolve().parents[1]


def test_processes_share_a_table_by_seeds(tmp_path):
    whole = table1.Table1(seeds=3)
    parts = [replace(whole, seeds=1), replace(whole, first_seed=1)]
    first, second = map(table1.configs, parts)
    assert not first.keys() & second.keys() and first | second == table1.configs(whole)
    with pytest.raises(UserError, match="--first-seed is 3; with --seeds 3 it is one below that"):
        table1.main(replace(whole, first_seed=3, out=tmp_path))


def test_the_full_budget_is_that_of_the_papers_launcher():
    config = table1.configs(table1.Table1(budget="full", scenarios=("dual",)))["dual-fedit-0"]
    data, local = config.data, config.local
    assert (data.clients, config.rounds.rounds, local.steps, local.batch) == (8, 25, 10, 16)
    assert (local.learning_rate, local.min_learning_rate, data.template) == (5e-4, 1e-5, "alpaca")
    assert (local.clip, local.weight_decay, local.proximal) == (1.0, 0.0, 0.0)
    assert config.lora == LoRAConfig(8, 16.0, 0.05, ("q_proj", "v_proj"))


def test_the_presets_are_those_that_the_readme_tells_of():
    """The paper's budget with the choices of either path of the public code; and the one for two cores."""
    for scenario in ("single", "dual", "all"):
        paper, flower, plain, cpu = (PRESETS[f"flan4-{scenario}{path}"]() for path in ("", "-flower", "-plain", "-cpu"))
        assert {c.data.scenario for c in (paper, flower, plain, cpu)} == {scenario}
        assert (paper.cluster.recipe, paper.rounds.weighting) == ("refined", "cluster")
        assert (flower.rounds.weighting, flower.rounds.clusters_per_round) == ("client", 1)
        assert (plain.rounds.weighting, plain.rounds.clusters_per_round) == ("uniform", 0)
        assert {flower.cluster.recipe, plain.cluster.recipe} == {"paper"}
        data, rounds, local = cpu.data, cpu.rounds.rounds, cpu.local
        assert (data.clients, data.train_rows, data.test_rows, data.mix_rows) == (8, 80, 16, 48)
        assert (data.max_length, data.max_response) == (320, 48) and (rounds, local.steps, local.batch) == (8, 4, 2)


def test_summaries_of_other_runs_are_not_drawn(tmp_path):
    for folder in ("runs", "clients"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "other.json").write_text(json.dumps(make_summary("fedit", 0, 0.5)))
    with pytest.raises(UserError, match="runs holds no run of the table to draw"):
        table1.main(table1.Table1(redraw=True, out=tmp_path))
    with pytest.raises(UserError, match="clients holds no run of the study to draw; remove other.json"):
        studies.main(studies.Studies(redraw=True, out=tmp_path))
    with pytest.raises(UserError, match="rounds holds no summaries to draw"):
        studies.main(studies.Studies(("rounds",), redraw=True, out=tmp_path))


def test_runs_of_other_budgets_or_rates_are_neither_drawn_nor_added_to(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "dual-fedit-0.json").write_text(json.dumps(make_summary("fedit", 0, 0.5)))
    for section, changed, expected in (
        ("data", {"clients": 6}, "equal rows and budgets, but clients is 4 in dual-fedit-0 and 6 in dual-fedit-1"),
        (
            "local",
            {"learning_rate": 0.5},
            "each method at one rate, but learning_rate is 0.005 in dual-fedit-0 and 0.5",
        ),
    ):
        other = make_summary("fedit", 1, 0.5)
        other["config"][section] |= changed
        (runs / "dual-fedit-1.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match=expected):
            table1.main(table1.Table1(redraw=True, out=tmp_path))
        with pytest.raises(UserError, match=expected.partition(",")[0]):
            table1.main(table1.Table1(methods=("local",), once=(), smoke=True, out=tmp_path))


def test_runs_of_another_out_are_not_in_each_others_way(tmp_path, monkeypatch):
    folders = []
    monkeypatch.chdir(tmp_path)
    for script in (table1, studies):
        monkeypatch.setattr(script, "sweep", lambda configs, folder, *rest: folders.append(folder))
    for out in (None, tmp_path, Path("runs/smoke/table1")):
        with pytest.raises(UserError, match="holds no run of the table"):
            table1.main(table1.Table1(out=out, smoke=True))
        studies.main(studies.Studies(("rounds",), out=out, smoke=True))
    assert folders[2:4] == [tmp_path / "work", tmp_path / "work" / "rounds"]
    assert folders[4] == folders[0] != folders[2] and folders[5] != folders[1]  # the usual place, named


def test_only_some_runs_of_a_study_can_be_asked_for():
    made = studies.configs("rate-0.5b", studies.Studies(seeds=2))
    chosen = studies.chosen("rate-0.5b", made, ("fedlease-0.001", "fedit-0.005"))
    assert list(chosen) == ["fedlease-0.001-0", "fedit-0.005-0", "fedlease-0.001-1", "fedit-0.005-1"]
    assert all(chosen[name] is made[name] for name in chosen) and studies.chosen("rate-0.5b", made, ()) == made
    with pytest.raises(UserError, match="study rate-0.5b has no runs 'local-0.001'; choose --only among .*fedit-0.005"):
        studies.chosen("rate-0.5b", made, ("fedit-0.005", "local-0.001"))


def test_a_smoke_run_is_of_the_tiny_model_and_of_tasks_that_it_has():
    smokes = {name: studies.configs(name, studies.Studies(seeds=5, smoke=True)) for name in studies.STUDIES}
    assert [*smokes["unseen"]] == ["fedrouter+-none-0", "fedrouter+-headline-0"]
    other = studies.configs("eight-tasks", studies.Studies(data="rows/flan4"))["fedit-8-0"]
    assert (other.data.data, smokes["eight-tasks"]["fedrouter+-8-0"].data.data) == ("rows/flan8", "synthetic")
    assert all(len(made) <= 2 and {config.model for config in made.values()} == {"tiny"} for made in smokes.values())
    assert len(table1.configs(table1.Table1(smoke=True))) == 2
    many = table1.configs(table1.Table1(clients=6, methods=("fedit",), once=(), seeds=1))
    assert {config.data.clients for config in many.values()} == {6} and len(many) == 3


def test_a_value_that_the_smoke_run_has_too_is_drawn_once():
    found = {f"fedit-{value}-0": make_summary("fedit", 0, 0.5) for value in (2, 4)}
    found |= {f"fedrouter+-{model}-0": make_summary("fedrouter", 0, 0.5) for model in ("tiny", "smollm2-135m")}
    for study, values in (("rounds", ["2", "4"]), ("model", ["smollm2-135m", "tiny"])):
        for axes in studies.figure(study, found).axes:
            assert [tick.get_text() for tick in axes.get_xticklabels()] == values


def test_no_committed_run_would_run_again():
    """What the sweeps would run today is what their committed summaries hold."""
    results = ROOT / "docs" / "results"
    for name, config in table1.configs(table1.Table1()).items():
        assert summaries.known(results / "table1" / "runs" / f"{name}.json", config), name
    for budget, folder in (("short", "table1"), ("long", "table1-long"), ("full", "table1-full")):
        of_table = table1.configs(table1.Table1(seeds=20, methods=tuple(METHODS), once=(), budget=budget))
        equal.check_budgets(table1.kept(results / folder))
        equal.check_rates(table1.kept(results / folder))
        for name in summaries.load(results / folder / "runs"):
            assert summaries.known(results / folder / "runs" / f"{name}.json", of_table[name]), name
    for folder in sorted(path for path in (results / "studies").iterdir() if path.is_dir()):
        of_study = studies.configs(folder.name, studies.Studies(seeds=5))
        for name in summaries.load(folder):
            assert summaries.known(folder / f"{name}.json", of_study[name]), name


def test_the_committed_demo_is_what_the_demo_would_run():
    for folder in sorted((ROOT / "docs" / "results" / "demo").glob("fed*")):
        strategy, seed = folder.name.split("-")
        known, now = config_lib.load(folder / "config.json"), replace(demo(), strategy=strategy, seed=int(seed))
        assert not summaries.differing(known, now)  # but for speed


def test_no_committed_run_at_a_rate_of_its_own_would_run_again():
    """Nor what was tried to choose the rates."""
    folder, rates = ROOT / "docs" / "results" / "table1-rates", (0.0025, 0.005, 0.01, 0.02, 0.04)
    methods = ("fedrouter+", "fedit", "clustered", "feddpa-t")
    asked = table1.configs(table1.Table1(methods=methods, once=(), scenarios=("dual",), first_seed=10, seeds=15))
    best = learning_rates.chosen(summaries.load(folder / "rates"))
    parts = {"rates": learning_rates.trials(asked, rates), "runs": learning_rates.tuned(asked, best)}
    for part, configs in parts.items():
        assert {*configs} == {*summaries.load(folder / part)}
        for name, config in configs.items():
            assert summaries.known(folder / part / f"{name}.json", config), name


def test_a_page_is_drawn_where_its_tables_fit_the_terminal(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"# Title\n\n{'word ' * 60}\n\n| name | {'n' * 20} |\n|---|---|\n| {'m' * 30} | 1 |\n")
    shown = {}
    for width, terminal in ((80, True), (50, True), (80, False)):
        console = Console(file=io.StringIO(), width=width, force_terminal=terminal)
        measurements.show_markdown(path, console)
        shown[width, terminal] = console.file.getvalue()
    assert "|---|" not in shown[80, True] and "m" * 30 in shown[80, True]
    assert shown[50, True] == shown[80, False] == f"{path.read_text()}\n{path}\n"
