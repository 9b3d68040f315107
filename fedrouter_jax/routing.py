"""Clusters and routing: from embedded rows to local clusters, global centroids, and the adapter of a text.

Talasso et al., arXiv 2604.00050, section 4. Clustering happens once, at enrolment; only sums, centres and counts
leave a client, never rows. The other recipes are ours: with more than a handful of tasks the paper's raw last-layer
embeddings lose a third of the rows, while inner-layer embeddings, standardised over the federation and scaled to unit
length, keep them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrouter_jax import kmeans, refine, silhouette
from fedrouter_jax.errors import UserError
from fedrouter_jax.types import Array
from fedrouter_jax.weighted_rows import padded

RecipeName = Literal["refined", "standardised", "paper"]
Mode = Literal["local", "global", "oracle"]


class Recipe(NamedTuple):
    """How a text becomes a point to cluster."""

    depth: float | None  # share of the blocks to run; None: all of them and the final norm
    standardise: bool  # every dimension over all rows of the federation, then rows to unit length
    restarts: int  # K-Means starts
    lloyd: int = 0  # federated Lloyd steps after the server's K-Means; local clusters then follow global centroids
    skip: int = 0  # first tokens of a text that are left out of the mean (`embed`)


RECIPES: dict[RecipeName, Recipe] = {
    "paper": Recipe(depth=None, standardise=False, restarts=1),
    "standardised": Recipe(depth=5 / 6, standardise=True, restarts=20),
    "refined": Recipe(depth=1 / 6, standardise=True, restarts=20, lloyd=10, skip=1),
}


@dataclass(frozen=True)
class ClusterConfig:
    """Local clustering on clients, global clustering on the server."""

    recipe: RecipeName = "refined"
    """How texts are embedded and clustered: "paper" (last layer, raw, one K-Means start), "standardised", or "refined"
    by Lloyd steps over all clients (see docs/design.md)."""
    local_clusters: int | None = None
    """Clusters n_l of each client; by default the number of tasks it holds in the scenario. 0, and the default where
    rows have no task or the scenario is natural: found, by silhouette or (recipe refined) by the global clusters."""
    global_clusters: int | None = None
    """Global clusters n_g; by default the number of tasks in the data. 0, and by default where rows have no task: by
    silhouette."""
    max_clusters: int = 10
    """Largest number of clusters the silhouette may choose; it cannot choose 1."""


class Router(NamedTuple):
    """All that is needed to send an embedded text to a slot; an artefact of its own."""

    centroids: Array  # float32 [slot, width], in prepared space
    mean: Array  # float32 [width]: subtracted
    deviation: Array  # float32 [width]: divided by
    unit: Array  # bool []: rows are then scaled to unit length


class Enrolment(NamedTuple):
    """What clustering found. `labels` stays on the clients; the rest is the server's."""

    table: Array  # int32 [client, cluster]: slot of each local cluster, -1 where empty
    clusters: int  # slots of cluster-owned adapters
    router: Router | tuple  # () when nothing was clustered
    labels: np.ndarray  # int32 [client, row]: local cluster of each training row, -1 for padding
    silhouettes: dict[str, dict[int, float]]  # {"local 0" | ... | "global": {k: score}} where k was chosen


def prepare(router: Router, embeddings: Array) -> Array:
    """Embeddings `[row, width]` as points of the router's space."""
    points = (embeddings - router.mean) / router.deviation
    length = jnp.linalg.norm(points, axis=-1, keepdims=True)
    return jnp.where(router.unit, points / jnp.maximum(length, 1e-12), points)


def nearest(router: Router, embeddings: Array, candidates: Array | None = None) -> tuple[Array, Array]:
    """The nearest candidate centroid of each row, int32 [row], and Euclidean distances to all, [row, slot].

    `candidates` is bool [row, slot] (None: all). Ties go to the lowest slot.
    """
    distances = jnp.sqrt(kmeans.nearest(prepare(router, embeddings), router.centroids)[1])
    allowed = distances if candidates is None else jnp.where(candidates, distances, jnp.inf)
    return jnp.argmin(allowed, axis=-1).astype(jnp.int32), distances


def candidates(table: Array, clients: Array, clusters: int, mode: Mode) -> Array:
    """Which slots a client's text may go to, bool [row, slot]: its own clusters' ("local") or anybody's ("global").

    A slot that no client's rows belong to is nobody's: its adapter has learnt nothing.
    """
    held = jax.nn.one_hot(table, clusters, dtype=bool).any(axis=1)
    if mode == "global":
        return jnp.broadcast_to(held.any(axis=0), (len(clients), clusters))
    return held[clients]


def statistics(embeddings: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [width] over all clients' rows, from each client's count, sums and squared sums.

    The sums are taken about a common origin (the first client's mean, which all clients thus see) in float64: a few
    dimensions of a language model's states are thousands of times larger than their spread. A constant dimension gets
    deviation 1.
    """
    origin = embeddings[0].astype(np.float64).mean(axis=0)
    reports = [
        (len(rows), (rows - origin).sum(axis=0), np.square(rows - origin).sum(axis=0))
        for rows in (client.astype(np.float64) for client in embeddings)
    ]
    count, total, squares = (sum(part) for part in zip(*reports, strict=True))
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0)
    deviation = np.where(variance > 1e-14 * (origin + mean) ** 2, np.sqrt(variance), 1.0)
    return (origin + mean).astype(np.float32), deviation.astype(np.float32)


def one_cluster_each(rows: Sequence[int], clusters: int = 1, key: Array | None = None, newcomers: int = 0) -> Enrolment:
    """The enrolment of strategies that do not cluster rows: every client is one local cluster.

    `rows`: rows per client; `clusters`: slots of cluster-owned adapters, for those that cluster clients. With `key`,
    clients but for the last `newcomers` are dealt to the slots at random, evenly; the others, and all without a key,
    are in slot 0.
    """
    founders = len(rows) - newcomers
    dealt = jnp.zeros(founders, jnp.int32) if key is None else jax.random.permutation(key, founders) % clusters
    table = jnp.pad(dealt, (0, newcomers))
    labels = padded([[0] * count for count in rows])
    return Enrolment(table[:, None].astype(jnp.int32), clusters, (), labels, {})


def one_cluster_a_task(tasks: Sequence[Sequence[int]], total: int) -> Enrolment:
    """The enrolment of an oracle: `tasks` [client][row] are true task numbers below `total`; a task is a slot."""
    held = [sorted(set(numbers)) for numbers in tasks]
    return Enrolment(jnp.asarray(padded(held)), total, (), padded([*map(np.searchsorted, held, tasks)]), {})


def enroll(
    key: Array,
    embeddings: Sequence[np.ndarray],
    recipe: Recipe,
    local: int | None,
    total: int | None,
    max_clusters: int = 10,
    newcomers: int = 0,
) -> Enrolment:
    """Cluster each client's rows, then the server's centres (all float32; one array [row, width] a client).

    `local` and `total` are n_l and n_g; None lets the silhouette choose up to `max_clusters`, for each client on its
    own and on the server. The last `newcomers` clients join later: statistics and global centroids are made without
    them, and their local clusters belong to the nearest ones. Raises `UserError` for counts that the rows cannot fill.
    """
    founders = len(embeddings) - newcomers
    points, present, router = _shared_space(embeddings, recipe, founders)
    local_key, local_choice, global_key, global_choice = jax.random.split(key, 4)

    check_counts([len(rows) for rows in embeddings], local, total, newcomers)
    silhouettes: dict[str, dict[int, float]] = {}
    counts = np.full(len(embeddings), local or 0)
    if local is None:
        client_keys = jax.random.split(local_choice, len(embeddings))
        counts, scores = _choose("local", client_keys, points, present, max_clusters, recipe.restarts)
        silhouettes |= {f"local {client}": found for client, found in enumerate(scores)}
    keys = jax.random.split(local_key, len(embeddings))
    centres, filled, labels = _fit_clients(keys, points, present, counts, recipe.restarts)

    here = filled & (jnp.arange(len(filled)) < founders)[:, None]
    available = int(here.sum())
    if recipe.lloyd:  # a centre stands for its rows: tasks that few rows hold must not draw the centres of large ones
        here = here * (labels[:, :, None] == np.arange(here.shape[1])).sum(axis=1, where=np.asarray(present)[..., None])
    flat, weight = centres.reshape(-1, centres.shape[-1]), here.reshape(-1).astype(jnp.float32)
    founding = present & (jnp.arange(len(present)) < founders)[:, None]
    if total is None:
        of_rows = (points, founding) if recipe.lloyd else None
        total, silhouettes["global"] = _choose_total(global_choice, flat, weight, of_rows, max_clusters, recipe)
    elif not 1 <= total <= available:
        raise UserError(
            f"{total} global clusters were asked for (by default the rows' tasks), but the clients found {available} "
            "local centres; "
            "lower --global-clusters, or raise --local-clusters or --clients"
        )
    centre_sets = _fit_each(global_key[None], flat[None], weight[None], total, recipe.restarts)  # the server's one set
    fit = jax.tree.map(lambda leaf: leaf[0], centre_sets)
    if recipe.lloyd:
        centroids = refine.lloyd(points, founding, fit.centers, recipe.lloyd)
        table, labels = refine.follow(points, present, centroids, local, founders)
        return Enrolment(jnp.asarray(table), total, router._replace(centroids=centroids), labels, silhouettes)
    slots = jnp.where(weight > 0, fit.labels, kmeans.nearest(flat, fit.centers, fit.counts > 0)[0])
    table = jnp.where(filled, slots.reshape(filled.shape), -1)
    return Enrolment(
        table.astype(jnp.int32),
        total,
        router._replace(centroids=fit.centers),
        labels,
        silhouettes,
    )


def staggered(enrolment: Enrolment, rounds: int, newcomers: int = 0, each: int = 1) -> Enrolment:
    """The same clusters with clients' local ones in another order, so that their turns reach all slots in every round.

    A client trains its local clusters in turn, in an order that means nothing (K-Means'). So in some rounds clients
    meet at a slot while nobody trains another. The server, which knows `table`, tells one client after the other the
    order that meets the fewest lanes so far in the same rounds: an assignment of clusters to turns. Where all clients
    hold all slots, that is a Latin square. The last `newcomers` clients take no part; `rounds` is how many there are,
    and `each` how many clusters a client trains in one (0: all), as `schedule.lanes` counts them.
    """
    from scipy.optimize import linear_sum_assignment  # here, for it takes a third of a second

    table, labels = np.array(enrolment.table), np.array(enrolment.labels)
    founders = table[: len(table) - newcomers]
    period = min(rounds, math.lcm(*(founders >= 0).sum(axis=1).tolist()))  # after it, all turns come again
    lanes = np.zeros((period, enrolment.clusters), int)  # by round and slot
    each = min(each or table.shape[1], table.shape[1])
    for client in range(len(founders)):
        held = np.flatnonzero(table[client] >= 0)
        slots = table[client, held]
        now = np.arange(min(each, len(held)))  # the turns of a round
        turn = (each * np.arange(period)[:, None] + now).ravel() % len(held)
        when = np.repeat(np.arange(period), len(now))
        met = np.zeros((len(held), enrolment.clusters), int)
        np.add.at(met, turn, lanes[when])
        turns, order = linear_sum_assignment(met[:, slots])  # turns are sorted
        np.add.at(lanes, (when, slots[order[turn]]), 1)
        place = np.full(table.shape[1], -1, np.int32)
        place[held[order]] = turns
        labels[client] = np.where(labels[client] >= 0, place[labels[client]], -1)
        table[client] = -1
        table[client, turns] = slots[order]
    return enrolment._replace(table=jnp.asarray(table), labels=labels)


def check_counts(rows: Sequence[int], local: int | None, total: int | None, newcomers: int = 0) -> None:
    """Raise `UserError` for cluster counts that clients of so many `rows` cannot fill; None is not checked.

    The last `newcomers` clients make no global clusters.
    """
    founders = len(rows) - newcomers
    client = min(range(len(rows)), key=lambda c: rows[c])
    if local is not None and not 1 <= local <= rows[client]:
        raise UserError(
            f"client {client} has {rows[client]} rows but {local} local clusters were asked for; "
            "lower --local-clusters or raise --train-rows"
        )
    if local is not None and total is not None and not 1 <= total <= founders * local:
        raise UserError(
            f"{total} global clusters were asked for but {founders} clients of {local} local clusters have "
            f"{founders * local} centres; lower --global-clusters, or raise --local-clusters or --clients"
        )


def _shared_space(embeddings: Sequence[np.ndarray], recipe: Recipe, founders: int) -> tuple[Array, Array, Router]:
    """Clients' rows prepared and padded: points [client, row, width], present [client, row]; and the router."""
    width = embeddings[0].shape[1]
    mean, deviation = statistics(embeddings[:founders]) if recipe.standardise else (np.zeros(width), np.ones(width))
    router = Router(
        jnp.zeros((0, width)),
        jnp.asarray(mean, jnp.float32),
        jnp.asarray(deviation, jnp.float32),
        jnp.asarray(recipe.standardise),
    )
    sizes = np.array([len(rows) for rows in embeddings])
    present = np.arange(sizes.max()) < sizes[:, None]
    points = np.zeros((*present.shape, width), np.float32)
    # All rows at once: a client by itself would be a program for each number of rows.
    points[present] = np.asarray(prepare(router, jnp.asarray(np.concatenate(embeddings))))
    return jnp.asarray(points), jnp.asarray(present), router


def _fit_clients(keys, points, present, counts: np.ndarray, restarts: int) -> tuple[Array, Array, np.ndarray]:
    """Local K-Means, vmapped over clients that share a k: centres [client, k, width], filled [client, k], labels."""
    clients, rows, width = points.shape
    centres = np.zeros((clients, int(max(counts)), width), np.float32)
    filled = np.zeros(centres.shape[:2], bool)
    labels = np.zeros((clients, rows), np.int32)
    for k in np.unique(counts):
        here = np.flatnonzero(counts == k)
        found = _fit_each(keys[here], points[here], present[here], int(k), restarts)
        centres[here, :k], filled[here, :k], labels[here] = found.centers, found.counts > 0, found.labels
    return jnp.asarray(centres), jnp.asarray(filled), labels


@partial(jax.jit, static_argnames=("k", "restarts"), compiler_options=kmeans.UNTUNED)
def _fit_each(keys, points, weight, k: int, restarts: int) -> kmeans.KMeans:
    """K-Means of each client's `points` [client, row, width], of `weight` [client, row]."""

    def fit(key, x, weight):
        return kmeans.fit(key, x, k, weight=weight.astype(jnp.float32), restarts=restarts)

    return jax.vmap(fit)(keys, points, weight)


@partial(jax.jit, static_argnames=("ks", "restarts"), compiler_options=kmeans.UNTUNED)
def _score_each(keys, points, present, ks: tuple[int, ...], restarts: int) -> tuple[Array, Array]:
    """Each client's silhouettes, float32 [client, candidate], and the best one's index, int32 [client]."""

    def score(inputs):
        key, rows, here = inputs
        return silhouette.choose_k(key, rows, ks, weight=here.astype(jnp.float32), restarts=restarts)

    return jax.lax.map(score, (keys, points, present))


def _choose(name: str, keys, points, present, most: int, restarts: int) -> tuple[np.ndarray, list[dict[int, float]]]:
    """The k of highest silhouette, int [client], of `points` [client, row, width]; and each client's scores by k."""
    points_of = jnp.sum(present, axis=1)  # a client with too few for a count has no silhouette of it
    ks = _candidates(name, int(jnp.min(points_of)), min(int(jnp.max(points_of)) - 1, most))
    scores, best = _score_each(keys, points, present, ks, restarts)
    found = [{k: max(float(score), -1.0) for k, score in zip(ks, row, strict=True)} for row in np.asarray(scores)]
    return np.asarray(ks)[np.asarray(best)], found


def _choose_total(
    key, centres, weight, of_rows: tuple[Array, Array] | None, most: int, recipe: Recipe
) -> tuple[int, dict[int, float]]:
    """n_g of highest silhouette, and all scores by k: that of clients' rows, or without `of_rows` of their centres."""
    if of_rows is None:
        counts, scores = _choose("global", key[None], centres[None], weight[None] > 0, most, recipe.restarts)
        return int(counts[0]), scores[0]
    available = int(jnp.count_nonzero(weight))
    ks = _candidates("global", available, min(available, most))  # rows are scored: a centre may be alone
    scores = np.asarray(refine.choose_k(key, centres, weight, *of_rows, ks, recipe.restarts, recipe.lloyd))
    return ks[int(scores.argmax())], dict(zip(ks, scores.tolist(), strict=True))


def _candidates(name: str, points: int, most: int) -> tuple[int, ...]:
    """The cluster counts that a silhouette may choose; `points` are named in errors."""
    if most < 2:
        raise UserError(f"{points} {name} points are too few for a silhouette to choose a count from; give the count")
    return tuple(range(2, most + 1))
