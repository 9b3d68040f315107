"""K-means and silhouettes over masked, weighted rows, in pure JAX: jit them, vmap them over clients.

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

_SWAPS, _SWAPS_A_CLUSTER = 32, 2  # swaps offered to a restart at most: a constant, and as many per cluster
_AGREEMENT = 1e-6  # restarts whose costs differ by less, relatively, found the same partition
_REFINE = 4  # every so many offers, the restart's own partition is repaired and nothing is swapped
_PASSES = 3  # exchange passes after a swap, before it is judged
_LEAST_GAIN = 1e-6  # of the inertia: a smaller improvement is float32 noise
_THOROUGH = 2**22  # rows times clusters, up to which swaps and exchanges follow Lloyd's iteration
_BLOCK = 256  # rows of the distance matrix that a silhouette holds at once


class KMeans(NamedTuple):
    centers: Array  # float32 [k, width]
    labels: Array  # int32 [row]; -1 where the row is absent
    inertia: Array  # float32 []: weighted sum of squared distances to the row's centre
    counts: Array  # int32 [k]: rows present in each cluster; 0 marks an empty cluster


class _Rows(NamedTuple):
    """Rows by their coordinates; a centre is a point [width]."""

    x: Array  # float32 [row, width], centred and scaled; absent rows are 0
    square: Array  # float32 [row]: squared norms
    weight: Array  # float32 [row], at most 1; absent rows are 0

    def at(self, index):
        return self.x[index]

    def means(self, share):
        return _means(self.x, share)

    def distances(self, centers):
        return _expanded(self.x, self.square, centers)

    def shift(self, new, old, *_):
        return jnp.sum((new - old) ** 2)


class _Products(NamedTuple):
    """Rows by their inner products alone, which is all that distances to means of rows need.

    A centre is its products with all rows, and its own square: [row + 1]. Its distances then cost no product, and with
    fewer rows than columns a mean costs less too.
    """

    x: Array  # float32 [row, row]
    square: Array
    weight: Array

    def at(self, index):
        return jnp.concatenate([self.x[index], self.square[index][:, None]], axis=-1)

    def means(self, share):
        products = _means(self.x, share)
        square = jnp.sum(share.T * products, axis=1) / _or_one(jnp.sum(share, axis=0))
        return jnp.concatenate([products, square[:, None]], axis=1)

    def distances(self, centers):
        return jnp.maximum(self.square[:, None] - 2 * centers[:, :-1].T + centers[:, -1], 0)

    def shift(self, new, old, share, before):
        # The product of two small differences: that of the squares would lose its digits.
        change = share / _or_one(jnp.sum(share, axis=0)) - before / _or_one(jnp.sum(before, axis=0))
        return jnp.sum(change.T * (new - old)[:, :-1])


@partial(jax.jit, static_argnames=("k", "restarts"))
def fit(
    key: Array,
    x: Array,
    k: int,
    *,
    weight: Array | None = None,
    restarts: int = 10,
    max_iterations: int = 300,
    tolerance: float = 1e-4,
) -> KMeans:
    """The best of `restarts` searches for `k` clusters of `x` [row, width]; see the module's notes for the rules.

    `weight` is [row], at least 0, and 0 for a row that is absent. Rows that are present must be finite. A restart's
    Lloyd iteration stops when no label changes, when the centres' summed squared shift is at most `tolerance` times the
    mean variance of the columns (as in scikit-learn), or after `max_iterations`; each stage of the final polish is
    bounded by `max_iterations` too. `k` and `restarts` are static. Raises UserError for a wrong shape, `k` < 1 or
    `restarts` < 1. Memory is about `restarts * row * k` floats, and with fewer rows than columns `row * row` more.
    """
    x, weight = _checked(x, weight)
    if k < 1:
        raise UserError(f"k-means: k is {k}, expected at least 1; ask for one cluster or more")
    return _fit(key, x, weight, k, jnp.int32(k), restarts, max_iterations, tolerance)


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
    distances = jnp.where(valid, _direct(x, jnp.where(valid[:, None], centers, 0)), jnp.inf)
    labels = jnp.argmin(distances, axis=1).astype(jnp.int32)
    return jnp.where(jnp.any(valid), labels, -1), distances


@partial(jax.jit, static_argnames="k")
def silhouette(x: Array, labels: Array, k: int, weight: Array | None = None) -> tuple[Array, Array]:
    """Rousseeuw's silhouettes (J. Comput. Appl. Math. 1987), Euclidean: the mean float32 [] and each row's [row].

    A row's score is `(b - a) / max(a, b)`: `a` its mean distance to the other rows of its cluster, `b` the least mean
    distance to the rows of another cluster; the means and the overall mean are weighted. A row alone in its cluster
    scores 0, as in scikit-learn. Rows of label -1 (or not below `k`) or weight 0 are ignored and score 0. With fewer
    than two clusters every score is 0. The distances are made 256 rows at a time.
    """
    x, weight = _checked(x, weight)
    labels = jnp.asarray(labels, jnp.int32)
    rows, _, _, _ = _prepare(*_checked(x, jnp.where((labels >= 0) & (labels < k), weight, 0)))
    present = rows.weight > 0
    labels = jnp.where(present, labels, 0)
    share = _share(labels, k, rows.weight)
    # Distances inside a cluster come from residuals: the expanded form of a small distance between two rows far from
    # the origin would lose its digits.
    residual = jnp.where(present[:, None], rows.x - rows.means(share)[labels], 0)
    inner = _Rows(residual, jnp.sum(residual**2, axis=1), rows.weight)

    def block(index):
        far = jnp.sqrt(_expanded(rows.x[index], rows.square[index], rows.x))
        near = jnp.sqrt(_expanded(inner.x[index], inner.square[index], inner.x))
        fellow = (labels[index][:, None] == labels) & (index[:, None] != jnp.arange(len(labels)))
        fellow = jnp.where(fellow, rows.weight, 0)
        return jnp.sum(near * fellow, axis=1), jnp.sum(fellow, axis=1), _matmul(far, share)

    blocks = -(-len(labels) // _BLOCK)
    index = jnp.minimum(jnp.arange(blocks * _BLOCK), len(labels) - 1).reshape(blocks, _BLOCK)
    within, fellows, between = lax.map(block, index)
    within, fellows = (part.reshape(-1)[: len(labels)] for part in (within, fellows))
    mass = jnp.sum(share, axis=0)
    other = (mass > 0) & (labels[:, None] != jnp.arange(k))
    between = between.reshape(-1, k)[: len(labels)] / _or_one(mass)
    a, b = within / _or_one(fellows), jnp.min(jnp.where(other, between, jnp.inf), axis=1)
    scored = present & (fellows > 0) & jnp.any(other, axis=1)
    samples = jnp.where(scored, (jnp.where(scored, b, 0) - a) / _or_one(jnp.where(scored, jnp.maximum(a, b), 0)), 0)
    return jnp.sum(samples * rows.weight) / _or_one(jnp.sum(rows.weight)), samples


@partial(jax.jit, static_argnames=("candidates", "restarts"))
def choose_k(
    key: Array, x: Array, candidates: tuple[int, ...], *, weight: Array | None = None, restarts: int = 10
) -> tuple[Array, Array]:
    """The silhouette of a fit for each number of clusters: scores float32 [candidate], index int32 [] of the best.

    The highest score wins, a tie goes to the smaller k. A candidate below 2 or not below the number of distinct rows
    present has no silhouette and scores -inf (if all do, the smallest candidate is chosen). All candidates share one
    compiled search with masked clusters, so a score is that of `fit` up to the draws.
    """
    x, weight = _checked(x, weight)
    if not candidates or min(candidates) < 1:
        raise UserError(f"choose_k: candidates are {candidates}, expected numbers of at least 1; name one or more")
    ks = jnp.array(candidates, jnp.int32)
    distinct = _first_equal(x, weight)[1]

    def score(k):
        labels = fit_masked(key, x, weight, max(candidates), k, restarts).labels
        return jnp.where((k >= 2) & (k < distinct), silhouette(x, labels, max(candidates), weight)[0], -jnp.inf)

    scores = lax.map(score, ks)
    best = jnp.argmin(jnp.where(scores == jnp.max(scores), ks, max(candidates) + 1))
    return scores, best.astype(jnp.int32)


def fit_masked(key: Array, x: Array, weight: Array, most: int, k: Array, restarts: int) -> KMeans:
    """`fit` with room for `most` clusters of which the first `k` (int32 [], may be traced) are used."""
    return _fit(key, x, weight, most, k, restarts, 300, 1e-4)


def _checked(x, weight):
    x = jnp.asarray(x, jnp.float32)
    if x.ndim != 2 or 0 in x.shape:
        raise UserError(f"k-means: rows have shape {x.shape}, expected [row, width]; give one row an example")
    # Were the compiler to see that all weights are 1, it would add up a million of them itself, for twenty seconds.
    weight = lax.optimization_barrier(jnp.ones(len(x))) if weight is None else jnp.asarray(weight, jnp.float32)
    if weight.shape != x.shape[:1]:
        raise UserError(
            f"k-means: weights {weight.shape} for rows {x.shape}, expected one a row; mask absent rows by 0"
        )
    return jnp.where((weight > 0)[:, None], x, 0), jnp.where(weight > 0, weight, 0)


def _prepare(x, weight):
    """Centred rows, divided by a power of two (which costs no digit), their mean, that scale and the largest weight."""
    heaviest = _or_one(jnp.max(weight))
    weight = weight / heaviest
    mean = _matmul(weight / _or_one(jnp.sum(weight)), x)
    x = jnp.where((weight > 0)[:, None], x - mean, 0)
    scale = jnp.ldexp(jnp.float32(1), jnp.clip(jnp.frexp(jnp.max(jnp.abs(x)))[1], -120, 120))
    x = x / scale
    return _Rows(x, jnp.sum(x**2, axis=1), weight), mean, scale, heaviest


def _first_equal(x, weight):
    """For each row the first row present with the same content, and the number of distinct rows present.

    Equality is that of 64-bit hashes, so that it costs a sort instead of all pairs.
    """
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.uint32)  # -0 is 0

    column = jnp.arange(x.shape[1], dtype=jnp.uint32)
    word = bits ^ (column * jnp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # the finaliser of MurmurHash3
        word = (word ^ (word >> shift)) * jnp.uint32(factor)
    at = jnp.arange(len(x))
    # Two sums, whose factors differ in every column.
    keys = (weight <= 0, jnp.sum(word, axis=1), jnp.sum(word * (2 * column + 1) * jnp.uint32(0x9E3779B1), axis=1))
    *keys, order = lax.sort((*(key.astype(jnp.uint32) for key in keys), at), num_keys=3, is_stable=True)
    start = jnp.any(jnp.stack([key != jnp.roll(key, 1) for key in keys]), axis=0) | (at == 0)
    first = jnp.zeros_like(at).at[order].set(order[lax.cummax(jnp.where(start, at, 0))])
    return first, jnp.sum((first == at) & (weight > 0))


def _fit(key, x, weight, k, used, restarts, max_iterations, tolerance):
    """`fit` with `k` clusters of which the first `used` (traced) may hold rows."""
    if restarts < 1:
        raise UserError(f"k-means: {restarts} restarts, expected at least 1; ask for one restart or more")
    first, distinct = _first_equal(x, weight)
    rows, mean, scale, heaviest = _prepare(x, weight)
    weight = rows.weight
    space = rows if len(x) > x.shape[1] else _Products(_matmul(rows.x, rows.x.T), rows.square, weight)
    present, at, active = weight > 0, jnp.arange(len(x)), jnp.arange(k) < used
    stop = tolerance * jnp.sum(weight * rows.square) / _or_one(jnp.sum(weight)) / x.shape[1]
    trials = 2 + int(math.log(k))  # as in scikit-learn
    thorough = len(x) * k <= _THOROUGH
    # All draws at once: one generator to compile instead of one a step.
    uniforms = jax.random.uniform(key, (restarts, k * trials + _SWAPS + _SWAPS_A_CLUSTER * k))

    def start(uniforms):
        return _lloyd(space, _seed(uniforms.reshape(k, trials), space, active), active, stop, max_iterations)

    centers = jax.vmap(start)(uniforms[:, : k * trials])
    if thorough:
        centers, costs = _swap(uniforms[:, k * trials :], space, centers, active)
    else:
        costs = lax.map(lambda centers: _cost(weight, _distances(space, centers, active)), centers)
    labels = jnp.argmin(_distances(space, centers[jnp.argmin(costs)], active), axis=1)
    if thorough:  # the expanded form does most of the work, direct differences settle the last digits
        labels = _polish(lambda share: space.distances(space.means(share)), weight, labels, active, max_iterations)
        labels = _polish(lambda share: _direct(rows.x, rows.means(share)), weight, labels, active, max_iterations)
    searched = rows.means(_share(labels, k, weight))

    few, is_first = distinct <= used, present & (first == at)
    rank = (jnp.cumsum(is_first) - 1)[first]
    each = _means(rows.x, _share(jnp.where(is_first, rank, -1), k, jnp.ones_like(weight)))
    labels, centers = jnp.where(few, rank, labels), jnp.where(few, each, searched)
    away = jnp.sum((rows.x - centers[jnp.where(present, labels, 0)]) ** 2, axis=1)
    counts = jnp.sum((labels[:, None] == jnp.arange(k)) & present[:, None], axis=0).astype(jnp.int32)
    inertia = jnp.sum(jnp.where(few, 0, weight * away)) * heaviest * scale * scale
    return KMeans(centers * scale + mean, jnp.where(present, labels, -1).astype(jnp.int32), inertia, counts)


def _or_one(value):
    """A divisor: 1 where the value is 0."""
    return jnp.where(value > 0, value, 1)


def _matmul(a, b):
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _expanded(x, square, centers):
    """Squared distances [row, k] as |x|^2 - 2 x.c + |c|^2: a matmul; sound because the rows are centred."""
    return jnp.maximum(square[:, None] - 2 * _matmul(x, centers.T) + jnp.sum(centers**2, axis=1), 0)


def _direct(x, centers):
    """Squared distances [row, k] by differences, one centre at a time: exact to the last digits, but no matmul."""
    return lax.map(lambda center: jnp.sum((x - center) ** 2, axis=1), centers).T


def _distances(rows, centers, active):
    return jnp.where(active, rows.distances(centers), jnp.inf)


def _cost(weight, distances):
    return jnp.sum(weight * jnp.min(distances, axis=1))


def _share(labels, k, weight):
    """[row, k]: a row's weight in the column of its cluster."""
    return jnp.where(labels[:, None] == jnp.arange(k), weight[:, None], 0)


def _means(x, share):
    """Weighted means [k, width]; the mean of all rows, which is 0, for an empty cluster."""
    return _matmul(share.T, x) / _or_one(jnp.sum(share, axis=0))[:, None]


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
        best = jnp.argmin(_matmul(rows.weight, after))
        return centers.at[j].set(drawn[best]), jnp.where(active[j], after[:, best], near)

    centers = jnp.zeros((k, start.shape[1])).at[0].set(start[0])
    return lax.fori_loop(1, k, add, (centers, near))[0]


def _lloyd(rows, centers, active, stop, max_iterations):
    k = len(active)

    def step(state):
        centers, old, iteration, _ = state
        distances = _distances(rows, centers, active)
        labels, cost = jnp.argmin(distances, axis=1), rows.weight * jnp.min(distances, axis=1)
        # One empty cluster a step takes the row that costs most: never a stop while one can be filled.
        empty = active & (jnp.sum(_share(labels, k, rows.weight), axis=0) == 0)
        farthest = jnp.argmax(cost)
        filled = jnp.any(empty) & (cost[farthest] > 0)
        labels = jnp.where(filled & (jnp.arange(len(labels)) == farthest), jnp.argmax(empty), labels)
        share = _share(labels, k, rows.weight)
        new = jnp.where((jnp.sum(share, axis=0) > 0)[:, None], rows.means(share), centers)
        shift = rows.shift(new, centers, share, _share(old, k, rows.weight))
        same = jnp.all((labels == old) | (rows.weight == 0))
        return new, labels, iteration + 1, same | (~filled & (shift <= stop))

    state = (centers, jnp.full(len(rows.x), -1), 0, False)
    return lax.while_loop(lambda state: ~state[3] & (state[2] < max_iterations), step, state)[0]


def _exchanged(weight, distances, labels, mass):
    """Squared distances as a move of the row sees them: its old cluster without it, any other cluster with it."""
    weight = weight[:, None]
    own = labels[:, None] == jnp.arange(distances.shape[1])
    leave = jnp.where(mass > weight, mass / _or_one(mass - weight), 0)
    return jnp.where(own, leave, jnp.where(mass > 0, mass / _or_one(mass + weight), 1)) * distances


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
            share = _share(labels, k, rows.weight)
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


def _polish(distances_to_means, weight, labels, active, max_iterations):
    """Labels that neither Lloyd's step nor the move of any one row improves; each step lowers the cost."""
    k = len(active)

    def step(state):
        labels, iteration, _ = state
        share = _share(labels, k, weight)
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
    return lax.while_loop(lambda state: ~state[2] & (state[1] < max_iterations), step, state)[0]
