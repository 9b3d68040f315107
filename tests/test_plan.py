"""The plan against compiled rounds: bytes within 15 per cent, over shapes, lanes, storage and recomputation."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import programs
from fedrouter_jax import bank, experiment, memory, plan
from fedrouter_jax import method as method_lib
from fedrouter_jax.cli import main
from fedrouter_jax.client import LocalConfig
from fedrouter_jax.config import Config
from fedrouter_jax.data import schedule
from fedrouter_jax.data.schedule import RoundConfig
from fedrouter_jax.lora import LoRAConfig
from fedrouter_jax.models import MODULES, model_config
from fedrouter_jax.models.parameters import param_shapes
from fedrouter_jax.presets import smoke
from fedrouter_jax.strategies import STRATEGIES

SMOLLM = plan.SHAPES["smollm2-135m"]
AHEAD = json.loads((Path(__file__).parents[1] / "docs" / "bench" / "ahead.json").read_text())["rows"]

WIDE = dataclasses.replace(SMOLLM, width=1024, heads=16, kv_heads=4, mlp_width=4096, layers=6)
CASES = {
    "135m": (SMOLLM, {}, 1, 1),
    "135m, two of four groups": (SMOLLM, {}, 4, 2),
    "135m, recomputed": (SMOLLM, {"remat": True}, 1, 1),
    "135m, mixed": (SMOLLM, {"dtype": "mixed"}, 1, 1),
    "135m, nf4": (SMOLLM, {"quantise": "nf4"}, 1, 1),
    "wide": (WIDE, {}, 1, 1),
    "135m, 256 adapters, adam": (SMOLLM, {"clusters": 256, "rounds": RoundConfig(server="adam")}, 1, 1),
    "135m, adapters of 512 clients": (SMOLLM, {"strategy": "local", "clients": 512}, 1, 1),
    "135m, directions of 512 clients": (SMOLLM, {"strategy": "clustered", "clients": 512}, 1, 1),
    "wide, fedex": (WIDE, {"strategy": "fedex", "lora": LoRAConfig(targets=MODULES)}, 1, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_planned_memory_is_that_of_the_compiled_round(name):
    decoder, changes, groups, at_once = CASES[name]
    changes = dict(changes)
    remat, clusters = changes.pop("remat", False), changes.pop("clusters", 4)
    clients = changes.pop("clients", groups * 8)
    config = Config(local=LocalConfig(steps=4, batch=2), **changes)
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat=remat))
    pack = memory.Pack(tokens=512, predicted=128, rows=16, lanes=8)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, clients=clients))
    strategy = method_lib.strategy(config, clusters)
    federation = memory.federation(decoder, config, strategy, clusters)
    found = memory.needed(federation, pack, groups, at_once)
    exact = programs.held(programs.round_of(federation, pack, groups, at_once).compile())
    assert found.total == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("row", AHEAD, ids=lambda row: f"{row['target']} {row['shape']} {row['base']} {row['devices']}")
def test_planned_memory_is_that_of_rounds_compiled_for_other_devices(row):
    federation, pack, rows = programs.laid_out(programs.Case(*(row[name] for name in programs.Case._fields)))
    found = memory.needed(federation, pack, programs.GROUPS, row["groups_at_once"], rows > 1)
    assert found.total == pytest.approx(row["round"], rel=0.15)


def test_groups_at_once_share_the_matrix_that_codes_become():
    pack = memory.Pack(tokens=512, predicted=128, rows=16, lanes=8)

    def working(quantise, at_once):
        config = Config(quantise=quantise)
        federation = memory.federation(SMOLLM, config, method_lib.strategy(config, 4), 4)
        return memory.needed(federation, pack, 4, at_once).working

    for at_once in (1, 4):
        assert working("nf4", at_once) - working("none", at_once) == SMOLLM.width * SMOLLM.mlp_width * 4


def test_shapes_have_the_published_numbers_of_parameters():
    published = {"smollm2-135m": 134.5, "smollm2-360m": 361.8, "smollm2-1.7b": 1711.4, "llama-3.2-1b": 1235.8,
                 "llama-3.2-3b": 3212.7, "llama-3.1-8b": 8030.3, "llama-3.1-70b": 70553.7}  # fmt: skip
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(param_shapes(shape))) for name, shape in plan.SHAPES.items()
    }
    assert {name: round(count / 1e6, 1) for name, count in counts.items()} == published
    file = model_config("smollm2-135m")
    assert file == dataclasses.replace(SMOLLM, max_positions=8192, norm_eps=file.norm_eps)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_planned_with_the_state_it_starts_from(name):
    config = dataclasses.replace(smoke(), strategy=name)
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, global_clusters=4))
    prepared = experiment.prepare(config)
    rows = sum(len(held.train) for held in prepared.partition.clients)
    enrolment = experiment.enroll(prepared, np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32))
    state = experiment.start(prepared, enrolment)
    found = memory.federation(prepared.model.config, config, prepared.strategy, 4).state
    assert jax.tree.map(jnp.shape, found.bank) == jax.tree.map(jnp.shape, state.bank)
    work, _ = experiment.round_inputs(prepared, experiment.members(prepared, enrolment), 1)
    made = plan.plan(config, 60, 12)
    assert made.lanes == len(work.client)
    rounds = config.rounds.rounds
    phases = [prepared.strategy.phases(t, rounds) for t in range(1, rounds + 1)]
    wire = max(bank.wire_bytes(prepared.strategy.owners, state.bank, of_round) for of_round in phases)
    wire *= 2 if name == "scaffold" else 1  # control variates, too
    assert made.bytes_up == (0 if prepared.strategy.pooled else len(work.client) * wire)
    assert made.adapter_parameters == sum(leaf[0].size for leaf in jax.tree.leaves(state.bank))


def test_more_groups_at_once_where_there_is_more_memory(capsys):
    sizes = []
    for gib in (2, 4, 64):
        arguments = f"plan --model smollm2-135m --clients 64 --memory {gib} --rate 1 --json".split()
        assert main(arguments) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["memory"]["total"] <= gib * 2**30 and found["lanes"] == 64
        sizes.append(found["groups_at_once"])
    assert 1 <= sizes[0] < sizes[1] < sizes[2] == 8
    assert main("plan --model smollm2-135m --clients 64 --groups-at-once 5 --rate 1 --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["groups_at_once"] == 4  # twice four, not five and three
    assert main("plan --model smollm2-135m --clients 4096 --devices 4 --memory 4 --rate 1 --json".split()) == 0
    found = json.loads(capsys.readouterr().out)  # all lanes ask before the first trains
    assert found["memory"]["total"] <= 4 * 2**30 or found["groups_at_once"] == 1
    assert main(["plan", "--model", "llama-3.1-70b", "--memory", "8"]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert main(["plan", "--memory", "0"]) == 2
    assert "--memory is 0.0; it must be above 0" in capsys.readouterr().err
    assert main(["plan", "--preset", "smoke", "--row-tokens", "5000"]) == 2
    assert "--row-tokens is 5000, but rows are cut at --max-length" in capsys.readouterr().err
    assert main(["plan", "--model", "tiny", "--max-length", "4096"]) == 2
    assert "tiny knows 2048 positions" in capsys.readouterr().err
    assert main(["plan", "--model", "llama-3.1-8b", "--max-length", "4096"]) == 0
    totals = []
    for platform in ("gpu", "tpu"):
        assert main(f"plan --model llama-3.1-8b --platform {platform} --json".split()) == 0
        totals.append(json.loads(capsys.readouterr().out.splitlines()[-1])["memory"]["total"])
    assert totals[0] < totals[1]  # a TPU holds more copies
    assert main(["plan", "--model", "no such/model"]) == 2
    assert "shapes known without their files: smollm2-135m, " in capsys.readouterr().err


def shown(capsys, arguments):
    """What `fedrouter plan` prints, by row."""
    assert main(f"plan --model llama-3.1-8b --platform gpu {arguments}".split()) == 0
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    return {cell[0]: cell[1] for cell in cells if len(cell) == 2}


def test_a_plan_says_of_what_it_is_and_what_it_takes_in_all(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    table = shown(capsys, "--memory 20 --rate 300 --rank 16 --rounds 10")
    assert [*table.items()][0] == ("run", "llama-3.1-8b (float32), rank 16 on q_proj v_proj, 10 rounds")
    config = dataclasses.replace(Config(model="llama-3.1-8b"), lora=LoRAConfig(rank=16))
    made = plan.plan(config, 128, 24, rate=3e14)
    assert table["sent up, down"] == f"{made.bytes_up / 1e6:.1f} MB, {made.bytes_down / 1e6:.1f} MB a round"
    whole = f"{10 * made.seconds / 60:.1f} min in all (without embedding and evaluation)"
    assert table["time"] == f"{made.seconds:.1f} s a round, {whole}"
    assert [plan.duration(seconds) for seconds in (90, 150, 9000)] == ["90.0 s", "2.5 min", "2.5 h"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "--dtype bfloat16, --quantise nf4, --remat, a smaller --lanes-together"),
        ("--dtype bfloat16", "--quantise nf4, --remat, a smaller --lanes-together"),
        ("--dtype mixed --remat", "a smaller --lanes-together"),  # with codes it is refused
        ("--dtype bfloat16 --quantise nf4 --remat --lanes-together 1", "a smaller model"),
    ],
)
def test_a_plan_that_does_not_fit_says_what_takes_less(options, said, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert shown(capsys, f"--memory 1 {options}")["does not fit"] == f"1.0 GiB given; try {said}"
    assert "does not fit" not in shown(capsys, f"--memory 100 {options}")


@pytest.mark.parametrize("strategy", ["centralised", "fedit"])
def test_planned_batches_are_those_of_a_round(strategy):
    config = dataclasses.replace(smoke(), strategy=strategy)
    prepared = experiment.prepare(config)
    enrolment = experiment.enroll(prepared, None)
    work, batch = experiment.round_inputs(prepared, experiment.members(prepared, enrolment), 1)
    made = plan.plan(config, 60, 12)
    lanes = min(config.compute.lanes_together, len(work.client))
    pack = memory.Pack(*prepared.pack, lanes * config.local.batch, lanes)
    found = memory.needed(memory.federation(prepared.model.config, config, prepared.strategy, 4), pack, made.groups, 1)
    assert found.batches == pytest.approx(sum(leaf.nbytes for leaf in jax.tree.leaves(batch)), rel=0.01)
    assert made.tokens == 60 * 4 * config.local.steps * config.local.batch  # four clients' rows, pooled or not


def test_newcomers_have_no_lanes():
    data = dataclasses.replace(smoke().data, scenario="all", clients=5, newcomers=2)
    config = dataclasses.replace(smoke(), strategy="fedit", data=data)
    prepared = experiment.prepare(config)
    work, _ = experiment.round_inputs(prepared, experiment.members(prepared, experiment.enroll(prepared, None)), 1)
    assert method_lib.lanes_of_a_round(config, prepared.strategy, 1) == len(work.client) == 3


@pytest.mark.parametrize(
    ("lanes", "devices", "groups", "share"),
    [(1, 8, (8, 1), 1), (9, 8, (8, 2), 2 / 9), (8, 8, (8, 1), 1 / 8), (9, 1, (2, 5), 1)],
)
def test_time_is_that_of_the_device_with_most_lanes(lanes, devices, groups, share):
    config = dataclasses.replace(smoke(), strategy="fedit", data=dataclasses.replace(smoke().data, clients=lanes))
    found, alone = (plan.plan(config, 60, 12, many, rate=1e12) for many in (devices, 1))
    assert schedule.groups_of(lanes, 8, devices) == groups and found.groups == groups[0]
    assert found.seconds == pytest.approx(share * alone.seconds)
