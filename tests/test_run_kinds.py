"""Runs unlike the smoke preset's: other strategies, newcomers, unseen tasks, rows without tasks, bounds. Tiny model."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrouter_jax import clusters, evaluate, experiment, plan, report, routing, runs, serve
from fedrouter_jax.cli import main
from fedrouter_jax.data import synthetic
from fedrouter_jax.data.scenarios import Partition
from fedrouter_jax.errors import UserError
from fedrouter_jax.presets import smoke


@pytest.mark.parametrize(
    "strategy, adapters",
    [
        ("local", [f"client_{i}" for i in range(4)]),
        ("feddpa-t", ["global_0", *(f"local_{i}" for i in range(4))]),
        ("fedrouter-soft", [f"cluster_{i}" for i in range(4)]),
        ("fedex", ["base_shift.safetensors", "shared_0"]),
        ("flora", ["base_shift.safetensors", "shared_0"]),
        ("ifca", [f"cluster_{i}" for i in range(4)]),
        ("fedalt", [*(f"own_{i}" for i in range(4)), *(f"rest_{i}" for i in range(4))]),
        ("fedrouter-sum", ["common_0", *(f"main_{i}" for i in range(4))]),
    ],
)
def test_the_other_strategies_run_from_the_same_command(strategy, adapters, tmp_path, capsys, request):
    out = tmp_path / strategy
    if strategy not in ("fedex", "ifca"):  # one whose base is shifted, and one that is not
        request.getfixturevalue("unanswered")
    small = ["--rounds", "1", "--evaluate-at", "--mix-rows", "4", "--test-rows", "2"]
    small += ["--quantise", "nf4"] if strategy == "fedex" else []  # what is added lies beside the codes
    assert main(["run", "--preset", "smoke", "--strategy", strategy, "--out", str(out), *small]) == 0
    names = {path.name for path in (out / "adapters").iterdir()} - {"prompt.json"}
    assert sorted(names - {"clients.json"}) == adapters and ("clients.json" in names) == (strategy == "ifca")
    if strategy == "ifca":
        whose = json.loads((out / "adapters" / "clients.json").read_text())
        scored = map(json.loads, (out / "predictions.jsonl").read_text().splitlines())
        assert whose == {str(a["client"]): f"cluster_{a['slot']}" for a in scored if a["part"] == "personalised"}
    assert (out / "router").exists() == strategy.startswith("fedrouter-") and (out / "report.md").exists()
    up = json.loads((out / "rounds.jsonl").read_text())["bytes_up"]
    assert (up == 0) == (strategy == "local")
    shown = " ".join(capsys.readouterr().out.split())
    assert ("4 groups for 4 clients: hardly two of them share one" in shown) == (strategy == "ifca")
    if strategy == "fedalt":  # both of a client's adapters count
        assert serve.route(out, ["Say yes."], 1)[0]["adapter"] == "own_1 + rest_1"
    elif strategy == "fedrouter-sum":
        assert re.fullmatch(r"common_0 \+ main_\d", serve.route(out, ["Say yes."], 1)[0]["adapter"])
    elif strategy in ("feddpa-t", "fedrouter-soft"):  # adapters that count by their weights
        named = serve.route(out, ["Say yes."], 1)[0]["adapter"]
        assert re.fullmatch(r"\w+_\d \(0\.\d\d\) \+ \w+_\d \(0\.\d\d\)", named), named
    capsys.readouterr()
    assert main(["route", str(out), "text"]) == (
        0 if strategy in ("fedex", "flora", "fedrouter-soft", "fedrouter-sum") else 2
    )


def test_newcomers_and_unseen_tasks_train_nothing_and_are_scored_apart(tmp_path, unanswered):
    data = dataclasses.replace(
        smoke().data, scenario="all", clients=5, newcomers=2, unseen=("headline",), test_rows=6, mix_rows=8
    )
    once = dataclasses.replace(smoke().rounds, rounds=1)
    scores = runs.run(dataclasses.replace(smoke(), strategy="fedit", data=data, rounds=once), tmp_path / "run")
    lanes = json.loads((tmp_path / "run" / "rounds.jsonl").read_text())["lanes"]
    assert [lane["client"] for lane in lanes] == [0, 1, 2]
    asked = {"personalised": "012", "generalisation": "012", "newcomers": "34", "base_newcomers": "34"}
    for part, clients in asked.items():
        assert sorted(scores[part]["rouge1"]["per_client"]) == list(clients)
        assert ("headline" in scores[part]["rouge1"]["per_task"]) == (part == "generalisation")
    clusters = json.loads((tmp_path / "run" / "clusters.json").read_text())
    assert len(clusters["table"]) == 5 and clusters["never_trained"] == []


def test_rows_with_a_client_and_without_a_task(tmp_path, unanswered):
    """What real data may be: nobody says how many tasks there are. Clusters are found, and nothing speaks of tasks."""
    made = synthetic.make(train_per_task=32, test_per_task=8)
    kept = [sorted({row.task for row in made.train})[k] for k in (0, 2)]
    for name, rows in (("train", made.train), ("test", made.test)):
        own = [row for row in rows if row.task in kept]
        lines = [
            {"instruction": row.instruction, "output": row.output, "user": f"ward {i // 2 % 3}"}
            for i, row in enumerate(own)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = dataclasses.replace(
        smoke().data, data=str(tmp_path), columns=("client=user",), scenario="natural", clients=3, train_rows=20
    )
    once, few = dataclasses.replace(smoke().rounds, rounds=1), dataclasses.replace(smoke().cluster, max_clusters=3)
    config = dataclasses.replace(smoke(), data=data, rounds=once, cluster=few)
    out = tmp_path / "run"
    runs.run(config, out)
    found = json.loads((out / "clusters.json").read_text())
    assert found["clusters"] >= 2 and len(found["silhouettes"]["global"]) > 1 and found["accuracy"] is None
    assert all(len(set(client["global"])) >= 2 for client in found["clients"])
    names = [client["name"] for client in found["clients"]]
    assert sorted(names) == ["ward 0", "ward 1", "ward 2"]
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert all({rows[row]["user"] for row in client["rows"]} == {client["name"]} for client in found["clients"])
    assert [serve.number_of(out, said) for said in (*names, "2", 1)] == [0, 1, 2, 2, 1]
    with pytest.raises(UserError, match="--client ward 3 is not in this run; its clients are 0 to 2, by name ward"):
        serve.number_of(out, "ward 3")
    report.write([out], out)
    assert "each task" not in (out / "report.md").read_text()
    assert "routing_accuracy" not in json.loads((out / "scores.json").read_text())["personalised"]
    for strategy, message in (("oracle", "goes by the tasks"), ("ifca", "give --global-clusters")):
        with pytest.raises(UserError, match=message):
            experiment.prepare(dataclasses.replace(config, strategy=strategy))
    for part in ("personalised_routing", "generalisation_routing"):
        told = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **{part: "oracle"}))
        with pytest.raises(UserError, match="oracle routing goes by the tasks of rows"):
            experiment.prepare(told)


def described(config, enrolment) -> tuple[int, int]:
    """Bytes up and down of clusters of four tasks, of embeddings of width 64."""
    model = SimpleNamespace(config=SimpleNamespace(width=64))
    split = Partition([], [], list("abcd"), 4)
    return clusters.traffic(SimpleNamespace(config=config, model=model, partition=split), enrolment)


def test_newcomers_send_nothing_to_be_enrolled():
    """What clusters cost: that of the clients that train, and for newcomers the router on the way down."""
    found = []
    for clients, newcomers in ((4, 0), (5, 1)):
        data = dataclasses.replace(smoke().data, scenario="all", clients=clients, newcomers=newcomers)
        enrolment = routing.one_cluster_each([24] * clients, 4)._replace(table=np.tile(np.arange(4), (clients, 1)))
        found.append(described(dataclasses.replace(smoke(), data=data), enrolment))
    assert found[0][0] == found[1][0] > 0
    assert found[1][1] - found[0][1] == (4 + 2) * 64 * 4  # centroids, mean and deviation


def test_the_papers_clusters_cost_their_centres_alone():
    """Three of two founders go up, and nothing of the newcomer; both centroids come down to all three."""
    config = dataclasses.replace(
        smoke(),
        data=dataclasses.replace(smoke().data, clients=3, newcomers=1),
        cluster=dataclasses.replace(smoke().cluster, recipe="paper"),
    )
    prepared = SimpleNamespace(config=config, model=SimpleNamespace(config=SimpleNamespace(width=8)))
    enrolment = routing.one_cluster_each([2, 2, 2], 2)._replace(table=np.array([[0, 1], [1, -1], [0, 1]]))
    assert clusters.traffic(prepared, enrolment) == (4 * 8 * 3, 4 * 8 * 2 * 3)


def test_what_finding_the_counts_costs_is_counted():
    """Local centres as many as the silhouettes said; for every k ten Lloyd steps and a score, then ten steps more."""
    counts = dataclasses.replace(smoke().cluster, local_clusters=0, global_clusters=0)
    scores = [{2: 0.1, 3: 0.4}, {2: 0.5, 3: 0.2}, {2: 0.3, 3: 0.1}, {2: 0.0, 3: 0.6}]
    silhouettes = {f"local {client}": found for client, found in enumerate(scores)} | {
        "global": {2: 0.1, 3: 0.2, 4: 0.9}
    }
    enrolment = routing.one_cluster_each([24] * 4, 4)._replace(silhouettes=silhouettes)
    up, down = described(dataclasses.replace(smoke(), cluster=counts), enrolment)
    centres, ks, slots = 3 + 2 + 2 + 3, 2 + 3 + 4, 10 * (2 + 3 + 4 + 4) + 9
    assert up == 4 * (centres * (64 + 1) + 4 * (2 * 64 + 1) + 64 + 4 * slots * (64 + 2))
    assert down == 4 * 64 * 4 * (4 + 3 + slots + ks)


def test_a_lane_that_is_not_finite_leaves_a_record_that_is_json():
    prepared = experiment.prepare(dataclasses.replace(smoke(), strategy="local"))
    enrolment = experiment.enroll(prepared, None)
    state, rows = experiment.start(prepared, enrolment), experiment.members(prepared, enrolment)
    poisoned = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), state.bank)
    compute = dataclasses.replace(prepared.config.compute, lanes_together=1)
    prepared = prepared._replace(config=dataclasses.replace(prepared.config, compute=compute))
    inputs = experiment.round_inputs(prepared, rows, 1)
    _, record = experiment.train_round(prepared, state._replace(bank=poisoned), *inputs)
    again = json.loads(json.dumps(record, allow_nan=False))
    (bad,) = [lane for lane in again["lanes"] if "rejected" in lane]
    assert bad["client"] == 1 and set(bad["loss"]) == {None}
    others = [lane["loss"] for lane in again["lanes"] if lane is not bad]
    assert again["loss"] == pytest.approx(np.mean(others), rel=1e-5)


def test_predictions_name_the_cluster_that_a_text_was_sent_to(tmp_path, unanswered):
    """Of FedRouter-Sum, whose adapter of all tasks answers with each."""
    once = dataclasses.replace(smoke().rounds, rounds=1)
    runs.run(dataclasses.replace(smoke(), strategy="fedrouter-sum", rounds=once), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    sent = {}
    for line in lines:
        if line["part"] == "generalisation":
            sent[line["instruction"]] = line["slot"]
    found = serve.route(tmp_path / "run", list(sent))
    assert [entry["slot"] for entry in found] == list(sent.values()) and len(set(sent.values())) > 1


@pytest.mark.parametrize("participation, clients", [(1.0, 4), (0.25, 1)])
def test_centralised_training_takes_the_steps_of_all_clients_of_a_round(participation, clients):
    once = dataclasses.replace(smoke().rounds, participation=participation)
    steps = []
    for strategy in ("centralised", "fedit"):
        prepared = experiment.prepare(dataclasses.replace(smoke(), strategy=strategy, rounds=once))
        enrolment = experiment.enroll(prepared, None)
        work, batch = experiment.round_inputs(prepared, experiment.members(prepared, enrolment), 1)
        steps.append(int((work.weight > 0).sum()) * batch.rows.labels.shape[1])
        assert clusters.describe(prepared, enrolment)["never_trained"] == [] or strategy == "fedit"
        assert plan.plan(prepared.config, 60, 12).tokens == steps[-1] * prepared.config.local.batch * 60
    assert steps == [clients * smoke().local.steps] * 2


def test_an_oracle_has_no_adapter_for_a_task_that_nobody_holds():
    config = dataclasses.replace(smoke(), strategy="oracle")
    prepared = experiment.prepare(config)
    enrolment = experiment.enroll(prepared, None)
    missing, *tasks = prepared.partition.tasks
    clients = [
        held._replace(train=[i for i in held.train if prepared.dataset.train[i].task != missing])
        for held in prepared.partition.clients
    ]
    rows = [prepared.dataset.train[i].task for held in clients for i in held.train]
    assert set(rows) == set(tasks)
    labels = np.full_like(enrolment.labels, -1)
    table = np.asarray(enrolment.table)
    for client, held in enumerate(clients):
        slots = [prepared.partition.tasks.index(prepared.dataset.train[i].task) for i in held.train]
        labels[client, : len(slots)] = [table[client].tolist().index(slot) for slot in slots]
    prepared = prepared._replace(partition=prepared.partition._replace(clients=clients))
    enrolment = enrolment._replace(labels=labels)
    state = experiment.start(prepared, enrolment)
    for question in evaluate.questions(prepared, state, enrolment, None, False):
        task = prepared.dataset.test[question.row].task
        assert any(question.weights) == (task != missing)


def test_a_tokenizer_of_another_model_is_refused(tiny):
    small = dataclasses.replace(tiny.config, vocab_size=100)
    with pytest.raises(UserError, match="but the model embeds 100; are they of one model"):
        experiment.prepare(smoke(), tiny._replace(config=small))


def test_a_newcomer_is_routed_as_it_was_scored(tmp_path, unanswered):
    data = dataclasses.replace(smoke().data, scenario="all", clients=4, newcomers=2, mix_rows=4, test_rows=4)
    once = dataclasses.replace(smoke().rounds, rounds=1)
    config = dataclasses.replace(smoke(), strategy="ifca", data=data, rounds=once)
    runs.run(config, tmp_path / "run")
    scored = {}
    for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines():
        answer = json.loads(line)
        if answer["part"] == "newcomers":
            scored[answer["client"]] = answer["slot"]
    assert sorted(scored) == [2, 3]
    whose = json.loads((tmp_path / "run" / "adapters" / "clients.json").read_text())
    assert sorted(whose) == ["0", "1"]  # newcomers choose by their rows
    for client, slot in scored.items():
        assert serve.route(tmp_path / "run", ["A text."], client)[0]["slot"] == slot


def test_newcomers_of_ifca_take_the_adapter_that_fits_them_best():
    """Two slots, one spoilt: whoever joins takes the other, whatever was drawn for it."""
    config = smoke()
    config = dataclasses.replace(
        config,
        strategy="ifca",
        data=dataclasses.replace(config.data, scenario="all", newcomers=2),
        cluster=dataclasses.replace(config.cluster, global_clusters=2),
    )
    prepared = experiment.prepare(config)
    state = experiment.start(prepared, experiment.enroll(prepared, None))
    for good, value in ((0, 1.0), (1, jnp.nan)):
        spoilt = jax.tree.map(lambda leaf, bad=1 - good, value=value: leaf.at[bad].set(value), state.bank)
        drawn = jnp.full_like(state.table, 1 - good)
        found = experiment.settle(prepared, state._replace(bank=spoilt, table=drawn, round=jnp.ones((), jnp.int32)))
        assert found.table[:, 0].tolist() == [1 - good] * 2 + [good] * 2  # of four clients the last two


def test_clients_of_ifca_that_the_last_round_did_not_draw_choose_before_they_answer(recwarn):
    """Half of four take part, the others chose before, or never. No program holds the base as a constant."""
    config = smoke()
    config = dataclasses.replace(
        config,
        strategy="ifca",
        data=dataclasses.replace(config.data, scenario="all"),
        cluster=dataclasses.replace(config.cluster, global_clusters=2),
        rounds=dataclasses.replace(config.rounds, participation=0.5),
    )
    prepared = experiment.prepare(config)
    state = experiment.start(prepared, experiment.enroll(prepared, None))
    spoilt = jax.tree.map(lambda leaf: leaf.at[0].set(1.0), state.bank)
    state = state._replace(bank=spoilt, table=jnp.zeros_like(state.table), round=jnp.full((), 2, jnp.int32))
    asked = experiment.round_inputs(prepared, [[held] for held in prepared.train], 2)[0].client
    assert len(asked) == 2
    before = jax.config.jax_captured_constants_warn_bytes
    jax.config.update("jax_captured_constants_warn_bytes", 50_000)
    try:
        found = experiment.settle(prepared, state).table[:, 0]
    finally:
        jax.config.update("jax_captured_constants_warn_bytes", before)
    assert not [warning for warning in recwarn if "constant" in str(warning.message)]
    assert {client for client in range(4) if found[client] == 1} == {*range(4)} - {*asked.tolist()}
