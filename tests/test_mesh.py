"""Many devices change no result: fake ones of one process, and those of several processes joined on this machine."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Event

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import LOCAL, begin, inputs
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from fedrouter_jax import files, mesh, plan, processes, sharing, terminal
from fedrouter_jax.cli import main
from fedrouter_jax.data import schedule
from fedrouter_jax.errors import UserError
from fedrouter_jax.federation import make_round
from fedrouter_jax.models.parameters import param_shapes
from fedrouter_jax.models.quantise import stored_shapes
from fedrouter_jax.strategies import fedrouter, fedsa

WORKER = Path(__file__).with_name("mesh_worker.py")


def flags(devices: int) -> str:
    """The suite's flags of the compiler, and so many fake devices."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"


def work_on(devices: int, *asked: dict) -> list[dict]:
    """Workers with so many fake devices each, side by side; what the first one printed."""
    environment = {
        **os.environ, "XLA_FLAGS": flags(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(WORKER.parents[1])
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(each)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for each in asked
    ]  # fmt: skip
    outputs = spoken(workers)
    assert not any(worker.returncode for worker in workers), [error[-2000:] for _, error in outputs]
    return [json.loads(line) for line in outputs[0][0].splitlines() if line.startswith("{")]


def spoken(started: list[subprocess.Popen]) -> list[tuple[str, str]]:
    """What processes that wait for each other print, each read as it comes, or one might stop at a full pipe."""
    with ThreadPoolExecutor(len(started)) as pool:
        try:
            return list(pool.map(lambda process: process.communicate(timeout=600), started))
        finally:  # one that hangs, and its peers, would keep the suite for ever
            for process in started:
                process.kill()


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def joined(count: int, cases: list[dict]) -> list[dict]:
    """The same cases for `count` processes that find each other at a free port."""
    address = f"localhost:{free_port()}"
    return [{"process": [number, count, address], "cases": cases} for number in range(count)]


ROUNDS = [
    {"strategy": "fedrouter", "shape": [8, 1], "traffic": True},
    {"strategy": "fedrouter", "shape": [2, 4], "at_once": 2},
    {"strategy": "fedrouter", "shape": [4, 2], "traffic": True},
    {"strategy": "fedsa", "shape": [4, 2], "quantise": "nf4"},
    {"strategy": "ifca", "shape": [4, 1]},
    {"strategy": "local", "shape": [8, 1], "traffic": True},
    {"strategy": "scaffold", "shape": [4, 1]},
]
# What clients own lies apart (fedsa), the base in halves; a shifted base is made on every row (fedex).
ANSWERS = [
    {"strategy": "fedsa", "shape": [4, 2], "answer": 11},
    {"strategy": "fedex", "shape": [3, 1], "answer": 2},
]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes of two devices found: they play a round and save, each its part, and go on from there."""
    kept = str(tmp_path_factory.mktemp("mesh") / "checkpoints")
    case = {"strategy": "fedsa", "shape": [2, 2]}
    return work_on(2, *joined(2, [{**case, "last": 1, "save": kept}, {**case, "first": 2, "load": kept}])), kept


@pytest.fixture(scope="module")
def eight(two):
    """What one worker of eight devices found of rounds and of answers, and after the checkpoint of two processes."""
    after = {"strategy": "fedsa", "shape": [4, 1], "first": 2, "load": two[1]}
    found = work_on(8, {"cases": [*ROUNDS, *ANSWERS, after]})
    assert len(found) == len(ROUNDS) + len(ANSWERS) + 1
    return found[: len(ROUNDS)], found[len(ROUNDS) : -1], found[-1]


def test_on_eight_devices_in_any_shape_a_round_is_that_of_one(eight):
    """Lanes over 8, 4 and 2 rows of devices that hold the base alone, in halves and in quarters; plain and as codes.

    Clients of IFCA look at their losses first; SCAFFOLD's server keeps what each client's steps tend to.
    """
    found, *_ = eight
    for case in found:
        assert case["gap"] < 5e-4 and case["programs"] == 1, case
    # docs/scaling.md: while lanes train nobody says a word; then sums of the bank's size, and what lanes report.
    alone, halves = found[0]["sent"], found[2]["sent"]
    assert set(alone) <= {"all-reduce", "all-gather", "bank"}
    assert alone["bank"] <= alone["all-reduce"] < alone["bank"] + 1000
    assert alone.get("all-gather", 0) < 1000
    private = found[5]["sent"]  # what clients own is gathered once before, and added up like all else
    assert set(private) <= {"all-reduce", "all-gather", "bank"}
    assert all(private["bank"] <= private[name] < private["bank"] + 1000 for name in ("all-reduce", "all-gather"))
    # Where the heads divide evenly, nothing but sums is sent in a block.
    assert {name for name in halves if name.endswith("in loops")} == {"all-reduce in loops"}


def test_rows_of_devices_share_texts_and_answer_as_one_device(eight):
    _, found, _ = eight
    for case in found:
        assert case["gap"] < 1e-4 and case["same"] == 1, case
    assert [case["bases"] for case in found] == [4, 3]  # each works with its own
    assert found[0]["different"] > 3
    assert [case["placing"] for case in found] == [["MainThread"]] * 2  # two at once may find half of an array's parts
    assert [case["kernel"] for case in found] == [False, True]  # which no partitioner divides
    # Keys and values, too, or the first device would hold those of all.
    assert [case["caches"] for case in found] == [[[0, 1], [2, 3], [4, 5], [6, 7]], [[0], [1]]]


@pytest.mark.parametrize("fails, error", [("first", KeyboardInterrupt), ("second", MemoryError)])
def test_what_ends_one_row_of_devices_stops_all(fails, error, monkeypatch):
    """An interrupt reaches the first row's thread alone; the others must not answer on to their end."""
    monkeypatch.setattr(mesh, "copies", lambda params: ["first", "second", "third"])
    monkeypatch.setattr(mesh, "beside", lambda params, tree: tree)
    monkeypatch.setattr(mesh, "known", lambda params: nullcontext())
    begun, done = Event(), []

    def work(base, tree, places, advance):
        if base == fails:
            begun.wait()
            raise error
        begun.set()
        for _ in range(10**7):
            advance(0)
        done.append(base)

    with pytest.raises(error):
        sharing.divided(jnp.zeros(1), 3, work)
    assert not done


def test_processes_share_a_checkpoint_that_another_number_of_them_goes_on_from(two, eight):
    found, *_ = two
    assert len(found) == 2
    for case in (*found, eight[-1]):
        assert case["gap"] < 5e-4 and case["programs"] == 1, case


def test_groups_fill_up_the_rows_of_devices(federation):
    """Four lanes on three rows of devices, two to a group: six places, and what only fills up has no rows."""
    work, _ = inputs(federation, 1)
    plain, spread = (
        schedule.batches(work, federation.members, 1, LOCAL.steps, LOCAL.batch, 320, 96, 0, 2, rows) for rows in (1, 3)
    )
    assert plain.count.shape == (2, LOCAL.steps) and spread.count.shape == (3, LOCAL.steps)
    assert (spread.count[:2] > 0).all() and (spread.count[2] == 0).all()
    np.testing.assert_array_equal(plain.rows.labels, spread.rows.labels[:2])


def test_a_model_axis_divides_the_devices(monkeypatch):
    with pytest.raises(UserError, match="--model-parallel is 3, but there are 1 devices"):
        mesh.make(3)
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # of two devices each: no base may lie in both
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    with pytest.raises(UserError, match="--model-parallel is 4, but there are 2 devices a process"):
        mesh.make(4, [None] * 4)


@pytest.mark.parametrize("quantise", ["none", "nf4"])
def test_devices_that_share_a_base_hold_half_of_every_matrix(quantise):
    on = AbstractMesh((4, 2), (mesh.CLIENTS, mesh.MODEL))
    base = stored_shapes(param_shapes(plan.SHAPES["llama-3.1-8b"]), quantise)
    for path, leaf in jax.tree_util.tree_leaves_with_path(mesh.place_base(on, base)):
        held, whole = math.prod(leaf.sharding.shard_shape(leaf.shape)), leaf.size
        assert held == (whole if "norm" in jax.tree_util.keystr(path) else whole // 2), path


@pytest.mark.parametrize(("rows", "apart"), [(2, True), (3, False)])
def test_what_clients_own_lies_apart_where_they_divide_evenly(federation, rows, apart):
    strategy, on = fedsa(), AbstractMesh((rows, 1), (mesh.CLIENTS, mesh.MODEL))
    places = mesh.state_shardings(on, strategy, begin(federation, strategy))
    assert places.bank["main"].a["q_proj"].spec == places.table.spec == P()
    assert places.bank["main"].b["q_proj"].spec == (P(mesh.CLIENTS) if apart else P())


def test_clusters_and_routes_are_the_first_processs(monkeypatch):
    """Where the last bit of a sum decides, other processes may have found others, and even another number of them."""
    first = {"table": np.arange(6).reshape(2, 3), "unit": np.True_, "clusters": np.int64(3)}
    mine = {"table": np.zeros((2, 4), int), "unit": np.False_, "clusters": np.int64(4)}
    sent = iter([[np.array([0, *np.shape(leaf)]) for leaf in jax.tree.leaves(first)], jax.tree.leaves(first)])

    def broadcast(tree):
        found = next(sent)
        assert [np.shape(leaf) for leaf in tree] == [np.shape(leaf) for leaf in found]  # or JAX would wait for ever
        return found

    assert processes.of_first(mine) is mine  # which is the first, alone
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
    assert jax.tree.all(jax.tree.map(np.array_equal, processes.of_first(mine), first))


def test_all_processes_stop_where_the_first_gets_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "first", lambda: False)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", np.zeros_like)  # it says no
    with pytest.raises(UserError, match="another process works on"), files.reserved(tmp_path):
        pass


def test_a_fault_in_one_of_several_processes_ends_it_at_once(monkeypatch, capsys):
    """At a usual exit JAX would wait for the others, which wait for this one."""
    monkeypatch.setattr(processes, "joined", lambda: True)
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit(f"left with {code}"))
    with pytest.raises(SystemExit, match="left with 1"):
        terminal.guarded(lambda: {}["missing"])
    assert "KeyError: 'missing'" in capsys.readouterr().err
    monkeypatch.setattr(processes, "joined", lambda: False)
    with pytest.raises(KeyError):
        terminal.guarded(lambda: {}["missing"])


def test_devices_of_a_process_are_waited_for(monkeypatch):
    first, *others = (f"{flag}=86400" for flag in terminal.WAITS)
    mine = f"--a {terminal.WAITS[0]}=7"
    for told, found in (("", [first, *others]), (mine, [mine, *others]), ("of_flags", ["of_flags"])):
        monkeypatch.setenv("XLA_FLAGS", told)
        terminal.wait_for_devices()
        terminal.wait_for_devices()
        assert os.environ["XLA_FLAGS"] == " ".join(found)


def test_processes_join_as_they_are_told(monkeypatch):
    asked = []

    def initialize(*given):
        assert not jax.config.jax_enable_preemption_service  # or SIGTERM would end nothing
        asked.append(given)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for given in ((None, None, None), ("auto", None, None), ("10.0.0.1:1234", 2, 1)):
        processes.join(*given)
    assert asked == [(None, None, None), ("10.0.0.1:1234", 2, 1)]  # the first alone is one process
    for given in (("10.0.0.1", 2, 1), ("10.0.0.1:65536", 2, 1), ("10.0.0.1:1234", None, 1), ("10.0.0.1:1234", 2, -1)):
        with pytest.raises(UserError, match="--coordinator"):
            processes.join(*given)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_round_lowers_for_accelerators(federation, platform):
    strategy = fedrouter()
    run = make_round(strategy, federation.update, lambda t: 1e-3, 3)
    state = strategy.init({"main": federation.adapters["main"]}, federation.enrolment)
    key = jax.random.key(0, impl="threefry2x32")
    work, batch = inputs(federation, 1, together=2)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype),
        (state, federation.model.params, work, batch, key),
    )
    exported = jax.export.export(run, platforms=[platform])(*shapes)
    assert exported.platforms == (platform,) and len(exported.mlir_module_serialized) > 10_000


def command(devices: int, count: int, *arguments: str) -> None:
    """`fedrouter ...` as so many processes of so many fake devices that find each other."""
    joining = [[]]
    if count > 1:
        address = f"localhost:{free_port()}"
        joining = [
            ["--coordinator", address, "--num-processes", str(count), "--process-id", str(number)]
            for number in range(count)
        ]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "fedrouter_jax", *arguments, *join], env={**os.environ, "XLA_FLAGS": flags(devices)},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for join in joining
    ]  # fmt: skip
    outputs = spoken(started)
    assert not any(process.returncode for process in started), [error[-2000:] for _, error in outputs]
    others = [line for said, _ in outputs[1:] for line in said.splitlines() if "[Gloo]" not in line]
    assert not others, "the first process alone talks to the user"


def outcome(run: Path) -> tuple[list, dict, dict, list]:
    """Losses, clusters, an adapter and answers of a finished run."""
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    clusters = json.loads((run / "clusters.json").read_text())
    adapter = load_file(run / "adapters" / "cluster_0" / "adapter_model.safetensors")
    assert (run / "scores.json").exists() and (run / "report.md").exists()
    answers = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    asked = [(a["part"], a["client"], a["row"], a["slot"]) for a in answers]
    return [lane["loss"] for record in rounds for lane in record["lanes"]], clusters, adapter, asked


def test_a_whole_run_on_many_devices_or_in_two_processes_ends_as_on_one(tmp_path):
    """Two rows of devices, each with the base in halves; two processes; and one that goes on where two stopped."""
    one, four, two = (tmp_path / name for name in ("one", "four", "two"))
    run = "run --preset smoke --lanes-together 2 --rounds 2 --test-rows 2 --mix-rows 4".split()
    assert main([*run, "--out", str(one)]) == 0
    command(4, 1, *run, "--out", str(four), "--model-parallel", "2")
    command(1, 2, *run, "--out", str(two))
    stopped = tmp_path / "stopped"
    shutil.copytree(two, stopped, ignore=shutil.ignore_patterns("2", "scores.json", "adapters", "report.md"))
    assert main(["resume", str(stopped)]) == 0
    losses, clusters, adapter, asked = outcome(one)
    for other in (four, two, stopped):
        other_losses, other_clusters, other_adapter, other_asked = outcome(other)
        np.testing.assert_allclose(losses, other_losses, rtol=1e-3)
        assert clusters["table"] == other_clusters["table"] and asked == other_asked
        for name, leaf in adapter.items():
            np.testing.assert_allclose(leaf, other_adapter[name], atol=5e-3)


@pytest.mark.parametrize(
    "joining",
    [["--num-processes", "2"], ["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"]],
)
def test_processes_that_cannot_join_are_told_what_is_missing(joining, capsys, tmp_path):
    assert main(["run", "--preset", "smoke", "--out", str(tmp_path / "run"), *joining]) == 2
    assert "--coordinator" in capsys.readouterr().err and not (tmp_path / "run").exists()
