"""Silhouettes over masked, weighted rows, and the number of clusters that they speak for."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fedrouter_jax.errors import UserError
from fedrouter_jax.kmeans import fit
from fedrouter_jax.types import Array
from fedrouter_jax.weighted_rows import Rows, checked, expanded, first_equal, matmul, or_one, prepare, shares

_BLOCK = 256  # rows of the distance matrix that a silhouette holds at once


@partial(jax.jit, static_argnames="k")
def silhouette(x: Array, labels: Array, k: int, weight: Array | None = None) -> tuple[Array, Array]:
    """Rousseeuw's silhouettes (J. Comput. Appl. Math. 1987), Euclidean: the mean float32 [] and each row's [row].

    A row's score is `(b - a) / max(a, b)`: `a` its mean distance to the other rows of its cluster, `b` the least mean
    distance to the rows of another cluster; the means and the overall mean are weighted. A row alone in its cluster
    scores 0, as in scikit-learn. Rows of label -1 (or not below `k`) or weight 0 are ignored and score 0. With fewer
    than two clusters every score is 0. The distances are made 256 rows at a time.
    """
    x, weight = checked(x, weight)
    labels = jnp.asarray(labels, jnp.int32)
    rows, _, _, _ = prepare(*checked(x, jnp.where((labels >= 0) & (labels < k), weight, 0)))
    present = rows.weight > 0
    labels = jnp.where(present, labels, 0)
    share = shares(labels, k, rows.weight)
    # Distances inside a cluster come from residuals: the expanded form of a small distance between two rows far from
    # the origin would lose its digits.
    residual = jnp.where(present[:, None], rows.x - rows.means(share)[labels], 0)
    inner = Rows(residual, jnp.sum(residual**2, axis=1), rows.weight)

    def block(index):
        far = jnp.sqrt(expanded(rows.x[index], rows.square[index], rows.x))
        near = jnp.sqrt(expanded(inner.x[index], inner.square[index], inner.x))
        fellow = (labels[index][:, None] == labels) & (index[:, None] != jnp.arange(len(labels)))
        fellow = jnp.where(fellow, rows.weight, 0)
        return jnp.sum(near * fellow, axis=1), jnp.sum(fellow, axis=1), matmul(far, share)

    blocks = -(-len(labels) // _BLOCK)
    index = jnp.minimum(jnp.arange(blocks * _BLOCK), len(labels) - 1).reshape(blocks, _BLOCK)
    within, fellows, between = lax.map(block, index)
    within, fellows = (part.reshape(-1)[: len(labels)] for part in (within, fellows))
    mass = jnp.sum(share, axis=0)
    other = (mass > 0) & (labels[:, None] != jnp.arange(k))
    between = between.reshape(-1, k)[: len(labels)] / or_one(mass)
    a, b = within / or_one(fellows), jnp.min(jnp.where(other, between, jnp.inf), axis=1)
    scored = present & (fellows > 0) & jnp.any(other, axis=1)
    samples = jnp.where(scored, (jnp.where(scored, b, 0) - a) / or_one(jnp.where(scored, jnp.maximum(a, b), 0)), 0)
    return jnp.sum(samples * rows.weight) / or_one(jnp.sum(rows.weight)), samples


@partial(jax.jit, static_argnames=("candidates", "restarts"))
def choose_k(
    key: Array, x: Array, candidates: tuple[int, ...], *, weight: Array | None = None, restarts: int = 10
) -> tuple[Array, Array]:
    """The silhouette of a fit for each number of clusters: scores float32 [candidate], index int32 [] of the best.

    The highest score wins, a tie goes to the smaller k. A candidate below 2 or not below the number of distinct rows
    present has no silhouette and scores -inf (if all do, the smallest candidate is chosen). All candidates share one
    compiled search with masked clusters, so a score is that of `fit` up to the draws.
    """
    x, weight = checked(x, weight)
    if not candidates or min(candidates) < 1:
        raise UserError(f"choose_k: candidates are {candidates}, expected numbers of at least 1; name one or more")
    ks = jnp.array(candidates, jnp.int32)
    distinct = first_equal(x, weight)[1]

    def score(k):
        labels = fit(key, x, max(candidates), weight=weight, restarts=restarts, used=k).labels
        return jnp.where((k >= 2) & (k < distinct), silhouette(x, labels, max(candidates), weight)[0], -jnp.inf)

    scores = lax.map(score, ks)
    best = jnp.argmin(jnp.where(scores == jnp.max(scores), ks, max(candidates) + 1))
    return scores, best.astype(jnp.int32)
