"""The linear layers of the frozen base in 8 or 4 bits; embedding, head, norms and biases stay as they are.

int8: one scale an output, by the largest weight. nf4: NormalFloat (Dettmers et al., QLoRA, NeurIPS 2023, arXiv
2305.14314), one scale for 64 inputs of an output, the 16 levels of a normal distribution, two codes a byte. Codes are
made by qwix; packing them is ours, since a 4-bit array takes a byte an element on some versions of JAX.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedrouter_jax.types import Array, PyTree

Quantise = Literal["none", "int8", "nf4"]
BLOCK = 64  # inputs that share a scale
# The levels of NF4 (QLoRA, appendix E), from -1 to 1; zero is exact.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantise(params: PyTree, how: Quantise) -> PyTree:
    """Parameters whose kernels `[layer, in, out]` have become codes and scales in the host's memory.

    A device has one layer at a time: a base need not fit it whole. The other parameters are the same arrays.
    """
    return _quantised(params, how, lambda codes: jax.tree.map(np.asarray, codes), np.stack)


def _quantised(params: PyTree, how: Quantise, keep: Callable[[PyTree], PyTree], stack: Callable) -> PyTree:
    """The same, where `keep` is done with the codes of a layer, and `stack` with those of all."""
    if how == "none":
        return params
    codes = {"int8": _int8, "nf4": _nf4}[how]

    def module(leaf: Any) -> Any:
        if not isinstance(leaf, dict):
            return leaf
        rest = {name: value for name, value in leaf.items() if name != "kernel"}
        layers = [keep(jax.jit(codes)(kernel)) for kernel in leaf["kernel"]]
        return rest | {name: stack([layer[name] for layer in layers]) for name in layers[0]}

    return {**params, "blocks": {name: module(leaf) for name, leaf in params["blocks"].items()}}


def _int8(kernel: Array) -> dict[str, Array]:
    import qwix  # here, since it takes seconds to import

    found = qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=(1,))
    return {"codes": found.qvalue, "scales": found.scale.astype(jnp.float32)}


def _nf4(kernel: Array) -> dict[str, Array]:
    import qwix

    block = math.gcd(kernel.shape[0], BLOCK)
    found = qwix.quantize(kernel.astype(jnp.float32), "nf4", channelwise_axes=(1,), tiled_axes={0: block})
    low, high = jnp.split(found.qvalue.astype(jnp.uint8), 2)  # the first half of the inputs and the second
    return {"codes": low | (high << 4), "scales": found.scale.astype(jnp.bfloat16)}


def kernel(stored: dict[str, Array], dtype) -> Array:
    """A kernel [in, out] from its codes and scales."""
    codes, scales = stored["codes"], stored["scales"]
    if codes.dtype == jnp.uint8:
        codes = jnp.concatenate([codes & 15, codes >> 4])
        values = jnp.asarray(LEVELS, dtype)[codes]
    else:
        values = codes.astype(dtype)
    blocks = values.reshape(scales.shape[0], -1, values.shape[-1])
    return (blocks * scales[:, None].astype(dtype)).reshape(values.shape)


def stored_shapes(shapes: PyTree, how: Quantise) -> PyTree:
    """The tree of `jax.ShapeDtypeStruct` that `quantise` makes of parameters of these shapes."""
    return jax.eval_shape(lambda params: _quantised(params, how, lambda codes: codes, jnp.stack), shapes)
