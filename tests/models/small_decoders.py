"""Small random decoders, adapters and rows, for the properties of the decoder."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedrouter_jax import models
from fedrouter_jax.models.parameters import param_shapes
from fedrouter_jax.types import LoRA

BASE = models.DecoderConfig(
    vocab_size=97, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_width=48, norm_eps=1e-6, tied=False
)
KINDS = {
    "plain": BASE,
    "window": dataclasses.replace(BASE, sliding_window=5),
    "biased, normed, wide heads": dataclasses.replace(BASE, qkv_bias=True, qk_norm=True, kv_heads=1, head_dim=16),
}
RANK = 6


def make_params(config):
    """Weights several times their usual scale and norms away from one, so that mistakes show."""
    rng = np.random.default_rng(1)

    def leaf(path, shape):
        name = path[-1].key
        scale = {"kernel": 0.1, "embedding": 1.0, "head": 0.1, "bias": 0.3}.get(name)
        draw = rng.normal(size=shape.shape) * scale if scale else rng.uniform(0.5, 1.5, shape.shape)
        return jnp.asarray(draw, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, param_shapes(config))


def make_tokens(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, BASE.vocab_size, shape), jnp.int32)


def make_lora(config, modules=models.MODULES, seed=3):
    rng = np.random.default_rng(seed)
    shapes = models.module_shapes(config)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.1, jnp.float32)  # noqa: E731
    return LoRA(
        {m: draw(config.layers, shapes[m][0], RANK) for m in modules},
        {m: draw(config.layers, RANK, shapes[m][1]) for m in modules},
    )


def with_gates(config, lora, slots=2, seats=1):
    """The same adapter as several that compete."""
    draw, shapes = np.random.default_rng(11), models.module_shapes(config)
    size = lambda module: (config.layers, shapes[module][0], slots, seats)  # noqa: E731
    return lora._replace(gate={m: jnp.asarray(draw.normal(size=size(m)), jnp.float32) for m in lora.a})


@partial(jax.jit, static_argnums=0, static_argnames=("dropout", "final_norm"))
def run(config, params, tokens, positions=None, segments=None, lora=None, gates=None, **options):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    return models.hidden_states(config, params, tokens, positions, segments, lora, gates, **options)


def close(one, other, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=tolerance, atol=tolerance)


def empty(config, rows, slots, new, dtype):
    """A cache whose rows have room for prompts of so many tokens; their pages lie scattered, one is free."""
    each = -(-slots // models.PAGE)
    owner, start = np.repeat(np.arange(rows), each), np.tile(np.arange(each) * models.PAGE, rows)
    mixed = np.random.default_rng(0).permutation(len(owner))
    owner, start = np.append(owner[mixed], rows), np.append(start[mixed], 0)
    return models.empty_cache(config, rows, owner, start, new, dtype)


def filled(config, params, tokens, lengths, slots, new=1, lora=None, gate=None):
    """Right-padded prompts read into a cache of their own."""
    rows = len(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    owner = jnp.where(positions < jnp.asarray(lengths)[:, None], jnp.arange(rows)[:, None], rows)
    cache = empty(config, rows, slots, new, params["embedding"].dtype)
    prefill = jax.jit(models.prefill, static_argnums=0)
    return prefill(config, params, tokens, positions, jnp.ones_like(tokens), owner, cache, lora, gate)


def rounded(params):
    """Mixed precision: matrices in bfloat16, the rest in float32."""
    shapes = param_shapes(BASE, "mixed")
    return jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), params, shapes)
