"""K-means over masked, weighted rows, in pure JAX: jit it, vmap it over clients.

The objective is the weighted sum of squared Euclidean distances. Each restart seeds with greedy k-means++ (Arthur &
Vassilvitskii, SODA 2007) and runs Lloyd's iteration. It is then offered up to `32 + 2 k` swaps: a row drawn as in
k-means++ replaces the centre that is cheapest to remove, three passes repair the partition, and the result stays if it
is better (random swap, Fränti, J. Big Data 2018; local search k-means++, Lattanzi & Sohler, ICML 2019). Every fourth
offer repairs the restart's own partition instead, and the offers end early once half of the restarts agree. The best
restart is polished by single-row exchanges (Hartigan & Wong, Applied Statistics 1979) to a partition whose centres are
the means of their rows, whose labels are the nearest centres, and which no move of one row improves by more than one
part in a million. Restarts of Lloyd alone leave about one hard problem in eight above scikit-learn by 0.1 % or more.
Where rows times clusters pass four million, each look at the rows costs too much for that: Lloyd's result stands.

Rules:
- A row is present where its weight is positive. Whatever an absent row holds (huge values, NaN) changes nothing.
- Ties go to the lowest index: of clusters, rows and restarts.
- No more distinct rows than clusters: each distinct row is a cluster, in order of first appearance, inertia 0; the
  surplus clusters stay empty (count 0), attract no row, and their centre is the weighted mean of all rows.
- More distinct rows than clusters: a cluster that runs empty takes the row with the largest weighted squared distance.
- No row present: labels -1, counts 0, centres and inertia 0.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedrouter_jax.errors import UserError
from fedrouter_jax.types import Array
from fedrouter_jax.weighted_rows import (
    Products,
    checked,
    direct,
    first_equal,
    matmul,
    or_one,
    prepare,
    shares,
    weighted_means,
)

# For programs of clustering: their products are small, and to look for the fastest kernel of each takes a GPU several
# times as long as all else. JAX takes compiler options for a whole program only, not for a function inside one.
UNTUNED = {"xla_gpu_autotune_level": 0}

_ITERATIONS, _TOLERANCE = 300, 1e-4  # as in scikit-learn
_SWAPS, _SWAPS_A_CLUSTER = 32, 2  # swaps offered to a restart at most: a constant, and as many per cluster
_AGREEMENT = 1e-6  # restarts whose costs differ by less, relatively, found the same partition
_REFINE = 4  # every so many offers, the restart's own partition is repaired and nothing is swapped
_PASSES = 3  # exchange passes after a swap, before it is judged
_LEAST_GAIN = 1e-6  # of the inertia: a smaller improvement is float32 noise
_THOROUGH = 2**22  # rows times clusters, up to which swaps and exchanges follow Lloyd's iteration


class KMeans(NamedTuple):
    centers: Array  # float32 [k, width]
    labels: Array  # int32 [row]; -1 where the row is absent
    inertia: Array  # float32 []: weighted sum of squared distances to the row's centre
    counts: Array  # int32 [k]: rows present in each cluster; 0 marks an empty cluster


@partial(jax.jit, static_argnames=("k", "restarts"))
def fit(
    key: Array,
    x: Array,
    k: int,
    *,
    weight: Array | None = None,
    restarts: int = 10,
    used: Array | None = None,
) -> KMeans:
    """The best of `restarts` searches for `k` clusters of `x` [row, width]; see the module's notes for the rules.

    `weight` is [row], at least 0, and 0 for a row that is absent. Rows that are present must be finite. Of the `k`
    clusters only the first `used` (int32 [], may be traced; None: all) may hold rows. A restart's Lloyd iteration stops
    when no label changes, when the centres' summed squared shift is at most 1e-4 times the mean variance of the columns
    (as in scikit-learn), or after 300 steps; each stage of the final polish has as many. `k` and `restarts` are static.
    Raises UserError for a wrong shape, `k` < 1 or `restarts` < 1. Memory is about `restarts * row * k` floats, and with
    fewer rows than columns `row * row` more.
    """
    x, weight = checked(x, weight)
    if k < 1:
        raise UserError(f"k-means: k is {k}, expected at least 1; ask for one cluster or more")
    if restarts < 1:
        raise UserError(f"k-means: {restarts} restarts, expected at least 1; ask for one restart or more")
    used = k if used is None else used
    first, distinct = first_equal(x, weight)
    rows, mean, scale, heaviest = prepare(x, weight)
    weight = rows.weight
    space = rows if len(x) > x.shape[1] else Products(matmul(rows.x, rows.x.T), rows.square, weight)
    present, at, active = weight > 0, jnp.arange(len(x)), jnp.arange(k) < used
    stop = _TOLERANCE * jnp.sum(weight * rows.square) / or_one(jnp.sum(weight)) / x.shape[1]
    trials = 2 + int(math.log(k))  # as in scikit-learn
    thorough = len(x) * k <= _THOROUGH
    # All draws at once: one generator to compile instead of one a step.
    uniforms = jax.random.uniform(key, (restarts, k * trials + _SWAPS + _SWAPS_A_CLUSTER * k))

    def start(uniforms):
        return _lloyd(space, _seed(uniforms.reshape(k, trials), space, active), active, stop)

    centers = jax.vmap(start)(uniforms[:, : k * trials])
    if thorough:
        centers, costs = _swap(uniforms[:, k * trials :], space, centers, active)
    else:
        costs = lax.map(lambda centers: _cost(weight, _distances(space, centers, active)), centers)
    labels = jnp.argmin(_distances(space, centers[jnp.argmin(costs)], active), axis=1)
    if thorough:  # the expanded form does most of the work, direct differences settle the last digits
        labels = _polish(lambda share: space.distances(space.means(share)), weight, labels, active)
        labels = _polish(lambda share: direct(rows.x, rows.means(share)), weight, labels, active)
    searched = rows.means(shares(labels, k, weight))

    few, is_first = distinct <= used, present & (first == at)
    rank = (jnp.cumsum(is_first) - 1)[first]
    each = weighted_means(rows.x, shares(jnp.where(is_first, rank, -1), k, jnp.ones_like(weight)))
    labels, centers = jnp.where(few, rank, labels), jnp.where(few, each, searched)
    away = jnp.sum((rows.x - centers[jnp.where(present, labels, 0)]) ** 2, axis=1)
    counts = jnp.sum((labels[:, None] == jnp.arange(k)) & present[:, None], axis=0).astype(jnp.int32)
    inertia = jnp.sum(jnp.where(few, 0, weight * away)) * heaviest * scale * scale
    return KMeans(centers * scale + mean, jnp.where(present, labels, -1).astype(jnp.int32), inertia, counts)


@jax.jit
def nearest(x: Array, centers: Array, valid: Array | None = None) -> tuple[Array, Array]:
    """The nearest of `centers` [k, width] for each row of `x` [row, width]: labels int32 [row], distances [row, k].

    Distances are squared Euclidean, by direct differences, so that equal centres tie exactly; the lowest index wins a
    tie. Centres where `valid` [k] is False have distance inf and win no row; with no valid centre the label is -1.
    """
    x, centers = jnp.asarray(x, jnp.float32), jnp.asarray(centers, jnp.float32)
    if x.ndim != 2 or centers.ndim != 2 or x.shape[1] != centers.shape[1]:
        raise UserError(
            f"nearest: rows {x.shape} and centres {centers.shape} do not fit, expected [row, width] and [k, width]; "
            "embed both with the same model"
        )
    valid = jnp.ones(len(centers), bool) if valid is None else jnp.asarray(valid, bool)
    distances = jnp.where(valid, direct(x, jnp.where(valid[:, None], centers, 0)), jnp.inf)
    labels = jnp.argmin(distances, axis=1).astype(jnp.int32)
    return jnp.where(jnp.any(valid), labels, -1), distances


def _distances(rows, centers, active):
    return jnp.where(active, rows.distances(centers), jnp.inf)


def _cost(weight, distances):
    return jnp.sum(weight * jnp.min(distances, axis=1))


def _draw(uniforms, weight):
    """Row indices drawn in proportion to `weight` by inversion, so that absent rows take no part in the draw."""
    total = jnp.cumsum(weight)
    return jnp.argmax((total > uniforms[:, None] * total[-1]) & (weight > 0), axis=1)


def _seed(uniforms, rows, active):
    """Greedy k-means++: of the rows drawn for a centre, the one that leaves the least cost; `uniforms` [k, trial]."""
    k = len(active)
    start = rows.at(_draw(uniforms[0, :1], rows.weight))
    near = rows.distances(start)[:, 0]

    def add(j, state):
        centers, near = state
        drawn = rows.at(_draw(uniforms[j], rows.weight * near))
        after = jnp.minimum(near[:, None], rows.distances(drawn))
        best = jnp.argmin(matmul(rows.weight, after))
        return centers.at[j].set(drawn[best]), jnp.where(active[j], after[:, best], near)

    centers = jnp.zeros((k, start.shape[1])).at[0].set(start[0])
    return lax.fori_loop(1, k, add, (centers, near))[0]


def _lloyd(rows, centers, active, stop, most=_ITERATIONS):
    """Centres [k, width] after Lloyd's steps, at most so many, from `centers`."""
    k = len(active)

    def step(state):
        centers, old, iteration, _ = state
        distances = _distances(rows, centers, active)
        labels, cost = jnp.argmin(distances, axis=1), rows.weight * jnp.min(distances, axis=1)
        # One empty cluster a step takes the row that costs most: never a stop while one can be filled.
        empty = active & (jnp.sum(shares(labels, k, rows.weight), axis=0) == 0)
        farthest = jnp.argmax(cost)
        filled = jnp.any(empty) & (cost[farthest] > 0)
        labels = jnp.where(filled & (jnp.arange(len(labels)) == farthest), jnp.argmax(empty), labels)
        share = shares(labels, k, rows.weight)
        new = jnp.where((jnp.sum(share, axis=0) > 0)[:, None], rows.means(share), centers)
        shift = rows.shift(new, centers, share, shares(old, k, rows.weight))
        same = jnp.all((labels == old) | (rows.weight == 0))
        return new, labels, iteration + 1, same | (~filled & (shift <= stop))

    state = (centers, jnp.full(len(rows.x), -1), 0, False)
    return lax.while_loop(lambda state: ~state[3] & (state[2] < most), step, state)[0]


def _exchanged(weight, distances, labels, mass):
    """Squared distances as a move of the row sees them: its old cluster without it, any other cluster with it."""
    weight = weight[:, None]
    own = labels[:, None] == jnp.arange(distances.shape[1])
    leave = jnp.where(mass > weight, mass / or_one(mass - weight), 0)
    return jnp.where(own, leave, jnp.where(mass > 0, mass / or_one(mass + weight), 1)) * distances


def _swap(uniforms, rows, centers, active):
    """Swaps for all restarts, until enough of them agree: centres [restart, k, width], and costs [restart].

    `uniforms` is [restart, turn]. A swap is kept if the cost falls.
    """
    restarts, k = centers.shape[:2]

    def offer(turn, uniforms, centers, distances, cost):
        labels, near = jnp.argmin(distances, axis=1), jnp.min(distances, axis=1)
        own = labels[:, None] == jnp.arange(k)
        second = jnp.min(jnp.where(own, jnp.inf, distances), axis=1)
        drawn = rows.at(_draw(uniforms[turn, None], rows.weight * near))
        joined = rows.distances(drawn)[:, 0]
        # The rows of the centre that goes fall to the new centre or to their second nearest.
        loss = rows.weight * (jnp.minimum(joined, second) - jnp.minimum(joined, near))
        out = jnp.argmin(jnp.where(active, jnp.sum(jnp.where(own, loss[:, None], 0), axis=0), jnp.inf))
        chosen = (jnp.arange(k) == out) & (turn % _REFINE != _REFINE - 1)
        tried, away = jnp.where(chosen[:, None], drawn, centers), jnp.where(chosen, joined[:, None], distances)

        def repair(_, state):
            centers, distances, labels = state
            share = shares(labels, k, rows.weight)
            mass = jnp.sum(share, axis=0)
            centers = jnp.where((mass > 0)[:, None], rows.means(share), centers)
            distances = _distances(rows, centers, active)
            return centers, distances, jnp.argmin(_exchanged(rows.weight, distances, labels, mass), axis=1)

        tried, away, _ = lax.fori_loop(0, _PASSES, repair, (tried, away, jnp.argmin(away, axis=1)))
        new = _cost(rows.weight, away)
        better = new < cost
        return jnp.where(better, tried, centers), jnp.where(better, away, distances), jnp.minimum(new, cost)

    def sought(state):
        turn, _, _, cost = state
        agree = jnp.sum(cost <= (1 + _AGREEMENT) * jnp.min(cost))
        return (turn < uniforms.shape[1]) & (agree < max(2, -(-restarts // 2)))

    def step(state):
        return state[0] + 1, *jax.vmap(partial(offer, state[0]))(uniforms, *state[1:])

    distances = jax.vmap(lambda centers: _distances(rows, centers, active))(centers)
    state = (0, centers, distances, jax.vmap(partial(_cost, rows.weight))(distances))
    _, centers, _, costs = lax.while_loop(sought, step, state)
    return centers, costs


def _polish(distances_to_means, weight, labels, active):
    """Labels that neither Lloyd's step nor the move of any one row improves; each step lowers the cost."""
    k = len(active)

    def step(state):
        labels, iteration, _ = state
        share = shares(labels, k, weight)
        mass = jnp.sum(share, axis=0)
        distances = jnp.where(mass > 0, distances_to_means(share), jnp.inf)
        closest = jnp.argmin(distances, axis=1)
        drifted = jnp.any((closest != labels) & (weight > 0))
        own = labels[:, None] == jnp.arange(k)
        seen = _exchanged(weight, distances, labels, mass)
        seen = jnp.where(active & (mass == 0), 0, seen)  # an empty cluster is free to join, and so fills first
        gain = weight[:, None] * (jnp.sum(jnp.where(own, seen, 0), axis=1)[:, None] - seen)
        gain = jnp.where(own | (weight == 0)[:, None], -jnp.inf, gain)
        best = jnp.argmax(gain)
        moves = jnp.max(gain) > _LEAST_GAIN * _cost(weight, distances)
        moved = jnp.where(moves & (jnp.arange(len(labels)) == best // k), best % k, labels)
        return jnp.where(drifted, closest, moved), iteration + 1, ~drifted & ~moves

    state = (labels, 0, False)
    return lax.while_loop(lambda state: ~state[2] & (state[1] < _ITERATIONS), step, state)[0]
