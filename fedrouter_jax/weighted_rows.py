"""Rows with weights, and squared distances between rows and points: what K-Means and silhouettes are made of.

Clients have any number of rows and clusters: `padded` puts them into one array.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from fedrouter_jax.errors import UserError
from fedrouter_jax.types import Array


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of whole numbers as one array: int32 [row, longest], -1 behind those that are shorter."""
    return np.array([*zip_longest(*rows, fillvalue=-1)], np.int32).reshape(-1, len(rows)).T


class Rows(NamedTuple):
    """Rows by their coordinates; a centre is a point [width]."""

    x: Array  # float32 [row, width], centred and scaled; absent rows are 0
    square: Array  # float32 [row]: squared norms
    weight: Array  # float32 [row], at most 1; absent rows are 0

    def at(self, index):
        """Rows `index` [...] as centres."""
        return self.x[index]

    def means(self, share):
        """The centres of clusters, from what each row counts in each: `share` [row, k]."""
        return weighted_means(self.x, share)

    def distances(self, centers):
        """Squared distances [row, k] to centres."""
        return expanded(self.x, self.square, centers)

    def shift(self, new, old, share, before):
        """How far all centres moved, squared and summed, float32 []; `share` and `before` [row, k] made them."""
        return jnp.sum((new - old) ** 2)


class Products(NamedTuple):
    """Rows by their inner products alone, which is all that distances to means of rows need.

    A centre is its products with all rows, and its own square: [row + 1]. Its distances then cost no product, and with
    fewer rows than columns a mean costs less too.
    """

    x: Array  # float32 [row, row]
    square: Array
    weight: Array

    def at(self, index):
        """As `Rows.at`."""
        return jnp.concatenate([self.x[index], self.square[index][:, None]], axis=-1)

    def means(self, share):
        """As `Rows.means`."""
        products = weighted_means(self.x, share)
        square = jnp.sum(share.T * products, axis=1) / or_one(jnp.sum(share, axis=0))
        return jnp.concatenate([products, square[:, None]], axis=1)

    def distances(self, centers):
        """As `Rows.distances`."""
        return jnp.maximum(self.square[:, None] - 2 * centers[:, :-1].T + centers[:, -1], 0)

    def shift(self, new, old, share, before):
        """As `Rows.shift`."""
        # The product of two small differences: that of the squares would lose its digits.
        change = share / or_one(jnp.sum(share, axis=0)) - before / or_one(jnp.sum(before, axis=0))
        return jnp.sum(change.T * (new - old)[:, :-1])


def checked(x: Array, weight: Array | None) -> tuple[Array, Array]:
    """Rows float32 [row, width] and their weights float32 [row], 0 wherever a row is absent; None: all weigh 1.

    Raises `UserError` for other shapes and weights.
    """
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


def prepare(x, weight):
    """Centred rows, divided by a power of two (which costs no digit), their mean, that scale and the largest weight."""
    heaviest = or_one(jnp.max(weight))
    weight = weight / heaviest
    mean = matmul(weight / or_one(jnp.sum(weight)), x)
    x = jnp.where((weight > 0)[:, None], x - mean, 0)
    scale = jnp.ldexp(jnp.float32(1), jnp.clip(jnp.frexp(jnp.max(jnp.abs(x)))[1], -120, 120))
    x = x / scale
    return Rows(x, jnp.sum(x**2, axis=1), weight), mean, scale, heaviest


def first_equal(x, weight):
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


def shares(labels, k, weight):
    """[row, k]: a row's weight in the column of its cluster."""
    return jnp.where(labels[:, None] == jnp.arange(k), weight[:, None], 0)


def weighted_means(x, share):
    """Weighted means [k, width]; the mean of all rows, which is 0, for an empty cluster."""
    return matmul(share.T, x) / or_one(jnp.sum(share, axis=0))[:, None]


def expanded(x, square, centers):
    """Squared distances [row, k] as |x|^2 - 2 x.c + |c|^2: a matmul; sound because the rows are centred."""
    return jnp.maximum(square[:, None] - 2 * matmul(x, centers.T) + jnp.sum(centers**2, axis=1), 0)


def direct(x, centers):
    """Squared distances [row, k] by differences, one centre at a time: exact to the last digits, but no matmul."""
    return lax.map(lambda center: jnp.sum((x - center) ** 2, axis=1), centers).T


def matmul(a, b):
    """A product in full float32; accelerators would round its operands."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def or_one(value):
    """A divisor: 1 where the value is 0."""
    return jnp.where(value > 0, value, 1)
