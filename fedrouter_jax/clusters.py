"""The clusters of a run, as `clusters.json` keeps them: who holds which rows, where they belong, what that took."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedrouter_jax import config as config_lib
from fedrouter_jax import evaluate, experiment, routing
from fedrouter_jax.data import schedule
from fedrouter_jax.data.rows import digest
from fedrouter_jax.errors import UserError
from fedrouter_jax.experiment import Prepared
from fedrouter_jax.routing import Enrolment


def describe(prepared: Prepared, enrolment: Enrolment) -> dict:
    """What `clusters.json` holds: local and global cluster of every row, how well they match the tasks, bytes."""
    tasks, table = prepared.partition.tasks, np.asarray(enrolment.table)
    clients, right, total = [], 0.0, 0
    for number, held in enumerate(prepared.partition.clients):
        labels = enrolment.labels[number][: len(held.train)]
        names = [prepared.dataset.train[i].task for i in held.train]
        counts = np.zeros((len(tasks), table.shape[1]), int)
        np.add.at(counts, ([tasks.index(name) for name in names], labels), 1)
        right, total = right + evaluate.matched(counts) * len(names), total + len(names)
        clients.append(
            {
                "client": number,
                "rows": held.train,
                "tasks": names,
                "local": labels.tolist(),
                "global": table[number, labels].tolist(),
            }
        )
    sizes = np.array([[(row == k).sum() for k in range(table.shape[1])] for row in enrolment.labels])
    training = len(clients) - prepared.config.data.newcomers
    counts = evaluate.slot_tasks(prepared, enrolment)
    clustered = prepared.strategy.enrolling == "clustering"
    up, down = traffic(prepared, enrolment) if clustered else (0, 0)
    accuracy = {"local": right / total, "global": evaluate.matched(counts)} if clustered and tasks != [""] else None
    return {
        "tasks": tasks,
        "clustered": clustered,
        "recipe": prepared.config.cluster.recipe if clustered else None,
        "clusters": enrolment.clusters,
        "table": table.tolist(),
        "slot_tasks": evaluate.slot_names(prepared, counts),
        "accuracy": accuracy,  # None: nothing is clustered, or there are no labels to compare with
        "never_trained": []
        if prepared.strategy.pooled
        else schedule.never_trained(sizes[:training], prepared.config.rounds, prepared.config.seed),
        "silhouettes": enrolment.silhouettes,
        "bytes_up": up,
        "bytes_down": down,
        **origin(prepared),
        "config": config_lib.choices(prepared.config),
        "cut_rows": sum(row.truncated for held in prepared.train for row in held),
        "clients": clients,
    }


def origin(prepared: Prepared) -> dict[str, str]:
    """What all of a run is made from, by its sha256: the rows and the model's weights, whatever their names say."""
    return {"data": digest(prepared.dataset), "model": prepared.model.fingerprint}


def check_origin(found: Mapping[str, Any], prepared: Prepared) -> None:
    """Raise `ValueError` where a file says (those of older runs do not) that it was made from something else."""
    names = {"data": f"rows of {prepared.config.data.data}", "model": f"weights of {prepared.config.model}"}
    for key, value in origin(prepared).items():
        if found.get(key, value) != value:
            raise ValueError(f"the {names[key]} were others then")


def traffic(prepared: Prepared, enrolment: Enrolment) -> tuple[int, int]:
    """Bytes (up, down) of all clients' clustering: statistics, centres, and the sums of Lloyd steps, in float32.

    Statistics are taken about the mean of one client, which goes up and comes down to all that train.
    """
    data, width, size = prepared.config.data, prepared.model.config.width, 4
    training = data.clients - data.newcomers  # newcomers only receive
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
    training = range(data.clients - data.newcomers)
    if "local 0" in silhouettes:
        return sum(int(max(scores := silhouettes[f"local {client}"], key=scores.get)) for client in training)
    if routing.RECIPES[prepared.config.cluster.recipe].lloyd:
        return len(training) * (experiment.cluster_counts(prepared.config, prepared.partition)[0] or 0)
    return int((np.asarray(enrolment.table)[training] >= 0).sum())


def read(path: Path, prepared: Prepared) -> Enrolment:
    """The enrolment as `clusters.json` has it; the router's numbers are in the checkpoint."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        check_origin(raw, prepared)
        labels, silhouettes = [client["local"] for client in raw["clients"]], raw["silhouettes"]
        table, clusters = np.asarray(raw["table"], np.int32), int(raw["clusters"])
        for row, slots, held, client in zip(labels, table, prepared.partition.clients, raw["clients"], strict=True):
            if client["rows"] != held.train:
                raise ValueError("clients hold other rows now: by another config.json, or another version")
            if len(row) != len(held.train) or not set(row) <= set(np.flatnonzero(slots >= 0).tolist()):
                raise ValueError("the local clusters of a client are not those of its rows")
        if table.max() >= clusters:
            raise ValueError(f"slot {table.max()} of {clusters}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not the clusters of this run ({error}); restore the file, or start a new run"
        ) from None
    table = jnp.asarray(table)
    padded = np.full((len(labels), max(map(len, labels))), -1, np.int32)
    for number, row in enumerate(labels):
        padded[number, : len(row)] = row
    if prepared.strategy.enrolling != "clustering":
        return Enrolment(table, clusters, (), padded, {})
    width = prepared.model.config.width
    router = routing.Router(jnp.zeros((clusters, width)), jnp.zeros(width), jnp.zeros(width), jnp.zeros((), bool))
    return Enrolment(table, clusters, router, padded, silhouettes)
