"""The clusters of a run, as `clusters.json` keeps them: who holds which rows, where they belong, what that took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedrouter_jax import config as config_lib
from fedrouter_jax import experiment, formats, routing
from fedrouter_jax.config import Config
from fedrouter_jax.data import schedule
from fedrouter_jax.data.rows import digest
from fedrouter_jax.data.scenarios import Client, Partition
from fedrouter_jax.errors import UserError
from fedrouter_jax.experiment import Prepared
from fedrouter_jax.routing import Enrolment
from fedrouter_jax.weighted_rows import padded


def describe(prepared: Prepared, enrolment: Enrolment) -> dict:
    """What `clusters.json` holds: local and global cluster of every row, how well they match the tasks, bytes."""
    tasks, table = prepared.partition.tasks, np.asarray(enrolment.table)
    clients, natural = [], prepared.config.data.scenario == "natural"
    for number, held in enumerate(prepared.partition.clients):
        labels = enrolment.labels[number][: len(held.train)]
        names = [prepared.dataset.train[i].task for i in held.train]
        clients.append(
            {
                "client": number,
                **({"name": prepared.dataset.train[held.train[0]].client} if natural else {}),
                "rows": held.train,
                "tasks": names,
                "local": labels.tolist(),
                "global": table[number, labels].tolist(),
            }
        )
    sizes = np.array([[(row == k).sum() for k in range(table.shape[1])] for row in enrolment.labels])
    training = prepared.config.data.founders
    seen = {prepared.dataset.train[i].instruction for held in prepared.partition.clients[:training] for i in held.train}
    clustered = prepared.strategy.enrolling == "clustering"
    up, down = traffic(prepared, enrolment) if clustered else (0, 0)
    true = [[tasks.index(name) for name in client["tasks"]] for client in clients]
    right = accuracy(enrolment, true, len(tasks), training) if clustered and tasks != [""] else None
    return {
        "tasks": tasks,
        "clustered": clustered,
        "recipe": prepared.config.cluster.recipe if clustered else None,
        "clusters": enrolment.clusters,
        "table": table.tolist(),
        "slot_tasks": slot_names(prepared, slot_tasks(prepared, enrolment)),
        # None: nothing is clustered, or there are no labels to compare with
        "accuracy": right and dict(zip(("local", "global"), right, strict=True)),
        "never_trained": []
        if prepared.strategy.pooled
        else schedule.never_trained(sizes[:training], prepared.config.rounds, prepared.config.seed),
        "silhouettes": enrolment.silhouettes,
        "bytes_up": up,
        "bytes_down": down,
        **origin(prepared),
        "config": config_lib.choices(prepared.config),
        "training_rows": len(prepared.dataset.train),
        "cut_rows": sum(row.truncated for held in prepared.train for row in held),
        "seen_rows": sum(prepared.dataset.test[row].instruction in seen for row in prepared.test),
        "test_rows": len(prepared.test),
        "clients": clients,
    }


def slot_tasks(prepared: Prepared, enrolment: Enrolment) -> np.ndarray:
    """Rows of each task that each slot is trained on, int [task, slot]: newcomers' are not."""
    tasks, clients = prepared.partition.tasks, prepared.partition.clients
    counts, table = np.zeros((len(tasks), enrolment.clusters), int), np.asarray(enrolment.table)
    for number, held in enumerate(clients[: prepared.config.data.founders]):
        for i, label in zip(held.train, enrolment.labels[number], strict=False):
            counts[tasks.index(prepared.dataset.train[i].task), table[number, label]] += 1
    return counts


def slot_names(prepared: Prepared, counts: np.ndarray) -> list[str]:
    """The task with most of each slot's rows [task, slot]; "" for a slot that has none."""
    return [prepared.partition.tasks[rows.argmax()] if rows.any() else "" for rows in counts.T]


def accuracy(
    enrolment: Enrolment, labels: Sequence[Sequence[int]], count: int, founders: int | None = None
) -> tuple[float, float]:
    """The share of rows in the right local cluster of their client, and of founders' rows in the right slot.

    `labels` [client][row], numbers below `count`, say where rows belong; the first `founders` clients (None: all) are
    not newcomers.
    """
    table, slots, right = np.asarray(enrolment.table), np.zeros((count, enrolment.clusters), int), 0.0
    for client, true in enumerate(labels):
        found = enrolment.labels[client][: len(true)]
        local = np.zeros((count, table.shape[1]), int)
        np.add.at(local, (true, found), 1)
        right += clustering_accuracy(local) * len(true)
        if founders is None or client < founders:
            np.add.at(slots, (true, table[client, found]), 1)
    return right / sum(map(len, labels)), clustering_accuracy(slots)


def clustering_accuracy(counts: np.ndarray) -> float:
    """Clustering accuracy: the share of rows on the best one-to-one matching of rows' labels [label, cluster]."""
    from scipy.optimize import linear_sum_assignment  # here, for it takes a third of a second

    rows, cols = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, cols].sum() / counts.sum())


def origin(prepared: Prepared) -> dict[str, str]:
    """What all of a run is made from, by its sha256: rows, if read, the weights, and what describes them."""
    rows = {} if prepared.dataset is None else {"data": digest(prepared.dataset)}
    described = {"described": prepared.model.described} if prepared.model.described else {}
    return {**rows, "model": prepared.model.fingerprint, **described}


def check_origin(found: Mapping[str, Any], prepared: Prepared) -> None:
    """Raise `ValueError` where a file does not say that it was made from just these."""
    config = prepared.config
    names = {
        "data": f"rows of {config.data.data}",
        "model": f"weights of {config.model}",
        "described": f"configuration or the tokenizer of {config.model}",
    }
    for key, value in origin(prepared).items():
        if found.get(key, value if key == "described" else None) != value:  # runs of before do not tell that
            raise ValueError(f"the {names[key]} were others then")


def traffic(prepared: Prepared, enrolment: Enrolment) -> tuple[int, int]:
    """Bytes (up, down) of all clients' clustering: statistics, centres, and the sums of Lloyd steps, in float32.

    Statistics are taken about the mean of one client, which goes up and comes down to all that train.
    """
    data, width, size = prepared.config.data, prepared.model.config.width, 4
    training = data.founders  # newcomers only receive
    recipe = routing.RECIPES[prepared.config.cluster.recipe]
    scored = sum(map(int, enrolment.silhouettes.get("global", []))) if recipe.lloyd else 0
    # Centroids down, counts, sums and sums of squares up, for every slot tried, in every Lloyd step ...
    tried = recipe.lloyd * (scored + enrolment.clusters)
    statistics = (training * (2 * width + 1) + width) * recipe.standardise
    sums = training * (tried + scored) * (width + 2)  # ... and once more what a silhouette is made of
    vectors = data.clients * (enrolment.clusters + 2 * recipe.standardise)
    vectors += training * (recipe.standardise + tried + 2 * scored)
    centres = _centres_sent(prepared, enrolment) * (width + bool(recipe.lloyd))  # which count by their rows there
    return (statistics + sums + centres) * size, vectors * width * size


def _centres_sent(prepared: Prepared, enrolment: Enrolment) -> int:
    """How many local centres the server was sent; with `refined`, clients keep other clusters than those."""
    data, silhouettes = prepared.config.data, enrolment.silhouettes
    training = range(data.founders)
    if "local 0" in silhouettes:
        return sum(int(max(scores := silhouettes[f"local {client}"], key=scores.get)) for client in training)
    if routing.RECIPES[prepared.config.cluster.recipe].lloyd:
        return len(training) * experiment.cluster_counts(prepared.config, prepared.partition)[0]
    return int((np.asarray(enrolment.table)[training] >= 0).sum())


def read(path: Path) -> formats.Clusters:
    """`clusters.json` of a run that has begun; raises `UserError` for anything else."""
    found = formats.read_clusters(path)
    if found is None:
        raise UserError(f"{path} is missing, though the run has begun; restore the file, or start a new run")
    return found


def partition(found: formats.Clusters, config: Config) -> Partition:
    """Who holds which training rows, by a run's clusters; test rows are not said there."""
    clients = found["clients"]
    founders = clients[: config.data.founders]
    founding = {task for client in founders for task in client["tasks"]}
    return Partition([Client(client["rows"], []) for client in clients], [], found["tasks"], len(founding))


def enrolment(path: Path, found: formats.Clusters, prepared: Prepared) -> Enrolment:
    """The enrolment as a run's clusters have it; the router's numbers are in the checkpoint.

    Raises `UserError` where they are of other rows or clients than the prepared ones.
    """
    try:
        check_origin(found, prepared)
        if [client["rows"] for client in found["clients"]] != [held.train for held in prepared.partition.clients]:
            raise ValueError("clients hold other rows now: by another config.json, or another version")
    except ValueError as error:
        raise UserError(
            f"{path}: not the clusters of this run ({error}); restore the file, or start a new run"
        ) from None
    labels, silhouettes = [client["local"] for client in found["clients"]], found["silhouettes"]
    table, clusters = jnp.asarray(found["table"], jnp.int32), found["clusters"]
    if prepared.strategy.enrolling != "clustering":
        return Enrolment(table, clusters, (), padded(labels), {})
    width = prepared.model.config.width
    router = routing.Router(jnp.zeros((clusters, width)), jnp.zeros(width), jnp.zeros(width), jnp.zeros((), bool))
    return Enrolment(table, clusters, router, padded(labels), silhouettes)
