"""The experiments' own arithmetic: summaries, intervals, the table. The runs behind them are tested elsewhere."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import ttest_1samp

from experiments import studies, summaries, sweep, table1, table1_tables
from experiments.methods import METHODS
from fedrouter_jax.config import to_json
from fedrouter_jax.errors import UserError
from fedrouter_jax.lora import LoRAConfig
from fedrouter_jax.presets import PRESETS, smoke

ROOT = Path(__file__).resolve().parents[1]
SCORES = {"base": 0.1, "base_generalisation": 0.1}


def made(strategy: str, seed: int, score: float, scenario: str = "dual") -> dict:
    """A summary with one score everywhere."""
    config = replace(smoke(), strategy=strategy, seed=seed)
    config = replace(config, data=replace(config.data, scenario=scenario))
    parts = {"personalised": score, "generalisation": score / 2} | SCORES
    return {
        "config": {key: value for key, value in json.loads(to_json(config)).items() if key != "format"},
        "scores": {part: {"rouge1": {"mean": value, "per_task": {"qqp": value}}} for part, value in parts.items()},
        "cost": {
            "optimiser_steps_per_client": 2.0,
            "tokens": 1000,
            "bytes_up": 3e6,
            "bytes_down": 4.5e6,
            "seconds_training": 7.0,
        },
        "accuracy": {},
        "device": "cpu",
    }


def test_an_interval_is_students():
    values = [0.3, 0.4, 0.55]
    mean, half = summaries.interval(values)
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose([mean - half, mean + half], [low, high])
    assert summaries.interval([0.2]) == (0.2, 0.0)


def test_the_table_marks_the_best_rival_and_states_the_gain():
    found = {
        f"dual-{method}-{seed}": made(method, seed, score + 0.02 * seed)
        for method, score in (("fedrouter", 0.48), ("fedit", 0.38), ("fedrouter-a", 0.4), ("oracle", 0.9))
        for seed in (0, 1)
    }
    lines = table1_tables.markdown(found).splitlines()
    assert "**synthetic** rows" in lines[2] and "Seeds [0, 1]" in lines[4]
    row = {
        line.split("|")[1].strip(): line
        for line in lines[: lines.index("## Seed 0 of dual: every method on the same rows")]
        if line[:2] == "| "
    }
    assert "**0.490 ± 0.127**" in row["fedrouter"] and "0.390 ± 0.127" in row["fedit"] and "**" not in row["fedit"]
    bound = row["oracle (told the tasks)"]
    assert "**" not in bound and "0.910" in bound  # no rival
    last = row["**fedrouter, gain over the best baseline**"]
    for points in ("+0.100", "+0.050"):
        assert f"+25.6 % over fedit ({points} ± 0.000; 2 seeds)" in last
    assert "| dual | fedrouter | 2 | 0.490 / 0.245 |" in lines  # task by task
    assert "| fedrouter | 0.480 | 0.240 | 0.360 |" in lines  # seed 0
    assert "| fedrouter | 6 | 1000 | 3.0 | 4.5 | 7 |" in lines  # three rounds of two steps
    found["dual-fedrouter-0"]["cost"]["seconds_total"] = 9.0  # what a resumed run does not know
    assert table1_tables.markdown(found).splitlines() == lines


def test_a_method_of_ones_own_is_in_the_tables_and_has_a_gain():
    """It is nobody's baseline, however good it is."""
    own = "mymethods:personal_a"
    found = {
        f"dual-{method}-{seed}": made(method, seed, score + 0.02 * seed)
        for method, score in (("fedrouter+", 0.48), ("fedit", 0.38), (own, 0.58))
        for seed in (0, 1)
    }
    lines = table1_tables.markdown(found).splitlines()
    assert f"| dual | {own} | 2 | 0.590 / 0.295 |" in lines and f"| {own} | 0.580 | 0.290 | 0.435 |" in lines
    scores = lines[: lines.index("## Seed 0 of dual: every method on the same rows")]
    assert [line.split("|")[1].strip() for line in scores if line[:2] == "| "][1:] == [
        *("base model", "fedrouter+", "fedit", own),
        *(f"**{method}, gain over the best baseline**" for method in ("fedrouter+", own)),
    ]
    assert sum("+51.3 % over fedit" in line for line in scores) == 1
    configs = table1.configs(table1.Table1(methods=(own, f"{own}+"), scenarios=("dual",), once=(), seeds=1))
    plain, staggered = configs[f"dual-{own}-0"], configs[f"dual-{own}+-0"]
    assert (plain.strategy, plain.rounds.turns) == (own, "own")
    assert staggered == replace(plain, rounds=replace(plain.rounds, turns="staggered"))
    with pytest.raises(UserError, match="--strategy nowhere:method: not to be imported"):
        table1.main(table1.Table1(smoke=True, methods=("fedit", "nowhere:method")))


def test_the_base_model_is_that_of_the_method_that_comes_first():
    """Whichever of the names sorts first or last: another method in the table does not change its row."""
    found = {f"dual-{method}-0": made(method, 0, 0.4) for method in ("clustered", "fedrouter", "rolora", "unheard-of")}
    for number, name in enumerate(sorted(found)):
        found[name]["scores"]["base"]["rouge1"]["mean"] = 0.1 + 0.01 * number
    assert table1_tables.cells(found)["dual", "personalised", table1_tables.UNTRAINED] == {0: pytest.approx(0.11)}


def test_the_least_loss_is_the_best_and_runs_without_one_are_left_out():
    found = {
        f"dual-{method}-{seed}": made(method, seed, 0.4)
        for method in ("fedrouter+", "fedit", "local")
        for seed in (0, 1)
    }
    assert "Loss" not in table1_tables.markdown(found)
    for name, loss in (("fedrouter+", 1.5), ("fedit", 2.0)):
        for seed in (0, 1):
            for part, scores in found[f"dual-{name}-{seed}"]["scores"].items():
                scores["loss"] = {"mean": (3.0 if part in SCORES else loss) + 0.02 * seed, "per_task": {}}
    found["dual-ifca-7"] = made("ifca", 7, 0.4)  # another seed: its loss is that of other rows
    for scores in found["dual-ifca-7"]["scores"].values():
        scores["loss"] = {"mean": 0.1, "per_task": {}}
    lines = table1_tables.markdown(found).split("## Loss of the reference answers")[1].split("\n## ")[0].splitlines()
    row = {line.split("|")[1].strip(): line for line in lines if line[:2] == "| "}
    assert "**1.510 ± 0.127**" in row["fedrouter+"] and "**" not in row["fedit"] and not {"local", "ifca"} & {*row}
    assert "-24.9 % over fedit (-0.500 ± 0.000; 2 seeds)" in row["**fedrouter+, gain over the best baseline**"]


@pytest.mark.parametrize(("seeds", "best"), [((0, 0), ["fedrouter+"]), ((0, 1), []), (((0, 1), (2, 3)), [])])
def test_the_best_is_told_of_equal_seeds_alone(seeds, best):
    """And it is never the base model, which has those of all methods and is better here."""
    found = {
        f"dual-{method}-{seed}": made(method, seed, score)
        for (method, score), some in zip((("fedrouter+", 0.09), ("fedit", 0.08)), seeds, strict=True)
        for seed in np.atleast_1d(some).tolist()
    }
    found["dual-ifca-0"] = made("ifca", 0, 0.05)
    lines = table1_tables.scores(table1_tables.cells(found), ("fedrouter+", "fedit", "ifca"))
    assert [line.split("|")[1].strip() for line in lines if "**0." in line] == best


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"data": replace(smoke().data, clients=8)}, "clients is 4 in dual-fedit-0 and 8 in dual-local-0"),
        ({"local": replace(smoke().local, batch=3)}, "batch is 4 in dual-fedit-0 and 3 in dual-local-0"),
        ({"model": "other"}, "model is 'tiny' in dual-fedit-0 and 'other' in dual-local-0"),
        ({"seed": 1, "strategy": "local", "data": replace(smoke().data, scenario="all")}, ""),
        ({"local": replace(smoke().local, learning_rate=1e-3)}, "learning_rate is 0.005 in dual-local-1 and 0.001"),
    ],
)
def test_a_table_of_unequal_budgets_is_refused(changed, expected):
    """But for the learning rate, which a method may have for itself."""
    config = replace(smoke(), data=replace(smoke().data, scenario="dual"))
    configs = {"dual-fedit-0": replace(config, local=replace(config.local, learning_rate=1e-2))}
    configs |= {"dual-local-1": config, "dual-local-0": replace(config, **changed)}
    configs["dual-fedgone-0"] = replace(config, model="unknown")  # of another version: it is not shown
    if expected:
        with pytest.raises(UserError, match=expected):
            table1_tables.check(configs)
    else:
        table1_tables.check(configs)


def test_a_method_without_a_rival_is_no_best():
    """In Single alone two methods ran."""
    names = ("dual-fedrouter+-0", "single-fedrouter+-0", "single-fedit-0")
    found = {name: made(name.split("-")[1], 0, 0.5) for name in names}
    head, _, *rows = table1_tables.scores(table1_tables.cells(found), ("fedrouter+", "fedit"))
    (row,) = (line for line in rows if line.startswith("| fedrouter+ "))
    pairs = zip(*(text[2:-2].split(" | ") for text in (head, row)), strict=True)
    best = {name.split(", ")[1] for name, cell in pairs if "**" in cell}
    assert best == {"single"}


def test_means_that_are_compared_are_of_the_same_seeds():
    """A method with more seeds than another shows those that both have; its gain is over all of its own."""
    found = {
        f"dual-{method}-{seed}": made(method, seed, score + 0.02 * seed)
        for method, score, seeds in (("fedrouter", 0.48, 4), ("fedit", 0.38, 4), ("local", 0.3, 2), ("ifca", 0.9, 1))
        for seed in range(seeds)
    }
    found["dual-flora-9"] = made("flora", 9, 0.95)  # once, with a seed that no other has
    lines = table1_tables.scores(table1_tables.cells(found), tuple(METHODS))
    row = {line.split("|")[1].strip(): line for line in lines}
    wanted = {"fedrouter": "**0.490 ± 0.127**", "local": "0.310 ± 0.127", "ifca": "0.900", "flora": "0.950"}
    for method, cell in wanted.items():
        assert f"| {cell} |" in row[method]
    assert "over fedit (+0.100 ± 0.000; 4 seeds)" in row["**fedrouter, gain over the best baseline**"]


def test_a_method_that_is_no_more_is_no_baseline():
    found = {f"dual-{m}-{seed}": made("fedit", seed, 0.4) for m in ("fedrouter", "fedit") for seed in (0, 1)}
    lines = table1_tables.scores(table1_tables.cells(found), tuple(METHODS))
    found |= {f"dual-fedgone-{seed}": made("fedit", seed, 0.6) for seed in (1, 2)}  # left in the folder
    assert table1_tables.scores(table1_tables.cells(found), tuple(METHODS)) == lines


def test_nobody_gains_over_the_untrained_model():
    found = {f"all-fedrouter-{seed}": made("fedrouter", seed, 0.5) for seed in (0, 1)}
    last = table1_tables.scores(table1_tables.cells(found), tuple(METHODS))[-1]
    assert [cell.strip() for cell in last.split("|")[2:-1]] == ["", ""]


def test_a_summary_older_than_a_field_is_still_known(tmp_path):
    summary = made("fedrouter", 0, 0.5)
    del summary["config"]["local"]["proximal"]
    (tmp_path / "one.json").write_text(json.dumps(summary))
    assert summaries.known(tmp_path / "one.json", smoke())
    changed = replace(smoke(), local=replace(smoke().local, proximal=0.1))
    assert not summaries.known(tmp_path / "one.json", changed)


def test_a_summary_is_known_by_its_config_wherever_the_data_lay(tmp_path):
    config = replace(smoke(), data=replace(smoke().data, data="/here/flan4"))
    path = tmp_path / "one.json"
    summary = made("fedrouter", 0, 0.5)
    summary["config"]["data"] |= {"data": "flan4"}
    path.write_text(json.dumps(summary))
    assert summaries.known(path, config)
    assert summaries.known(path, replace(config, data=replace(config.data, data="/there/flan4")))
    assert summaries.known(path, replace(config, compute=replace(config.compute, rows_at_once=7)))  # only faster
    assert not summaries.known(path, replace(config, seed=1))
    assert not summaries.known(tmp_path / "none.json", config)


def test_a_summary_of_other_rows_under_the_same_name_is_refused(tmp_path):
    folder, kept = tmp_path / "rows", tmp_path / "kept"
    folder.mkdir(), kept.mkdir()
    config = replace(smoke(), data=replace(smoke().data, data=str(folder)))

    def write(answer):
        for name in ("train", "test"):
            row = {"instruction": f"{name}?", "output": answer, "task": "qqp"}
            (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")

    assert sweep.rows_now({"one": config}) == {"one": None}  # they are not here
    write("a")
    rows = sweep.rows_now({"one": config})
    summary = made("fedrouter", 0, 0.5)
    summary["config"]["data"] |= {"data": "rows"}
    summary["data"] = rows["one"]
    (kept / "one.json").write_text(json.dumps(summary))
    assert sweep.summarised({"one": config}, kept, rows) == {"one"}
    write("b")
    for asked in ("one", "another"):  # a table draws all there are
        with pytest.raises(UserError, match="one.json is of other rows than rows has now"):
            sweep.summarised({asked: config}, kept, sweep.rows_now({asked: config}))
    elsewhere = replace(config, data=replace(config.data, data="elsewhere"))
    assert not sweep.summarised({"another": elsewhere}, kept, {"another": "other rows"})
    del summary["data"]  # of an older version
    (kept / "one.json").write_text(json.dumps(summary))
    assert sweep.summarised({"one": config}, kept, rows) == {"one"}
    out = tmp_path / "out" / "two"
    out.mkdir(parents=True)
    (out / "config.json").write_text(to_json(config))
    (out / "clusters.json").write_text(json.dumps({"data": rows["one"]}))
    with pytest.raises(UserError, match="the rows of .* were others then"):
        sweep.sweep({"two": config}, tmp_path / "out", Console(quiet=True))


@pytest.mark.parametrize(
    "text, expected", [('{"config": {"mod', "not a JSON object"), ("{}", "'accuracy'"), ("[]", "not a JSON object")]
)
def test_a_damaged_summary_is_named(text, expected, tmp_path):
    (tmp_path / "one.json").write_text(text)
    for read in (lambda: summaries.known(tmp_path / "one.json", smoke()), lambda: summaries.load(tmp_path)):
        with pytest.raises(UserError, match=f"one.json.*{expected}.*; restore the file,? or remove it"):
            read()


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
        (tmp_path / folder / "other.json").write_text(json.dumps(made("fedit", 0, 0.5)))
    with pytest.raises(UserError, match="runs holds no run of the table to draw"):
        table1.main(table1.Table1(redraw=True, out=tmp_path))
    with pytest.raises(UserError, match="clients holds no run of the study to draw; remove other.json"):
        studies.main(studies.Studies(redraw=True, out=tmp_path))
    with pytest.raises(UserError, match="rounds holds no summaries to draw"):
        studies.main(studies.Studies(("rounds",), redraw=True, out=tmp_path))


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
    assert list(chosen) == ["fedit-0.005-0", "fedlease-0.001-0", "fedit-0.005-1", "fedlease-0.001-1"]
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
    found = {f"fedit-{task}-0": made("fedit", 0, 0.5) for task in ("none", "samsum")}
    for axes in studies.figure("unseen", found).axes:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["none", "samsum"]


def test_no_committed_run_would_run_again():
    """What the sweeps would run today is what their committed summaries hold."""
    results = ROOT / "docs" / "results"
    for name, config in table1.configs(table1.Table1()).items():
        assert summaries.known(results / "table1" / "runs" / f"{name}.json", config), name
    for budget, folder in (("short", "table1"), ("long", "table1-long"), ("full", "table1-full")):
        of_table = table1.configs(table1.Table1(seeds=20, methods=tuple(METHODS), once=(), budget=budget))
        for name in summaries.load(results / folder / "runs"):
            assert summaries.known(results / folder / "runs" / f"{name}.json", of_table[name]), name
    for folder in sorted(path for path in (results / "studies").iterdir() if path.is_dir()):
        of_study = studies.configs(folder.name, studies.Studies(seeds=5))
        for name in summaries.load(folder):
            assert summaries.known(folder / f"{name}.json", of_study[name]), name
