"""One decoder for all families, as plain functions of (config, params).

The blocks are stacked on a leading layer axis and run by a scan, so compile time does not grow with depth. The rest
of the project sees only the functions at the bottom; Flax Linen stays inside.

Parameters: {"embedding": [vocab, width], "norm": [width], "blocks": {module: {"kernel": [layer, in, out], "bias"?:
[layer, out], "shift"? of methods that move a kernel: float32 like it}, norm: [layer, size]}, "head"?: [vocab, width]},
or with {"codes", "scales"} for a kernel (`quantise.py`). All computation is in the dtype of the norms, except RMSNorm,
rotary positions and softmax, which are in float32. Where kernels, embedding and head are of fewer bits ("mixed"), the
operands of their products are rounded to that, and sums are float32.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedrouter_jax.errors import UserError
from fedrouter_jax.models import quantise
from fedrouter_jax.models.attention import attend, attention_mask
from fedrouter_jax.models.cache import PAGE, Cache, attend_cache, pages_of, stored
from fedrouter_jax.models.config import MODULES, DecoderConfig, module_shapes
from fedrouter_jax.models.low_rank import Adapter, low_rank
from fedrouter_jax.models.matrices import rounded_product, values
from fedrouter_jax.types import Array, LoRA, PyTree

_INIT = nn.initializers.normal(0.02)
# Recomputing these cheap parts in the backward pass beats storing what they need: less memory, and less time too.
# Inside a scan the barrier against common subexpressions is not needed.
_recompute = partial(jax.checkpoint, prevent_cse=False)


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Angular frequency of each pair of head dimensions, in radians per position: float32 [head_dim / 2]."""
    frequencies = 1.0 / config.rope_theta ** (np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim)
    if isinstance(config.rope_scaling, tuple):
        frequencies = frequencies / np.array(config.rope_scaling, np.float32)
    elif config.rope_scaling is not None:
        # Llama 3.1: wavelengths beyond the original context are stretched, short ones kept, a ramp between.
        s = config.rope_scaling
        turns = s.original_max_positions * frequencies / (2 * np.pi)
        kept = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / s.factor)
    return frequencies.astype(np.float32)


def _rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotary positions in the half-split convention; x is [..., head, head_dim], rope cosines and sines."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    return _rms_norm_forward(x, scale, eps)[0]


@jax.named_scope("norm")
def _rms_norm_forward(x, scale, eps):
    x32 = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * factor).astype(x.dtype) * scale, (x, scale, factor)


@jax.named_scope("norm")
def _rms_norm_backward(eps, kept, gradient):
    x, scale, factor = kept
    normal, slope = x.astype(jnp.float32) * factor, (gradient * scale).astype(jnp.float32)
    if jax.default_backend() == "gpu":
        along = jnp.mean(normal * slope, axis=-1, keepdims=True)
    else:  # a product with ones adds up several times faster on a CPU, and a round on a TPU holds a tenth less
        ones = jnp.ones((x.shape[-1], 8), jnp.float32)
        along = jnp.matmul(normal * slope, ones, precision="highest")[..., :1] / x.shape[-1]
    of_scale = jnp.sum(gradient * normal.astype(x.dtype), axis=range(x.ndim - 1))
    return (factor * (slope - normal * along)).astype(x.dtype), of_scale


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@_recompute  # or the backward pass would keep the kernels of all layers
def _product(x: Array, codes: Array, scales: Array) -> Array:
    return x @ quantise.kernel({"codes": codes, "scales": scales}, x.dtype)


@_recompute
def _swiglu(gate: Array, up: Array) -> Array:
    return nn.silu(gate) * up


class Blocks(NamedTuple):
    """How the blocks are run where there are gradients: what changes speed and memory, never a result."""

    remat: bool = False  # computed again from their inputs: a fifth of the memory, and one more forward pass
    unroll: bool = False  # compiled one by one: a loop copies what it keeps for the way back, but compiles sooner


LOOP = Blocks()


class _Linear(nn.Module):
    width: int
    bias: bool
    rate: float

    @nn.compact
    def __call__(self, x: Array, adapter: Adapter | None) -> Array:
        if self.has_variable("params", "codes"):
            y = _product(x, *(self.variables["params"][name] for name in ("codes", "scales")))
        else:
            kernel = self.param("kernel", _INIT, (x.shape[-1], self.width), x.dtype)
            y = x @ kernel if kernel.dtype == x.dtype else rounded_product(x, kernel, 0).astype(x.dtype)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.width,), x.dtype)
        if self.has_variable("params", "shift"):  # rounded with the kernel, a small one would leave it as it is
            y = y + rounded_product(x, self.variables["params"]["shift"], 0).astype(x.dtype)
        if adapter is not None and self.name in adapter.lora.a:
            y = y + low_rank(x, self.name, adapter, self.rate)
        return y


class _Block(nn.Module):
    """One block. Attention is against `cache` when one is given, else among the tokens of `x` under `mask`."""

    config: DecoderConfig
    rate: float
    keep_kv: bool

    @nn.compact
    def __call__(self, x, lora, number, cache, gates, keys, rope, mask):
        c = self.config
        if keys is not None:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys.ravel(), number)
        adapter = None if lora is None else Adapter(lora, gates, keys)
        widths = {module: out for module, (_, out) in module_shapes(c).items()}

        def linear(module, x):
            bias = c.qkv_bias and module in ("q_proj", "k_proj", "v_proj")
            return _Linear(widths[module], bias, self.rate, name=module)(x, adapter)

        def norm(name, x):
            return _rms_norm(x, self.param(name, nn.initializers.ones, (x.shape[-1],), x.dtype), c.norm_eps)

        y = norm("attention_norm", x)
        q, k, v = (
            linear(module, y).reshape(*x.shape[:-1], -1, c.head_dim) for module in ("q_proj", "k_proj", "v_proj")
        )
        if c.qk_norm:
            q, k = norm("q_norm", q), norm("k_norm", k)
        q, k = _rotate(q, rope), _rotate(k, rope)
        if cache is None:
            mixed = attend(q, k, v, mask)
        else:
            mixed = attend_cache(c, q, k, v, cache)
        x = x + linear("o_proj", mixed)
        y = norm("mlp_norm", x)
        x = x + linear("down_proj", _swiglu(linear("gate_proj", y), linear("up_proj", y)))
        return x, (k, v) if self.keep_kv else None


class Decoder(nn.Module):
    """The Linen module behind the functions below; use those."""

    config: DecoderConfig
    rate: float = 0.0
    keep_kv: bool = False
    final_norm: bool = True
    blocks: Blocks = LOOP
    dtype: jnp.dtype = jnp.float32  # of freshly initialised parameters

    @nn.compact
    def __call__(self, tokens, positions, mask, lora=None, gates=None, keys=None, cache=None):
        """`mask` is [batch, 1, time, time]; with a cache, attention is against that and needs none."""
        c = self.config
        embedding = self.param("embedding", _INIT, (c.vocab_size, c.width), self.dtype)
        scale = self.param("norm", nn.initializers.ones, (c.width,), self.dtype)
        x = values(embedding[tokens]).astype(scale.dtype)
        angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(c)
        block = nn.remat(_Block, prevent_cse=False) if self.blocks.remat else _Block
        same = nn.broadcast
        run = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, 0 if cache is None else Cache(0, 0, *[same] * 4, 0, 0, same), same, same, same, same),
            length=c.layers,
            unroll=c.layers if self.blocks.unroll else 1,
        )(c, self.rate, self.keep_kv, name="blocks")
        x, kv = run(x, lora, jnp.arange(c.layers), cache, gates, keys, (jnp.cos(angles), jnp.sin(angles)), mask)
        if not c.tied:
            self.param("head", _INIT, (c.vocab_size, c.width), self.dtype)
        return _rms_norm(x, scale, c.norm_eps) if self.final_norm else x, kv


def _check(config: DecoderConfig, lora: LoRA | None) -> None:
    unknown = sorted(set(lora.a) - set(MODULES)) if lora is not None else []
    if unknown:
        raise UserError(f"the adapter names the module {unknown[0]!r}; expected any of {', '.join(MODULES)}")


def hidden_states(
    config: DecoderConfig,
    params: PyTree,
    tokens: Array,
    positions: Array,
    segments: Array | None = None,
    lora: LoRA | None = None,
    gates: Array | None = None,
    *,
    dropout: float = 0.0,
    keys: Array | None = None,
    final_norm: bool = True,
    blocks: Blocks = LOOP,
) -> Array:
    """The residual stream after the blocks: [batch, time, width] in the dtype of `params`.

    `tokens`, `positions`, `segments`: int32 [batch, time]. Rows are packed: a token sees earlier tokens of its own
    segment only; segment 0 is padding, whose output is arbitrary but finite. `segments=None` is one text a row.
    Positions restart with every segment.

    `lora` holds {module: [layer, in, rank]} and {module: [layer, rank, out]} for any of `MODULES`; a module computes
    `x W + ((dropout(x) a) * gates) b`, with `gates` [batch, time, rank], [batch, rank] or [rank] (None is ones, where
    adapters have no gate of their own).
    `dropout` (a Python float) acts on that branch only, and needs `keys` [batch, time]; without them there is none.

    `final_norm=False` with `first_blocks(..., n)` is `hidden_states[n]` of transformers. `blocks` says how gradients
    are to run them.
    """
    _check(config, lora)
    segments = jnp.ones_like(tokens) if segments is None else segments
    keys = keys if lora is not None and dropout > 0 else None
    gates = gates[:, None] if gates is not None and gates.ndim == 2 else gates
    model = Decoder(config, dropout, final_norm=final_norm, blocks=blocks)
    mask = attention_mask(config, segments)
    return model.apply({"params": params}, tokens, positions, mask, lora, gates, keys)[0]


def first_blocks(
    config: DecoderConfig, params: PyTree, lora: LoRA | None, layers: int
) -> tuple[DecoderConfig, PyTree, LoRA | None]:
    """The model of the first `layers` blocks alone, and what adapts them; a copy, inside a program one a call."""
    if not 0 <= layers <= config.layers:
        raise UserError(f"asked for {layers} layers; expected 0 to {config.layers}, the depth of the model")
    if layers == config.layers:
        return config, params, lora
    blocks, lora = jax.tree.map(lambda leaf: leaf[:layers], (params["blocks"], lora))
    return dataclasses.replace(config, layers=layers), {**params, "blocks": blocks}, lora


def prefill(
    config: DecoderConfig,
    params: PyTree,
    tokens: Array,
    positions: Array,
    segments: Array,
    owner: Array,
    cache: Cache,
    lora: LoRA | None = None,
    gates: Array | None = None,
) -> tuple[Array, Cache]:
    """Runs packed prompts and adds their keys and values to the cache.

    `tokens`, `positions`, `segments` int32 [batch, time] as for `hidden_states`; `owner` int32 [batch, time] is the row
    of the cache that a token belongs to, and past its last row for padding. Returns the hidden states after the final
    norm [batch, time, width] (arbitrary but finite at padding) and the cache. Tokens past a row's pages are not stored.
    """
    _check(config, lora)
    gates = gates[:, None] if gates is not None and gates.ndim == 2 else gates
    mask = attention_mask(config, segments)
    hidden, (k, v) = Decoder(config, keep_kv=True).apply({"params": params}, tokens, positions, mask, lora, gates)
    k, v = (
        jnp.moveaxis(stored(leaf, cache), 0, 2) for leaf in (k, v)
    )  # an index of [batch, time] puts the layers behind both
    page, slot = pages_of(cache, owner, positions), positions % PAGE
    return hidden, cache._replace(
        k=cache.k.at[:, page, :, :, slot].set(k, mode="drop"),
        v=cache.v.at[:, page, :, slot].set(v, mode="drop"),
        length=cache.length.at[owner].max(positions + 1, mode="drop"),
    )


def decode_step(
    config: DecoderConfig,
    params: PyTree,
    tokens: Array,
    cache: Cache,
    lora: LoRA | None = None,
    gates: Array | None = None,
) -> tuple[Array, Cache]:
    """Runs one more token a row: `tokens` int32 [row], at the position after the row's prompt and what it wrote.

    Returns the hidden states after the final norm [row, width] and the cache with that token in it. A row that has
    written more than the cache has room for forgets the first of it.
    """
    _check(config, lora)
    positions = cache.length + cache.written - cache.began
    hidden, (k, v) = Decoder(config, keep_kv=True).apply(
        {"params": params}, tokens, positions, None, lora, gates, None, cache
    )
    slot = jax.lax.rem(cache.written, cache.new_k.shape[-2])

    def write(new, part):
        # After the layers, and a slice, not a scatter: a loop that carries the cache updates it in place.
        part = stored(part, cache)[:, :, :, None]
        return jax.lax.dynamic_update_slice(new, part, (0, 0, 0, slot, 0), allow_negative_indices=False)

    return hidden, cache._replace(new_k=write(cache.new_k, k), new_v=write(cache.new_v, v), written=cache.written + 1)


def logits(config: DecoderConfig, params: PyTree, hidden: Array) -> Array:
    """Next-token scores, float32 [..., vocab], from hidden states after the final norm [..., width]."""
    head = params["embedding" if config.tied else "head"]
    if head.dtype == jnp.float32:
        return jax.lax.dot_general(hidden, head, (((hidden.ndim - 1,), (1,)), ((), ())))
    return rounded_product(hidden, head, 1)
