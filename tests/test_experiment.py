"""From a config to records and scores, piece by piece, on the tiny model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, begun, read_adapter
from jax.sharding import AbstractMesh, PartitionSpec
from safetensors.numpy import load_file

from fedrouter_jax import clusters, experiment, export, mesh, plan
from fedrouter_jax.config import ComputeConfig
from fedrouter_jax.data import synthetic
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import model_config
from fedrouter_jax.models.decoder import Blocks
from fedrouter_jax.models.parameters import param_shapes
from fedrouter_jax.presets import smoke
from fedrouter_jax.strategies import ditto
from fedrouter_jax.types import RoundInfo


def test_other_seeds_are_other_adapters_and_other_dropout():
    prepared, enrolment, state, _ = begun("fedit")
    other = prepared._replace(config=dataclasses.replace(prepared.config, seed=1))
    again = experiment.start(other, enrolment)
    assert (again.bank["main"].a["q_proj"] != state.bank["main"].a["q_proj"]).mean() > 0.99
    inputs = experiment.round_inputs(prepared, experiment.members(prepared, enrolment), 1)
    found = [experiment.train_round(p, jax.tree.map(jnp.copy, state), *inputs)[0] for p in (prepared, other)]
    assert (found[0].bank["main"].b["q_proj"] != found[1].bank["main"].b["q_proj"]).any()


def test_clusters_are_those_of_the_first_process(monkeypatch):
    monkeypatch.setattr(experiment.processes, "of_first", lambda found: (found[0], np.int32(found[1]), *found[2:]))
    enrolment = begun("fedrouter")[1]
    assert type(enrolment.clusters) is int
    others = [np.flip(enrolment.table), enrolment.clusters, enrolment.router, enrolment.labels + 1]
    monkeypatch.setattr(experiment.processes, "of_first", lambda found: others)
    found = begun("fedrouter")[1]
    assert (found.table == others[0]).all() and (found.labels == others[3]).all()


def test_a_run_does_not_depend_on_the_kind_of_keys_that_jax_is_told():
    """rbg is often told for TPUs."""
    _, _, state, _ = begun("fedit")
    with jax.default_prng_impl("rbg"):
        prepared, enrolment, other, _ = begun("fedit")
        inputs = experiment.round_inputs(prepared, experiment.members(prepared, enrolment), 1)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, other.bank, state.bank))
        assert experiment.train_round(prepared, other, *inputs)[1]["loss"] > 0
        assert plan.plan(prepared.config, 60, 12).memory.total > 0


def test_rows_in_memory_are_dealt_as_those_of_files(tmp_path):
    rows = synthetic.make(1)
    for name, part in (("train", rows.train), ("test", rows.test)):
        lines = [json.dumps(dict(zip(("instruction", "output", "task"), row[:3], strict=True))) for row in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    of_files = dataclasses.replace(smoke(), data=dataclasses.replace(smoke().data, data=str(tmp_path)))
    found, expected = experiment.prepare(smoke(), dataset=rows), experiment.prepare(of_files)
    assert (found.partition, found.train, found.test) == (expected.partition, expected.train, expected.test)
    assert found.train != experiment.prepare(smoke()).train  # of another seed


def test_embeddings_that_are_not_finite_are_refused():
    prepared = experiment.prepare(smoke())
    with pytest.raises(UserError, match="not finite"):
        experiment.enroll(prepared, np.full((len(experiment.embedded_rows(prepared)), 64), np.nan, np.float32))


def test_prompts_to_answer_leave_room_for_the_longest_answer():
    prepared = experiment.prepare(dataclasses.replace(smoke(), data=dataclasses.replace(smoke().data, max_length=96)))
    assert max(len(row.prompt) for row in prepared.test.values()) == 96 - smoke().data.max_response


def test_a_cluster_trains_the_rows_that_are_in_it():
    prepared, enrolment, _, _ = begun("oracle")
    dataset, tasks = prepared.dataset, prepared.partition.tasks
    for client, clusters_of in enumerate(experiment.members(prepared, enrolment)):
        rows = zip(prepared.train[client], prepared.partition.clients[client].train, strict=True)
        held = [(encoded, dataset.train[row].task) for encoded, row in rows]
        for slot, members in zip(enrolment.table[client], clusters_of, strict=True):
            assert members == [encoded for encoded, task in held if task == tasks[slot]] != []


def test_what_is_configured_reaches_the_round(monkeypatch):
    made = {}
    monkeypatch.setattr(experiment.client, "make_client_update", lambda *given: made.update(update=given))
    monkeypatch.setattr(experiment, "make_round", lambda *given: made.update(round=given))
    local = dataclasses.replace(smoke().local, clip=0.5, weight_decay=0.1, proximal=0.2)
    rounds = dataclasses.replace(smoke().rounds, server="momentum", server_rate=0.3)
    compute = ComputeConfig(remat=True, packs_at_once=3)
    config = dataclasses.replace(smoke(), local=local, rounds=rounds, compute=compute)
    strategy = ditto()
    experiment.prepare(config, strategy=strategy)
    _, lora, *given = made["update"]
    assert (lora, given) == (config.lora, [local, Blocks(remat=True), 3, strategy.optimiser])
    assert ComputeConfig(unroll=True).blocks == Blocks(unroll=True)
    _, _, rate, last, _, server, *_ = made["round"]
    assert last == rounds.rounds
    assert rate(1) > rate(rounds.rounds) == pytest.approx(local.min_learning_rate)
    step, _ = server.update(jnp.ones(2), server.init(jnp.zeros(2)))
    np.testing.assert_allclose(step, -0.3, rtol=1e-6)


def test_clients_are_regrouped_after_a_round_and_the_record_says_how():
    prepared, enrolment, state, _ = begun("clustered", cluster={"global_clusters": 2})
    similar = jnp.asarray([[1, 0, 1, 0], [0, 1, 0, 1]] * 2, jnp.float32)
    info = RoundInfo(jnp.zeros((4, 2)), jnp.zeros(()), jnp.zeros(4, bool))
    after = state._replace(round=jnp.ones((), jnp.int32), memory=(similar, jnp.ones(4, jnp.int32)))
    still = prepared._replace(round=lambda *_: (after, info))  # it need not train
    inputs = experiment.round_inputs(prepared, experiment.members(prepared, enrolment), 1)
    state, record = experiment.train_round(still, state, *inputs)
    assert state.table.tolist() == record["table"] == [[0], [1], [0], [1]]


def test_a_lane_without_rows_has_no_part_in_loss_and_traffic():
    prepared, enrolment, state, _ = begun("oracle", rounds={"clusters_per_round": 2})
    rows = experiment.members(prepared, enrolment)
    rows[0][1] = []  # one cluster of two
    work, batch = experiment.round_inputs(prepared, rows, 1)
    assert (work.weight == 0).sum() == 1
    adapter = sum(leaf[0].nbytes for leaf in jax.tree.leaves(state.bank))
    _, record = experiment.train_round(prepared, state, work, batch)
    assert record["loss"] == pytest.approx(np.mean([lane["loss"] for lane in record["lanes"]]), rel=1e-5)
    assert record["bytes_up"] == record["bytes_down"] == 7 * adapter  # of four clients with two lanes each


def test_rows_in_one_place_send_nothing():
    prepared, enrolment, state, _ = begun("centralised")
    work, batch = experiment.round_inputs(prepared, experiment.members(prepared, enrolment), 1)
    info = RoundInfo(jnp.zeros((1, 8)), jnp.zeros(()), jnp.zeros(1, bool))
    still = prepared._replace(round=lambda state, *others: (state, info))  # it need not train
    _, record = experiment.train_round(still, state, work, batch)
    assert record["bytes_up"] == record["bytes_down"] == 0


def test_a_round_has_groups_for_all_rows_of_devices():
    prepared, enrolment, _, _ = begun("fedit")
    rows = experiment.members(prepared, enrolment)
    for count in (3, 5):
        on = AbstractMesh((count, 1), (mesh.CLIENTS, mesh.MODEL))
        assert len(experiment.round_inputs(prepared._replace(mesh=on), rows, 1)[1].count) == count


def test_groups_lie_on_the_devices_that_train_them():
    prepared, enrolment, state, _ = begun("fedit")
    work, batch = experiment.round_inputs(prepared, experiment.members(prepared, enrolment), 1)
    places = set()

    def look(state, base, work, batch, key):
        places.update(leaf.sharding.spec for leaf in jax.tree.leaves(batch))
        return state, RoundInfo(jnp.zeros((4, 2)), jnp.zeros(()), jnp.zeros(4, bool))

    experiment.train_round(prepared._replace(mesh=mesh.make(), round=look), state, work, batch)
    assert places == {PartitionSpec(mesh.CLIENTS)}


def test_a_record_counts_what_comes_down():
    prepared, enrolment, state, _ = begun("ifca", cluster={"global_clusters": 3})
    for t, slots in ((1, 1), (2, 3)):  # in the first round nobody chooses among the three
        inputs = experiment.round_inputs(prepared, experiment.members(prepared, enrolment), t)
        state, record = experiment.train_round(prepared, state, *inputs)
        assert record["bytes_down"] == slots * record["bytes_up"] > 0


def test_what_a_round_takes_by_hand():
    """Four operations a parameter of the blocks and token, and the head's for response tokens; IFCA's way down."""
    config = dataclasses.replace(
        smoke(), strategy="ifca", cluster=dataclasses.replace(smoke().cluster, global_clusters=3)
    )
    halves = dataclasses.replace(config, compute=ComputeConfig(model_parallel=2))  # each device has half the weights
    one, two, split = (
        plan.plan(c, 60, 12, devices=devices, rate=1e6) for c, devices in ((config, 1), (config, 2), (halves, 2))
    )
    shapes = param_shapes(model_config("tiny"))
    blocks = sum(leaf.size for leaf in jax.tree.leaves(shapes["blocks"]))
    assert one.tokens == 4 * 2 * 4 * 60
    assert one.flops == pytest.approx(4 * (blocks + shapes["embedding"].size * 12 / 60) * one.tokens)
    assert one.seconds == pytest.approx(one.flops / 1e6) == 2 * two.seconds == 2 * split.seconds
    assert one.bytes_down == 3 * one.bytes_up > 0


def test_an_exported_adapter_is_the_slot_of_its_name(tmp_path):
    prepared, enrolment, state, points = begun("fedalt")
    bank = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape), state.bank)
    export.write(tmp_path, prepared, state._replace(bank=bank), [])
    for name in ("own", "rest"):
        for client in range(4):
            folder = tmp_path / "adapters" / f"{name}_{client}"
            one = jax.tree.map(lambda leaf, c=client: leaf[c], bank[name])
            assert_close(read_adapter(folder), one._replace(gate={}), 0)
            gates = load_file(folder / "gate.safetensors")
            assert_close(gates, jax.tree.map(np.asarray, one.gate), 0)


def test_an_exported_shift_is_what_is_added_to_the_base(tmp_path):
    prepared, _, state, _ = begun("fedex")
    shifted = state._replace(memory=jax.tree.map(lambda leaf: leaf + 0.3, state.memory))
    export.write(tmp_path, prepared, shifted, [])
    scale = prepared.config.lora.alpha / prepared.config.lora.rank
    for tensor in load_file(tmp_path / "adapters" / "base_shift.safetensors").values():
        np.testing.assert_allclose(tensor, 0.3 * scale, atol=1e-6)


def test_a_run_without_its_rows_is_of_the_same_shapes():
    prepared, enrolment, state, _ = begun("fedlease")  # as many experts as there are tasks
    dealt = clusters.partition(clusters.describe(prepared, enrolment), prepared.config)
    again = experiment.start(experiment.without_rows(prepared.config, dealt), enrolment)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, state)


def test_clusters_that_cannot_be_filled_are_refused_before_texts_are_embedded():
    counts = dataclasses.replace(smoke().cluster, local_clusters=99)
    with pytest.raises(UserError, match="99 local clusters were asked for"):
        experiment.prepare(dataclasses.replace(smoke(), cluster=counts))
    joining = dataclasses.replace(smoke().data, clients=5, newcomers=2)  # who joins later makes no global cluster
    for total, data in ((9, smoke().data), (7, joining)):
        counts = dataclasses.replace(smoke().cluster, global_clusters=total)
        with pytest.raises(UserError, match=f"{total} global clusters were asked for"):
            experiment.prepare(dataclasses.replace(smoke(), cluster=counts, data=data))
