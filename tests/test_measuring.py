"""What experiments measure is of the types, recipes, flows and seeds that their tables name: what joins their parts."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from rich.console import Console

from experiments import bench_measure, bench_phases, clustering, limit, precision, rates, sweep, table1
from experiments.torch_baseline import flow
from fedrouter_jax import experiment, routing
from fedrouter_jax.data.rows import Row
from fedrouter_jax.errors import UserError
from fedrouter_jax.models.decoder import Blocks
from fedrouter_jax.presets import smoke

QUIET = Console(quiet=True)


class Seen(Exception):
    """All that a test wants to know is known."""


def seen(*_, **__):
    raise Seen


def test_a_sweep_loads_the_model_of_each_run(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(sweep, "load_model", lambda *given: given[:3])
    monkeypatch.setattr(sweep.runs, "run", lambda config, folder, track, shared: used.append((config, shared.model)))
    monkeypatch.setattr(sweep.report, "write", lambda *_: None)
    changes = {"a": {}, "b": {"dtype": "bfloat16"}, "c": {"dtype": "bfloat16"}, "d": {"quantise": "nf4"}}
    sweep.sweep({name: replace(smoke(), **change) for name, change in changes.items()}, tmp_path, QUIET)
    assert [model for _, model in used] == [(c.model, c.dtype, c.quantise) for c, _ in used] and len(used) == 4


def test_rates_are_not_chosen_by_rows_that_another_seed_tests(tmp_path):
    """Synthetic rows are drawn by each seed, so some of the rows that are held out might be among them."""
    options = table1.Table1(methods=("fedit",), scenarios=("dual",), once=(), rates=(0.005, 0.01), seeds=2, smoke=True)
    with pytest.raises(UserError, match="--rates"):
        table1.main(replace(options, out=tmp_path))


def test_each_recipe_is_measured_by_its_own_embeddings(tmp_path, monkeypatch):
    recipes = []

    def cluster(states, seed, recipe, *_):
        recipes.append(recipe)
        wanted = clustering.RECIPES[recipe]
        assert {*states.values()} == {(wanted.depth, wanted.skip)}
        return {"local": 1.0, "global": 1.0}

    monkeypatch.setattr(clustering, "embedded", lambda model, rows, _, *how: dict.fromkeys(rows, how))
    monkeypatch.setattr(clustering, "cluster", cluster)
    clustering.measure(clustering.Clustering(model="tiny", rows=2, clients=2, smoke=True), tmp_path / "c.json")
    assert {*recipes} == {*clustering.RECIPES}
    standardised = routing.Recipe(depth=1 / 6, standardise=True, restarts=20)
    refined = standardised._replace(lloyd=10, skip=1)
    assert (clustering.RECIPES["shallow"], clustering.RECIPES["refined"]) == (standardised, refined)
    assert clustering.RECIPES["depth 1/2"] == standardised._replace(depth=1 / 2)
    assert clustering.RECIPES["refined, first token kept"] == refined._replace(skip=0)


def test_embeddings_that_are_kept_are_told_apart_by_how_they_were_made(tiny, tmp_path):
    rows = {"a": [Row("one two three", "", "a")]}
    made = [clustering.embedded(tiny, rows, tmp_path, 1 / 2, skip)["a"] for skip in (0, 1, 0)]
    assert (made[0] == made[2]).all() and (made[0] != made[1]).any()


def test_each_seed_of_a_clustering_deals_and_starts_anew(monkeypatch):
    given = []
    monkeypatch.setattr(routing, "enroll", lambda key, points, *_: given.append((key, points)))
    monkeypatch.setattr(clustering.clusters, "accuracy", lambda *_: (1.0, 1.0))
    states = {task: np.random.default_rng(ord(task)).normal(size=(8, 3)) for task in "ab"}
    for seed in (0, 0, 1):
        clustering.cluster(states, seed, "paper", 2)
    keys, points = zip(*((key.tolist(), np.concatenate(held).tolist()) for key, held in
                         ((jax.random.key_data(key), held) for key, held in given)), strict=True)  # fmt: skip
    assert keys[0] == keys[1] != keys[2] and points[0] == points[1] != points[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rates_of_products_are_of_the_type_asked_for(dtype, monkeypatch):
    kinds = []
    monkeypatch.setattr(rates, "matrix_rows", lambda: 4)
    for module in (rates, bench_measure):
        monkeypatch.setattr(module, "best_rate", lambda product, **_: product())
    monkeypatch.setattr(rates.jnp, "matmul", lambda a, b, **how: kinds.append((a.dtype, how)) or a)
    rates.matrix_rate(dtype)
    assert kinds == [(dtype, {"preferred_element_type": jnp.float32})]
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: kinds.append(a.dtype) or a)
    bench_measure.torch_matrix_rate("cpu", dtype, 4)
    assert kinds[1:] == [getattr(torch, dtype)]


@pytest.mark.parametrize("dtype, unroll", [("float32", True), ("bfloat16", False)])
def test_the_limit_is_of_the_base_and_the_blocks_that_its_row_names(dtype, unroll, monkeypatch):
    drawn, asked, real = [], [], limit.drawn
    monkeypatch.setattr(limit, "drawn", lambda decoder, dtype: drawn.append(dtype) or real(decoder, dtype))
    monkeypatch.setattr(limit.client, "make_client_update", lambda *given: asked.append(given[3]) or seen())
    with pytest.raises(Seen):
        limit.measure(limit.SMALL, dtype, limit.Limit(unroll=unroll, lanes=2, smoke=True))
    assert (drawn, asked) == ([dtype], [Blocks(unroll=unroll)])


def test_a_scores_column_is_that_score(monkeypatch):
    monkeypatch.setattr(precision.likelihood, "losses", lambda config, params, rows, *_: np.ones(len(rows)))
    monkeypatch.setattr(precision.generate, "generate", lambda config, params, prompts, *_, **__: [[]] * len(prompts))
    monkeypatch.setattr(precision.rouge, "score", lambda *_: {"rouge1": 0.75, "rouge2": 0.5, "rougeL": 0.25})
    assert precision.measure(smoke())[1]["rouge1"] == 0.75


def test_the_sides_of_the_bench_are_what_they_are_called(tiny, monkeypatch):
    """In float32, beside it rounded to bfloat16 on either side; the published flow, and the best that PyTorch can."""
    assert flow.PUBLISHED == flow.Flow(False, False, False, "nothing", 16)
    assert flow.BEST_EFFORT == flow.Flow(True, True, True, "layer", 16)
    config, sides = smoke(), {}

    def embedding(mine, peers, load):
        sides.update(mine=mine, peers=peers)
        raise Seen

    monkeypatch.setattr(bench_measure, "load_model", lambda dtype: tiny)
    monkeypatch.setattr(bench_phases, "setting", lambda data, load: config)
    monkeypatch.setattr(bench_phases, "embedding", embedding)
    monkeypatch.setattr(bench_measure, "torch_bfloat16", lambda device: True)
    monkeypatch.setattr(bench_measure, "smollm2_path", lambda: None)
    monkeypatch.setattr(flow, "load", lambda gguf, adapter, device, dtype: dtype)
    load = bench_phases.Load(texts=2, steps=1, batch=2, prompts=2, new=4, clients=2, rounds=1)
    with pytest.raises(Seen):
        bench_measure.measure("synthetic", load, "float32", 1, True, "model", QUIET)
    mine = {name: prepared.model.params["blocks"]["q_proj"]["kernel"].dtype for name, prepared in sides["mine"].items()}
    assert mine["ours"] == "float32" and mine["ours, mixed"].itemsize == 2
    best = replace(flow.BEST_EFFORT, compiled="model")
    assert [tuple(peer) for peer in sides["peers"]] == [
        ("published", flow.PUBLISHED, torch.float32),
        ("best effort", best, torch.float32),
        ("best effort, bf16", best, torch.bfloat16),
    ]


def test_the_bench_embeds_by_the_recipe_that_a_side_is_called_by(monkeypatch):
    prepared = experiment.prepare(replace(smoke(), cluster=replace(smoke().cluster, recipe="paper")))
    load = bench_phases.Load(texts=2, steps=1, batch=2, prompts=2, new=4, clients=2, rounds=1)
    monkeypatch.setattr(experiment, "embed_texts", lambda prepared, texts: prepared.config.cluster.recipe)
    sides = bench_phases.embedding({"ours": prepared}, [], load).sides
    assert {side: embed() for side, embed in sides.items()} == {"ours": "paper", "ours, refined": "refined"}


@pytest.mark.parametrize("device, compiled", [("cuda", ["layer"]), ("cpu", [])])
def test_the_tuned_flow_is_compiled_on_a_gpu(device, compiled, monkeypatch):
    asked = []
    config = replace(smoke(), data=replace(smoke().data, clients=bench_phases.LANES))
    base = SimpleNamespace(forward=None)
    model = SimpleNamespace(device=torch.device(device), get_base_model=lambda: base)
    monkeypatch.setattr(flow, "get_peft_model_state_dict", lambda model: {})
    monkeypatch.setattr(flow, "compiled", lambda model, what: asked.append(what) or (base, None))
    monkeypatch.setattr(flow, "train_round", lambda *_: ([], []))
    peers = [bench_phases.Peer("best effort", flow.BEST_EFFORT, model)]
    bench_phases.training({"ours": experiment.prepare(config)}, peers).sides["best effort"]()
    assert asked == compiled
