"""One experiment, from a config to trained adapters and scores: what is computed, without the files it is kept in.

prepare    load the model and the rows, deal them to clients, tokenise
embed_rows, enroll, start
train_round (T times)
settle; `evaluate` scores
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedrouter_jax import at_once, client, embed, lora, processes, routing
from fedrouter_jax import bank as bank_lib
from fedrouter_jax import config as config_lib
from fedrouter_jax import mesh as mesh_lib
from fedrouter_jax import method as method_lib
from fedrouter_jax import server as server_lib
from fedrouter_jax.config import Config
from fedrouter_jax.data import packing, schedule, sources, tokens
from fedrouter_jax.data.rows import Dataset, Row
from fedrouter_jax.data.scenarios import Partition, partition, tasks_of
from fedrouter_jax.errors import UserError
from fedrouter_jax.federation import make_round, map_losses
from fedrouter_jax.keys import key_of
from fedrouter_jax.models import DecoderConfig, Model, load_model
from fedrouter_jax.sharing import divided
from fedrouter_jax.types import Advance, FederationState, Strategy, Work, unseen


class Prepared(NamedTuple):
    """What a config means on this machine: everything that does not change while training.

    Without its rows (`without_rows`) a run answers, but neither trains nor is scored.
    """

    config: Config
    model: Model
    strategy: Strategy
    partition: Partition
    mesh: Mesh | None  # where there are several devices
    dataset: Dataset | None = None
    train: Sequence[list[tokens.Tokens]] = ()  # [client][row]
    test: Mapping[int, tokens.Tokens] = MappingProxyType({})  # by index into dataset.test
    pack: tuple[int, int] = (0, 0)  # tokens and response tokens of a training pack
    packs: int = 1  # of a group that train together
    round: Callable | None = None  # the jitted round


def prepare(
    config: Config, model: Model | None = None, strategy: Strategy | None = None, dataset: Dataset | None = None
) -> Prepared:
    """Load and lay out everything; raises `UserError` for bad input.

    `model` and `dataset` are the config's model and rows where they are in memory already; `strategy` is one of your
    own, in place of the config's.
    """
    config_lib.check(config)
    dataset = rows_of(config, dataset)
    split = partition(dataset, config.data, config.seed)
    n_l, n_g = cluster_counts(config, split)
    strategy = strategy or method_lib.strategy(config, n_g)
    method_lib.check(config, strategy)
    if split.tasks == [""]:
        method_lib.check_unlabelled(config, strategy, dataset.name)
    if strategy.enrolling == "clustering":  # before minutes are spent on embeddings
        routing.check_counts([len(held.train) for held in split.clients], n_l, n_g, config.data.newcomers)
    model, mesh = loaded(config, model)
    config_lib.check_length(config, model.config)
    train, test = encoded(config, model, dataset, split)
    groups_of_lanes = at_once.groups_of_lanes(config, strategy, n_l)
    lanes, batch = groups_of_lanes[1], config.local.batch
    pack = packing.shape(train, batch, lanes)
    counts = packing.packs_of_steps(train, batch, lanes, *pack)
    found = at_once.training(config, model.config, strategy, n_g, groups_of_lanes, pack, counts)
    packs, groups = map(processes.agreed, found)  # free memory differs between hosts, programs may not
    round = round_program(config, model.config, strategy, packs, groups, mesh)
    return Prepared(config, model, strategy, split, mesh, dataset, train, test, pack, packs, round)


def loaded(config: Config, model: Model | None = None) -> tuple[Model, Mesh | None]:
    """The config's model, or the one given, where it is to lie; and the mesh, where there are several devices."""
    mesh = mesh_lib.make(config.compute.model_parallel)
    place = mesh_lib.placing(mesh)
    given = model and model._replace(params=place(model.params))
    return given or load_model(config.model, config.dtype, config.quantise, place), mesh_lib.several(mesh)


def encoded(
    config: Config, model: Model, dataset: Dataset, split: Partition
) -> tuple[list[list[tokens.Tokens]], dict[int, tokens.Tokens]]:
    """The training rows by [client][row], and the test rows that are asked by their index."""
    data, asked = config.data, test_rows(split)
    encode = partial(
        tokens.encode,
        model.tokenizer,
        template=data.template,
        max_length=data.max_length,
        max_response=data.max_response,
    )
    test = dict(zip(asked, encode([dataset.test[i] for i in asked], to_answer=True), strict=True))
    train = [encode([dataset.train[i] for i in held.train]) for held in split.clients]
    for rows in (*train, test.values()):
        tokens.check(rows, model.config.vocab_size, model.name)
    return train, test


def round_program(
    config: Config, decoder: DecoderConfig, strategy: Strategy, packs: int, groups: int, mesh: Mesh | None
) -> Callable:
    """A strategy's round with the config's local steps, learning rates and server (`federation.make_round`)."""
    local, rounds, blocks = config.local, config.rounds, config.compute.blocks
    update = client.make_client_update(decoder, config.lora, local, blocks, packs, strategy.optimiser)
    rate = partial(client.learning_rate, local, rounds.rounds)
    server = server_lib.optimiser(rounds.server, rounds.server_rate)
    loss = client.make_client_loss(decoder, config.lora, packs)
    return make_round(strategy, update, rate, rounds.rounds, groups, server, loss, mesh)


def rows_of(config: Config, dataset: Dataset | None = None) -> Dataset:
    """The rows that a config names, or those given; for validation the training rows of them, split once more.

    Raises `UserError` for what `sources.load` refuses.
    """
    dataset = dataset or sources.load(config.data.data, sources.columns(config.data.columns), seed=config.seed)
    if not config.data.validation:
        return dataset
    name = f"{dataset.name} (--validation: of its training rows)"
    return Dataset(*sources.split(dataset.train, config.seed, name), name)


def without_rows(config: Config, split: Partition) -> Prepared:
    """The same of a run that only answers: whose rows were dealt so, but are not read."""
    model, mesh = loaded(config)
    strategy = method_lib.strategy(config, cluster_counts(config, split)[1])
    method_lib.check(config, strategy)
    return Prepared(config, model, strategy, split, mesh)


def test_rows(split: Partition) -> list[int]:
    """The test rows anybody is asked about, in order."""
    return sorted({row for held in split.clients for row in held.test} | set(split.mix))


def embedded_rows(prepared: Prepared) -> list[Row]:
    """The rows that are embedded: the training rows of client 0, 1, ..., then `test_rows`."""
    rows = [prepared.dataset.train[i] for held in prepared.partition.clients for i in held.train]
    return rows + [prepared.dataset.test[i] for i in test_rows(prepared.partition)]


def embed_rows(prepared: Prepared, advance: Advance = unseen) -> np.ndarray:
    """Embeddings float32 [row, width] of `embedded_rows`."""
    return embed_texts(prepared, [row.instruction for row in embedded_rows(prepared)], advance)


def embed_texts(prepared: Prepared, texts: Sequence[str], advance: Advance = unseen) -> np.ndarray:
    """Embeddings float32 [text, width] by the config's recipe."""
    config, model = prepared.config, prepared.model
    ids = tokens.encode_texts(model.tokenizer, texts, config.data.max_length)
    recipe = routing.RECIPES[config.cluster.recipe]

    def some(params, _, places, advance):
        here = [ids[place] for place in places]
        packs = at_once.packs(config)
        return embed.embed(model.config, params, here, recipe.depth, packs, advance, skip=recipe.skip)

    return divided(model.params, len(texts), some, advance)


def enroll(prepared: Prepared, embeddings: np.ndarray | None) -> routing.Enrolment:
    """Local and global clusters, or the true tasks, or one cluster a client: whatever the strategy works with.

    `embeddings` float32 [row, width] are those of `embed_rows`, None unless the strategy clusters rows. Raises
    `UserError` where they are not finite, or for numbers of clusters that rows cannot fill.
    """
    rows = [len(held.train) for held in prepared.partition.clients]
    config = prepared.config
    local, total = cluster_counts(config, prepared.partition)
    key = jax.random.fold_in(key_of(config.seed), 1)
    if not prepared.strategy.has_local_clusters:
        dealt = key if prepared.strategy.enrolling == "random" else None
        return routing.one_cluster_each(rows, total or 1, dealt, config.data.newcomers)
    if prepared.strategy.enrolling == "tasks":
        tasks = prepared.partition.tasks
        numbers = [
            [tasks.index(prepared.dataset.train[i].task) for i in held.train] for held in prepared.partition.clients
        ]
        found = routing.one_cluster_a_task(numbers, len(tasks))
    else:
        ends = np.cumsum(rows)
        if not np.isfinite(embeddings).all():
            raise UserError(f"{config.model} embeds texts as numbers that are not finite; are its weights whole?")
        clients = [embeddings[end - count : end] for count, end in zip(rows, ends, strict=True)]
        recipe, newcomers = routing.RECIPES[config.cluster.recipe], config.data.newcomers
        found = routing.enroll(key, clients, recipe, local, total, config.cluster.max_clusters, newcomers)
        # Several processes each come to the same, but for the last bit, which may decide where a row belongs.
        agreed = processes.of_first((found.table, found.clusters, found.router, found.labels))
        found = routing.Enrolment(agreed[0], int(agreed[1]), *agreed[2:], found.silhouettes)
    if config.rounds.turns == "staggered":
        return routing.staggered(found, config.rounds.rounds, config.data.newcomers, config.rounds.clusters_per_round)
    return found


def cluster_counts(config: Config, split: Partition) -> tuple[int | None, int | None]:
    """n_l and n_g: as configured, by default the tasks a client holds and those of all that train; None: found.

    Rows without labels say nothing of how many tasks there are, and clients that come with their rows hold any number.
    """
    local, total = config.cluster.local_clusters, config.cluster.global_clusters
    labelled, scenario = split.tasks != [""], config.data.scenario
    if local is None and labelled and scenario != "natural":
        local = len(tasks_of(0, split.tasks, scenario))
    if total is None and labelled:
        total = split.founding
    return local or None, total or None


def start(prepared: Prepared, enrolment: routing.Enrolment) -> FederationState:
    """The state before round 1: every slot holds the same fresh adapter."""
    config, decoder = prepared.config, prepared.model.config
    fresh = lora.init(key_of(config.seed), decoder, config.lora)
    made = prepared.strategy.init(dict.fromkeys(prepared.strategy.owners, fresh), enrolment)
    state = jax.tree.map(jnp.asarray, made)  # what a method makes itself may be NumPy's
    server = server_lib.optimiser(config.rounds.server, config.rounds.server_rate)
    return placed(prepared, state._replace(server=server_lib.init(server, prepared.strategy.owners, state.bank)))


def alone(prepared: Prepared) -> Prepared:
    """The same for what each of several processes computes by itself, on its own devices."""
    return prepared._replace(model=prepared.model._replace(params=processes.own(prepared.model.params)))


def placed(prepared: Prepared, state: FederationState) -> FederationState:
    """The state on the mesh, where there is one."""
    return state if prepared.mesh is None else mesh_lib.place_state(prepared.mesh, prepared.strategy, state)


def members(prepared: Prepared, enrolment: routing.Enrolment) -> list[list[list[tokens.Tokens]]]:
    """Encoded rows by [client][local cluster]; all of them as one cluster of one client where they are pooled.

    Newcomers are not there yet.
    """
    training = prepared.train[: prepared.config.data.founders]
    if prepared.strategy.pooled:
        return [[[row for held in training for row in held]]]
    clusters = range(enrolment.table.shape[1])
    return [
        [[row for row, label in zip(rows, enrolment.labels[c], strict=False) if label == k] for k in clusters]
        for c, rows in enumerate(training)
    ]


def settle(prepared: Prepared, state: FederationState) -> FederationState:
    """The state as it answers. It is another one only where a strategy chooses slots by losses (IFCA): there clients
    that the last round did not draw, and newcomers, choose theirs now.

    They look at as many of their rows as a round has, all of them as one cluster.
    """
    config, choose = prepared.config, prepared.strategy.choose
    asked = schedule.drawn(config.data.founders, int(state.round), config.rounds.participation, config.seed)
    who = np.setdiff1d(np.arange(config.data.clients, dtype=np.int32), asked)
    if choose is None or not len(who):
        return state
    work = Work(who, np.zeros(len(who), np.int32), np.ones(len(who), np.float32))
    local, rows = config.local, [[held] for held in prepared.train]
    together = config.compute.lanes_together
    batch = schedule.batches(work, rows, 1, local.steps, local.batch, *prepared.pack, config.seed, together)
    loss, params = client.make_client_loss(prepared.model.config, config.lora), prepared.model.params
    # The base is an argument: as a constant of the program it would be compiled into it.
    losses = jax.jit(lambda params, adapters, batch: map_losses(loss, params, adapters, work, batch, 1))
    with mesh_lib.known(params):
        return choose(state, work, lambda adapters: losses(params, adapters, batch))


def round_inputs(prepared: Prepared, rows: list[list[list[tokens.Tokens]]], t: int) -> tuple[Work, packing.Batch]:
    """The lanes and batches of round t (1..T), as numpy."""
    config = prepared.config
    sizes = np.array([[len(cluster) for cluster in held] for held in rows])
    work = schedule.lanes(sizes, t, config.rounds, config.seed)
    local, together = config.local, config.compute.lanes_together
    steps = method_lib.steps_of_a_lane(config, prepared.strategy)
    over = 1 if prepared.mesh is None else prepared.mesh.shape[mesh_lib.CLIENTS]
    batch = schedule.batches(work, rows, t, steps, local.batch, *prepared.pack, config.seed, together, over)
    return work, batch


def train_round(
    prepared: Prepared, state: FederationState, work: Work, batch: packing.Batch
) -> tuple[FederationState, dict]:
    """One round: the new state (the old one is donated) and a JSON-ready record of what happened."""
    before = clock.perf_counter()
    key = jax.random.fold_in(key_of(prepared.config.seed), 2)
    table = np.array(state.table)  # a copy: the state is donated
    spread = batch if prepared.mesh is None else mesh_lib.place_batches(prepared.mesh, batch)
    state, info = prepared.round(state, prepared.model.params, work, spread, key)
    loss, rejected = np.asarray(info.loss), np.asarray(info.rejected)
    seconds = clock.perf_counter() - before
    strategy = prepared.strategy
    phases = strategy.phases(int(state.round), prepared.config.rounds.rounds)
    size = 0 if strategy.pooled else bank_lib.wire_bytes(strategy.owners, state.bank, phases)
    trained = work.weight > 0
    counted = trained & np.isfinite(loss).all(axis=1)
    lanes = [
        {
            "client": int(work.client[i]),
            "cluster": int(work.cluster[i]),
            "weight": float(work.weight[i]),
            "loss": [float(value) if np.isfinite(value) else None for value in loss[i]],
            **({"rejected": "not finite"} if rejected[i] else {}),
        }
        for i in np.flatnonzero(trained)
    ]
    clients = len(set(work.client[trained].tolist()))
    up, down = strategy.traffic(state, len(lanes), size)
    if strategy.regroup is not None:
        state = placed(prepared, processes.of_first(strategy.regroup(processes.whole(state))))
    regrouped = {} if np.array_equal(table, state.table) else {"table": np.asarray(state.table).tolist()}
    return state, {
        "round": int(state.round),
        "loss": float(loss[counted].mean()) if counted.any() else None,  # JSON has no NaN
        "learning_rate": float(info.learning_rate),
        "seconds": round(seconds, 3),
        "bytes_up": len(lanes) * up,
        "bytes_down": len(lanes) * down,
        "optimiser_steps_per_client": loss.shape[1] * len(lanes) / max(1, clients),
        "tokens": int((batch.rows.packs.segments > 0).sum()),
        "lanes": lanes,
        **regrouped,
    }
