"""Frozen matrices of fewer bits than what they are multiplied with."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedrouter_jax.types import Array, PyTree

DTYPES = ("float32", "bfloat16", "mixed")  # of a base; mixed: the matrices in bfloat16, all else in float32
MATRICES = ("kernel", "embedding", "head")


def computation(dtype: str) -> jnp.dtype:
    """The type of activations over a base of this dtype."""
    return jnp.dtype("float32" if dtype == "mixed" else dtype)


def as_bits(params: PyTree) -> PyTree:
    """The same parameters, matrices of bfloat16 as integers of 16 bits; all functions here take either.

    On a CPU, XLA widens a whole stack of bfloat16 to float32 before it slices a layer out of it, or gathers from it,
    which takes longer than the products; integers it leaves alone.
    """

    def bits(path, leaf):
        matrix = path[-1].key in MATRICES and leaf.dtype == jnp.bfloat16
        if not matrix:
            return leaf
        on_host = isinstance(leaf, np.ndarray)
        return leaf.view(np.uint16) if on_host else jax.lax.bitcast_convert_type(leaf, jnp.uint16)

    return jax.tree_util.tree_map_with_path(bits, params)


def values(leaf: Array) -> Array:
    """The matrix behind integers of `as_bits`."""
    return jax.lax.bitcast_convert_type(leaf, jnp.bfloat16) if leaf.dtype == jnp.uint16 else leaf


def rounded_product(x: Array, weight: Array, axis: int) -> Array:
    """x [..., in] by the frozen `weight` (or its bits), whose `axis` is `in`: operands in its dtype, float32 sums.

    So are gradients, which by JAX's own rule would be products with a weight widened to float32.
    """
    return _rounded(x.astype(jnp.float32), weight, axis)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded(x: Array, weight: Array, axis: int) -> Array:
    weight = values(weight)
    dimensions = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x.astype(weight.dtype), weight, dimensions, preferred_element_type=jnp.float32)


def _rounded_forward(x, weight, axis):
    return _rounded(x, weight, axis), weight


def _rounded_backward(axis, weight, gradient):
    return _rounded(gradient, weight, 1 - axis), None


_rounded.defvjp(_rounded_forward, _rounded_backward)
