"""The experiments' own arithmetic: summaries, intervals, the table. The runs behind them are tested elsewhere."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy.stats import ttest_1samp

from experiments import (
    bench,
    clustering,
    clustering_figures,
    hlo,
    limit,
    precision,
    profiled,
    studies,
    summaries,
    table1,
    table1_tables,
)
from experiments.methods import METHODS
from fedrouter_jax import routing
from fedrouter_jax.config import to_json
from fedrouter_jax.errors import UserError
from fedrouter_jax.lora import LoRAConfig
from fedrouter_jax.presets import smoke

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
    assert all(len(made) <= 2 and {config.model for config in made.values()} == {"tiny"} for made in smokes.values())
    assert len(table1.configs(table1.Table1(smoke=True))) == 2


def test_a_value_that_the_smoke_run_has_too_is_drawn_once():
    found = {f"fedit-{task}-0": made("fedit", 0, 0.5) for task in ("none", "samsum")}
    for axes in studies.figure("unseen", found).axes:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["none", "samsum"]


@pytest.mark.parametrize("redraw", [True, False])
@pytest.mark.parametrize(
    "text, expected", [("{", "not a JSON object"), ("{}", "Field required"), ('{"records": [{}]}', "Field required")]
)
def test_a_damaged_measurement_of_clusters_is_named(text, expected, redraw, tmp_path):
    (tmp_path / "clustering.json").write_text(text)
    with pytest.raises(UserError, match=f"clustering.json: .*{expected}.*; restore the file, or remove it"):
        clustering.main(clustering.Clustering(smoke=True, redraw=redraw, out=tmp_path))


def test_a_measurement_of_clusters_that_was_stopped_is_drawn_as_far_as_it_got(tmp_path):
    found = json.loads((ROOT / "docs" / "results" / "clustering" / "clustering.json").read_text(encoding="utf-8"))
    whole = clustering_figures.left_out(found)
    last = next(i for i, r in enumerate(found["records"]) if (r["set"], r["seed"]) == ("the other five", 1))
    assert clustering_figures.left_out(found | {"records": found["records"][: last + 2]}) == whole[:6]
    (tmp_path / "clustering.json").write_text(json.dumps(found | {"records": found["records"][:1]}))
    with pytest.raises(UserError, match="holds no picture of 'refined' yet"):
        clustering_figures.draw(tmp_path)


def test_no_name_in_a_figure_lies_over_another():
    results = ROOT / "docs" / "results"
    clusters = json.loads((results / "clustering" / "clustering.json").read_text(encoding="utf-8"))
    tables = (results / f"table1{end}" / "runs" for end in ("", "-long", "-full"))
    benches = (ROOT / "docs" / "bench").glob("*cores/bench.json")
    figures = [
        clustering_figures.silhouettes(clusters),
        clustering_figures.others(clusters),
        *(table1_tables.figure(summaries.load(path)) for path in tables),
        *(studies.figure(path.name, summaries.load(path)) for path in (results / "studies").iterdir() if path.is_dir()),
        *(bench.figure(json.loads(path.read_text(encoding="utf-8"))) for path in benches),
    ]
    for figure in figures:
        FigureCanvasAgg(figure).draw()
        boxes = {}
        for axes in figure.axes:
            ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
            for text in (*ticks, axes.xaxis.label, axes.yaxis.label, axes.title):
                if any(map(str.isalpha, text.get_text())):  # numbers are placed by matplotlib itself
                    boxes[text] = text.get_window_extent()
        for one, other in itertools.combinations(boxes, 2):
            assert not boxes[one].overlaps(boxes[other]), (one, other)


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


def test_recipes_without_the_one_that_is_drawn_are_refused(tmp_path):
    with pytest.raises(UserError, match="--recipes lacks 'refined'"):
        clustering.main(clustering.Clustering(recipes=("paper",), smoke=True, out=tmp_path))


@pytest.mark.parametrize("wrong, expected", [(0, 1.0), (4, 0.8)])
def test_clustering_accuracy_matches_clusters_to_tasks(wrong, expected):
    tasks = [np.repeat([0, 1], 5), np.repeat([0, 1], 5)]
    labels = np.stack([1 - tasks[0], tasks[1]]).astype(np.int32)  # the numbers of clusters mean nothing
    labels[0, :wrong] = 0
    found = routing.Enrolment(np.array([[1, 0], [0, 1]]), 2, (), labels, {})
    assert clustering.accuracy(found, tasks, 2) == (expected, expected)


def test_fewer_bits_take_fewer_bytes_and_hardly_move_the_loss():
    base = smoke()
    config = replace(base, data=replace(base.data, mix_rows=6))
    found = {
        name: precision.measure(replace(config, dtype=dtype, quantise=quantise))[1]
        for name, (dtype, quantise) in precision.PRECISIONS.items()
    }
    whole = found["float32"]
    assert found["bfloat16"]["bytes"] == whole["bytes"] / 2 and found["mixed"]["bytes"] < 0.51 * whole["bytes"]
    assert found["nf4"]["block_bytes"] < whole["block_bytes"] / 5 and found["int8"]["bytes"] < whole["bytes"]
    for row in found.values():
        assert abs(row["loss"] - whole["loss"]) < 0.1 and row["loss"] < 2 * np.log(300)


def test_the_loss_of_a_base_is_that_of_a_token(monkeypatch):
    lengths = []

    def losses(config, params, rows, *_):
        lengths.extend(len(row.response) for row in rows)
        return np.arange(len(rows))

    monkeypatch.setattr(precision.likelihood, "losses", losses)
    monkeypatch.setattr(precision.generate, "generate", lambda config, params, prompts, *_, **__: [[]] * len(prompts))
    rows, found = precision.measure(smoke())
    assert found["loss"] == pytest.approx(np.dot(lengths, range(rows)) / sum(lengths)) and len({*lengths}) > 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("jit(train)/transpose(jvp(Decoder))/blocks/attention/bkgqd,bksd->bkgqs/dot_general", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("jit(train)/jvp(Decoder)/blocks/q_proj/adapter/dot_general", "adapters"),
        ("jit(train)/jvp(Decoder)/blocks/q_proj/dot_general", "frozen matrices"),
        ("nvjet_sm90_tst_128x128_64x6_2x1_v_bz_NNT", "frozen matrices"),
        ("jit(train)/jvp(loss)/reduce_max", "head and loss"),
        ("jit(train)/jvp(norm)/mul", "norms"),
        ("MemcpyD2D", "copies"),
        ("jit(train)/jvp(Decoder)/blocks/jit(silu)/mul", profiled.REST),
    ],
)
def test_a_kernel_is_of_the_kind_its_name_says(name, kind):
    assert profiled.kind_of(name) == kind


def test_a_product_that_lost_its_name_goes_by_that_of_what_it_reads():
    named = 'metadata={op_name="jit(f)/attention/slice"}'
    text = f"""
  %slice.1 = f32[3,64,64] copy(%p.1), {named}
  %ynn_fusion.2 = f32[3,64,64] fusion(%slice.1, %p.2), backend_config={{"fusion_config":{{"kind":"__ynn_fusion"}}}}
  ROOT %dot.3 = f32[3,64,64] dot(%p.2, %slice.1), metadata={{stack_frame_id=3}}
  %copy.4 = f32[3,64,64] copy(%slice.1)
"""
    assert hlo.names(text) == {"slice.1": "jit(f)/attention/slice", "ynn_fusion.2": "jit(f)/attention/slice"}


def test_the_limit_is_measured_on_all_devices(tmp_path):
    options = ["--dtypes", "float32", "--lanes", "2", "--groups", "2", "--smoke", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "experiments.limit", *options]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"}, check=True, capture_output=True)
    found = json.loads((tmp_path / "limit.json").read_text())
    assert found["devices"] == 2 and "2 devices" in (tmp_path / "limit.md").read_text()
    (row,) = found["rows"]
    same = limit.Limit(lanes=2, groups=2, smoke=True)
    assert row["useful_tokens"] == limit.rows_of_a_turn(limit.SMALL, same)[1]  # of both devices
    assert row["tokens_a_second"] > 0


def test_training_is_measured_beside_the_limit(tmp_path, monkeypatch):
    options = limit.Limit(dtypes=("mixed",), packs=3, lanes=2, groups=2, smoke=True, profile=True, out=tmp_path)
    cache, kinds = jax.config.jax_compilation_cache_dir, []
    monkeypatch.setattr(limit, "matrix_rate", lambda dtype: kinds.append(dtype) or 1e9)
    try:
        limit.main(options)
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    (row,) = json.loads((tmp_path / "limit.json").read_text())["rows"]
    assert kinds == ["bfloat16"]  # what the matrices are multiplied in
    batch, useful = limit.rows_of_a_turn(limit.SMALL, options)
    assert row["useful_tokens"] == useful == (batch.rows.packs.segments > 0).sum()
    assert max(batch.count.ravel()) <= 3  # so a step is one turn, whose empty packs are computed, too
    assert row["useful_share"] == useful / (3 * batch.count.size * batch.rows.lane.shape[-1])
    assert row["flops"] == pytest.approx(4 * row["block_parameters"] * row["tokens_a_second"])
    assert row["share"] == pytest.approx(row["flops"] / row["matrix_rate"])
    shown = (tmp_path / "limit.md").read_text()
    assert f"**{100 * row['share']:.0f} %**" in shown
    named = {*profiled.KINDS, profiled.REST}
    assert {"frozen matrices", "attention", "adapters", "head and loss", "norms"} <= set(row["profile"]) <= named
    total = sum(row["profile"].values())
    assert f" | {100 * row['profile']['attention'] / total:.0f} | " in shown.splitlines()[-1]
    with pytest.raises(UserError, match="no shape is called 'gpt'"):
        limit.main(limit.Limit(shapes=("gpt",)))
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--groups is 3, but there are 2 devices; give a multiple"):
        limit.main(limit.Limit(groups=3))
