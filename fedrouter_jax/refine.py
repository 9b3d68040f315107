"""Global centroids from all rows: federated Lloyd steps, a silhouette from sums, and clusters that follow centroids.

One round of centres (FedRouter, arXiv 2604.00050; Dennis et al., "Heterogeneity for the Win: One-Shot Federated
Clustering", ICML 2021, arXiv 2103.00697) rests on each client's few rows. Here it is only the start:

    step       client: for every centroid, the count and the sum of its rows that are nearest to it
               server: each centroid becomes the sum of sums over the sum of counts (Lloyd, IEEE Trans. IT 1982)
    score      the silhouette of all rows under squared distances; the mean squared distance of a row to a cluster is
               |x|^2 - 2 x.m + q, so a client needs the cluster's count, mean m and mean square q, never other rows
    follow     a client's row belongs to its nearest centroid, as a text to be answered does
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedrouter_jax import kmeans
from fedrouter_jax.types import Array
from fedrouter_jax.weighted_rows import padded

_LEAST_SHARE = 0.25  # of an even share of its rows: what a client has less of in a slot goes to its other slots


@partial(jax.jit, static_argnames="steps")
def lloyd(points: Array, present: Array, centroids: Array, steps: int, valid: Array | None = None) -> Array:
    """Centroids [slot, width] after `steps` of Lloyd's iteration over all clients' rows.

    `points` [client, row, width], `present` bool [client, row]; `valid` bool [slot] (None: all). A centroid that no row
    is nearest to stays where it is.
    """

    def step(_, centroids):
        counts, sums, _ = (part.sum(axis=0) for part in _reports(points, present, centroids, valid))
        return jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], centroids)

    return jax.lax.fori_loop(0, steps, step, centroids)


def silhouette(points: Array, present: Array, centroids: Array, valid: Array | None = None) -> Array:
    """The mean silhouette (float32 []) of all rows in the clusters of their nearest centroids, of squared distances.

    Equal to scikit-learn's `silhouette_score(metric="sqeuclidean")` of the pooled rows, for rows about as near to the
    origin as to each other (as unit vectors are): distances are differences of squares.
    """
    counts, sums, squares = (part.sum(axis=0) for part in _reports(points, present, centroids, valid))
    mean, square = sums / jnp.maximum(counts, 1)[:, None], squares / jnp.maximum(counts, 1)

    def client(rows, here):
        labels, _ = kmeans.nearest(rows, centroids, valid)
        products = jnp.matmul(rows, mean.T, precision="highest")
        away = jnp.maximum(jnp.sum(rows**2, axis=1, keepdims=True) - 2 * products + square, 0)
        own = jax.nn.one_hot(labels, len(centroids), dtype=bool)
        size = jnp.sum(jnp.where(own, counts, 0), axis=1)
        within = jnp.sum(jnp.where(own, away, 0), axis=1) * size / jnp.maximum(size - 1, 1)  # the row itself is at 0
        between = jnp.min(jnp.where(own | (counts == 0), jnp.inf, away), axis=1)
        score = (between - within) / jnp.maximum(jnp.maximum(between, within), 1e-12)
        return jnp.sum(jnp.where(here & (size > 1) & jnp.isfinite(between), score, 0))

    return jnp.sum(jax.vmap(client)(points, present)) / jnp.sum(present)


@partial(jax.jit, static_argnames=("candidates", "restarts", "steps"), compiler_options=kmeans.UNTUNED)
def choose_k(
    key: Array,
    centres: Array,
    weight: Array,
    points: Array,
    present: Array,
    candidates: tuple[int, ...],
    restarts: int,
    steps: int,
) -> Array:
    """The silhouette (float32 [candidate]) after K-Means of the clients' `centres` [centre, width] and Lloyd steps."""
    most = max(candidates)

    def score(k):
        found = kmeans.fit(key, centres, most, weight=weight, restarts=restarts, used=k)
        valid = jnp.arange(most) < k
        return silhouette(points, present, lloyd(points, present, found.centers, steps, valid), valid)

    return jax.lax.map(score, jnp.asarray(candidates))


def follow(
    points: Array, present: Array, centroids: Array, local: int | None, founders: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The slot of each local cluster, int32 [client, cluster], -1 for none; and of each row its cluster, -1: absent.

    A client keeps the `local` slots with most of its rows; with None, those with at least a quarter of an even share
    and two rows. Its other rows go to the nearest slot kept. Clients from number `founders` on (None: none) join later,
    and have slots of the others only: nobody trains an adapter of theirs alone.
    """
    slots, first = len(centroids), len(points) if founders is None else founders
    distances = np.array(jax.vmap(lambda rows: kmeans.nearest(rows, centroids)[1])(points))
    held = np.asarray(present)

    def most_held(away: np.ndarray, here: np.ndarray) -> np.ndarray:
        """The slots that a client keeps, by its rows' distances [row, slot]."""
        counts = np.bincount(away[here].argmin(axis=1), minlength=slots)
        order = np.argsort(-counts, kind="stable")
        enough = int(np.sum(counts >= max(2, _LEAST_SHARE * here.sum() / slots))) if local is None else local
        return np.sort(order[: max(1, min(enough, np.count_nonzero(counts)))])

    kept = [*map(most_held, distances[:first], held[:first])]
    trained = np.isin(np.arange(slots), np.concatenate(kept))
    distances[first:] = np.where(trained, distances[first:], np.inf)
    kept += map(most_held, distances[first:], held[first:])
    labels = np.full(held.shape, -1, np.int32)
    for client, own in enumerate(kept):
        labels[client] = np.where(held[client], distances[client][:, own].argmin(axis=1), -1)
    return padded(kept), labels


def _reports(points: Array, present: Array, centroids: Array, valid: Array | None) -> tuple[Array, Array, Array]:
    """What every client sends: counts [client, slot], sums [client, slot, width] and summed squares [client, slot]."""

    def client(rows, here):
        labels, _ = kmeans.nearest(rows, centroids, valid)
        own = jax.nn.one_hot(labels, len(centroids)) * here[:, None]
        sums = jnp.matmul(own.T, rows, precision="highest")
        return own.sum(axis=0), sums, jnp.matmul(own.T, jnp.sum(rows**2, axis=1), precision="highest")

    return jax.vmap(client)(points, present)
