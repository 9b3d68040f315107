"""What joins the parts: each is given what the config, the round and the state say. Alone they are tested elsewhere."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import begun

from fedrouter_jax import answers, clusters, embed, evaluate, experiment, export, plan, routing, runs
from fedrouter_jax import method as method_lib
from fedrouter_jax.cli import main
from fedrouter_jax.config import Config, DataConfig
from fedrouter_jax.data import schedule, synthetic, tokens
from fedrouter_jax.data.schedule import RoundConfig
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import model_config
from fedrouter_jax.models.parameters import param_shapes
from fedrouter_jax.presets import smoke
from fedrouter_jax.types import Work

JOINING = {"scenario": "all", "clients": 5, "newcomers": 2}


def test_rounds_draw_other_rows_and_so_do_seeds():
    prepared, enrolment, *_ = begun("fedit")
    other = prepared._replace(config=dataclasses.replace(prepared.config, seed=1))
    rows = experiment.members(prepared, enrolment)
    given = ((prepared, 1), (prepared, 1), (prepared, 2), (other, 1))
    first, again, *others = (experiment.round_inputs(who, rows, t)[1].rows.packs.tokens.tobytes() for who, t in given)
    assert first == again and len({first, *others}) == 3


def test_seeds_deal_the_same_rows_otherwise():
    rows = synthetic.make(0)
    one, again, two = (
        experiment.prepare(dataclasses.replace(smoke(), seed=seed), dataset=rows).partition for seed in (0, 0, 1)
    )
    assert one == again != two


@pytest.mark.parametrize("quantise, dtype", [("none", "float32"), ("nf4", "float32"), ("none", "bfloat16")])
def test_the_base_is_of_the_configs_numbers(quantise, dtype):
    params = experiment.prepare(dataclasses.replace(smoke(), quantise=quantise, dtype=dtype)).model.params
    assert ("codes" in params["blocks"]["q_proj"]) == (quantise == "nf4")
    assert params["embedding"].dtype.itemsize == (2 if dtype == "bfloat16" else 4)


@pytest.mark.parametrize("recipe, depth, skip", [("paper", None, 0), ("standardised", 5 / 6, 0), ("refined", 1 / 6, 1)])
def test_texts_are_embedded_by_the_recipe_of_the_config(recipe, depth, skip):
    cluster = dataclasses.replace(smoke().cluster, recipe=recipe)
    prepared = experiment.prepare(dataclasses.replace(smoke(), cluster=cluster))
    texts, model = ["one two three", "four"], prepared.model
    ids = tokens.encode_texts(model.tokenizer, texts, 320)
    expected = embed.embed(model.config, model.params, ids, depth, skip=skip)
    np.testing.assert_allclose(experiment.embed_texts(prepared, texts), expected, rtol=1e-4, atol=1e-5)
    assert embed.blocks(model.config, 1 / 6) == 1  # of two blocks, never none


def test_clusters_are_looked_for_as_the_config_says(monkeypatch):
    asked = []
    monkeypatch.setattr(routing, "enroll", lambda *given: asked.append(given[2:]) or routing.one_cluster_each([1], 1))
    counts = {"max_clusters": 3, "local_clusters": 2, "global_clusters": 5, "recipe": "paper"}
    begun("fedrouter", cluster=counts, data=JOINING)
    assert asked == [(routing.RECIPES["paper"], 2, 5, 3, 2)]


def test_staggered_turns_are_those_of_all_clusters_of_a_round_and_of_who_trains(monkeypatch):
    asked = []
    monkeypatch.setattr(routing, "staggered", lambda found, *given: asked.append(given) or found)
    begun("oracle", data=JOINING, rounds={"turns": "staggered", "rounds": 7, "clusters_per_round": 2})
    assert asked == [(7, 2, 2)]


def test_ifcas_clients_are_dealt_to_all_slots():
    *_, state, _ = begun("ifca", cluster={"global_clusters": 2})
    assert sorted(state.table[:, 0].tolist()) == [0, 0, 1, 1]


def test_scaffolds_mean_is_of_who_trains():
    strategy = method_lib.strategy(Config("scaffold", data=DataConfig(clients=4, newcomers=1)), None)
    prepared, enrolment, state, _ = begun("scaffold")
    state = state._replace(memory=jax.tree.map(lambda leaf: jnp.ones_like(leaf).at[3].set(0), state.memory))
    drift = strategy.ask(state, Work(*(np.zeros(1, int),) * 3))["drift"]
    assert {float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(drift)} == {0}  # all three have one; by four, 1/4


def test_a_run_answers_when_its_clients_have_settled(monkeypatch):
    """What `settle` does is asked of it alone; `route` and scores take what comes of it."""
    settled = []
    monkeypatch.setattr(runs.experiment, "settle", lambda prepared, state: settled.append(state) or "settled")
    prepared, enrolment, state, _ = begun("ifca", cluster={"global_clusters": 2})
    found = runs.answering(runs.Loaded(prepared, enrolment, [], state, None))
    assert found.state == "settled" and len(settled) == 1


def test_an_exported_run_of_ifca_names_the_slots_of_who_took_part(tmp_path):
    prepared, _, state, _ = begun("ifca", cluster={"global_clusters": 2}, rounds={"participation": 0.5})
    export.write(tmp_path, prepared, state._replace(round=jnp.full((), 2, jnp.int32)), [])
    whose = json.loads((tmp_path / "adapters" / "clients.json").read_text())
    drawn = schedule.drawn(4, 2, 0.5, prepared.config.seed)
    assert sorted(map(int, whose)) == sorted(drawn.tolist()) and len(whose) == 2


@pytest.mark.parametrize("recipe", routing.RECIPES)
def test_an_exported_router_says_how_its_recipe_embeds(recipe, tmp_path):
    prepared, _, state, _ = begun("fedrouter", cluster={"recipe": recipe})
    export.write(tmp_path, prepared._replace(model=prepared.model._replace(base_name="owner/base")), state, [""] * 4)
    said = json.loads((tmp_path / "router" / "router.json").read_text())
    depth, skip = routing.RECIPES[recipe].depth, routing.RECIPES[recipe].skip
    blocks = embed.blocks(prepared.model.config, depth)
    assert (said["layers"], said["final_norm"], said["skip"]) == (blocks, depth is None, skip)
    adapter = json.loads((tmp_path / "adapters" / "cluster_0" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == said["base_model"] == "owner/base"


def test_the_states_that_feddpa_compares_are_the_last_tokens():
    prepared, _, state, _ = begun("feddpa-t")
    prompts, model = [row.prompt for row in prepared.test.values()][:3], prepared.model
    found = answers.states(prepared, state, prompts, np.zeros((3, 5), np.float32))
    expected = embed.embed(model.config, model.params, prompts, None, last=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_feddpas_references_are_drawn_by_the_configs_seed(monkeypatch):
    prepared, _, state, _ = begun("feddpa-t")
    asked = []
    monkeypatch.setattr(answers, "states", lambda p, s, prompts, _: asked.append(prompts) or np.zeros((20, 64)))
    for seed in (0, 0, 1):
        of_seed = prepared._replace(config=dataclasses.replace(prepared.config, seed=seed))
        evaluate.view(of_seed, state, None, None, []).references(jnp.eye(4, 5, k=1))
    assert asked[0] == asked[1] != asked[2]


def test_newcomers_have_no_part_in_what_is_said_of_global_clusters_and_of_rows_that_training_has_seen():
    prepared, enrolment, *_ = begun("fedrouter", data=JOINING)
    before = clusters.describe(prepared, enrolment)
    labels = np.array(enrolment.labels)
    labels[3:] = 0  # all rows of a newcomer as one cluster
    test = list(prepared.dataset.test)
    row = next(iter(prepared.test))
    alone = {*prepared.partition.clients[4].train} - {i for held in prepared.partition.clients[:3] for i in held.train}
    test[row] = test[row]._replace(instruction=prepared.dataset.train[min(alone)].instruction)
    known = prepared._replace(dataset=prepared.dataset._replace(test=tuple(test)))
    after = clusters.describe(known, enrolment._replace(labels=labels))
    assert after["accuracy"]["global"] == before["accuracy"]["global"]
    assert after["accuracy"]["local"] != before["accuracy"]["local"]
    assert after["seen_rows"] == before["seen_rows"] == 0


@pytest.mark.parametrize("scenario, held", [("single", 1), ("dual", 2), ("all", 4)])
def test_a_plan_has_the_lanes_of_the_scenario(scenario, held):
    data = dataclasses.replace(smoke().data, scenario=scenario)
    one, every = (
        plan.plan(dataclasses.replace(smoke(), data=data, rounds=RoundConfig(clusters_per_round=each)), 60, 12)
        for each in (1, 0)
    )
    assert every.tokens == held * one.tokens
    config = dataclasses.replace(smoke(), data=data, rounds=RoundConfig(clusters_per_round=0))
    three = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, local_clusters=3))
    assert plan.plan(three, 60, 12).tokens == 3 * one.tokens


def test_the_command_plans_for_as_many_devices_as_it_is_told(capsys):
    seconds = []
    for devices in ("1", "4"):
        assert main(["plan", "--preset", "smoke", "--devices", devices, "--rate", "1", "--json"]) == 0
        seconds.append(json.loads(capsys.readouterr().out)["seconds"])
    assert seconds[0] == pytest.approx(4 * seconds[1])


def test_options_without_effect_are_told_before_a_run_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "run", lambda *_: (_ for _ in ()).throw(UserError("no more is wanted")))
    idle = ["--strategy", "fedit", "--turns", "staggered"]
    assert main(["run", "--preset", "smoke", *idle, "--out", str(tmp_path)]) == 2
    assert "note: without effect here: --turns (fedit clusters no rows)" in capsys.readouterr().err


def test_a_plan_counts_what_is_computed_beside_a_kernel_that_moves():
    """FedEx's sum of products is multiplied like a kernel: four operations more a number of each target and token."""
    fedit, fedex = (plan.plan(dataclasses.replace(smoke(), strategy=name), 60, 12) for name in ("fedit", "fedex"))
    shapes = param_shapes(model_config("tiny"))["blocks"]
    moved = sum(math.prod(shapes[module]["kernel"].shape) for module in smoke().lora.targets)
    assert fedex.flops - fedit.flops == pytest.approx(4 * moved * fedit.tokens)
