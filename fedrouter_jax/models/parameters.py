"""The decoder's parameters: their shapes, and fresh ones."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from fedrouter_jax.models.config import DecoderConfig
from fedrouter_jax.models.decoder import Decoder
from fedrouter_jax.models.matrices import MATRICES, computation
from fedrouter_jax.types import Array, PyTree


def param_shapes(config: DecoderConfig, dtype="float32") -> PyTree:
    """The tree of `jax.ShapeDtypeStruct` that `params` must match; `dtype` is one of `DTYPES`."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1, 1, 1), bool)
    key = jax.eval_shape(jax.random.key, 0)
    whole = computation(dtype)
    shapes = jax.eval_shape(Decoder(config, dtype=whole).init, key, tokens, tokens, mask)["params"]

    def rounded(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if path[-1].key in MATRICES else whole)

    return jax.tree_util.tree_map_with_path(rounded, shapes) if dtype == "mixed" else shapes


@partial(jax.jit, static_argnums=(0, 2))
def init_params(config: DecoderConfig, key: Array, dtype="float32") -> PyTree:
    """Fresh parameters: normal with standard deviation 0.02, biases zero, norms one."""
    shapes = param_shapes(config, dtype)
    # One draw for all leaves compiles many times faster than Linen's one draw a leaf inside the scan.
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    draws = 0.02 * jax.random.normal(key, (size,), computation(dtype))
    used = 0

    def leaf(path, shape):
        nonlocal used
        used += shape.size
        name = path[-1].key
        if name in MATRICES:
            return draws[used - shape.size : used].reshape(shape.shape).astype(shape.dtype)
        return jnp.full(shape.shape, 0 if name == "bias" else 1, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)
