"""Attention: as JAX's own, and which kernel runs it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_decoders import BASE, close, make_lora, make_params, make_tokens, run

from fedrouter_jax.models import attention


@pytest.mark.parametrize(("time", "window"), [(1, None), (128, 40), (129, None), (300, None), (300, 40)])
def test_attention_equals_dot_product_attention(time, window):
    config = dataclasses.replace(BASE, sliding_window=window)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, time, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    mask = attention.attention_mask(config, jnp.asarray(np.sort(rng.integers(0, 3, (2, time)))))
    ours = lambda *qkv: attention.attend(*qkv, mask)  # noqa: E731
    oracle = lambda *qkv: jax.nn.dot_product_attention(*qkv, mask=mask).reshape(2, time, -1)  # noqa: E731
    close(ours(q, k, v), oracle(q, k, v))
    weights = jnp.asarray(rng.normal(size=(2, time, 32)), jnp.float32)
    gradients = [jax.grad(lambda *x, f=f: jnp.sum(f(*x) * weights), argnums=(0, 1, 2))(q, k, v) for f in (ours, oracle)]
    jax.tree.map(partial(close, tolerance=1e-4), *gradients)


@pytest.mark.parametrize("window", [None, 40])
def test_the_kernel_of_a_gpu_gives_what_ours_does(monkeypatch, window):
    """Of three groups under vmap, forward and back. Where there is no GPU, plain attention stands for cuDNN's."""
    if not attention.by_cudnn():
        monkeypatch.setattr(attention, "by_cudnn", lambda: True)
        monkeypatch.setattr(attention, "_kernel", lambda *qkv: jax.nn.dot_product_attention(*qkv[:3], mask=qkv[3]))
    config = dataclasses.replace(BASE, sliding_window=window)
    rng = np.random.default_rng(0)
    rounded = [jnp.asarray(rng.normal(size=(3, 2, 320, heads, 64)), jnp.bfloat16) for heads in (4, 2, 2)]
    masks = jax.vmap(partial(attention.attention_mask, config))(jnp.asarray(np.sort(rng.integers(0, 3, (3, 2, 320)))))
    weights = jnp.asarray(rng.normal(size=(2, 320, 256)), jnp.float32)  # of all groups, so not mapped

    def loss(q, k, v, mask):
        return jnp.sum(attention.attend(q, k, v, mask).astype(jnp.float32) * weights)

    both = jax.vmap(jax.value_and_grad(loss, (0, 1, 2)))
    with jax.default_matmul_precision("highest"):
        expected = both(*(part.astype(jnp.float32) for part in rounded), masks)
    for part, other in zip(jax.tree.leaves(both(*rounded, masks)), jax.tree.leaves(expected), strict=True):
        assert jnp.linalg.norm(part.astype(jnp.float32) - other) <= 2e-2 * jnp.linalg.norm(other)


@pytest.mark.parametrize(
    ("capability", "known"), [("", False), ("gfx942", False), ("7.5", False), ("8.0", True), ("12.1", True)]
)
def test_the_kernel_of_a_gpu_wants_a_device_that_has_it(capability, known, monkeypatch):
    monkeypatch.setattr(attention, "compute_capability", lambda: capability)
    assert attention.by_cudnn() == known


@pytest.mark.parametrize(
    ("dtype", "time", "size", "fits"),
    [
        ("bfloat16", 16, 8, True),
        ("bfloat16", 16, 128, True),
        ("float32", 16, 8, False),
        ("bfloat16", 12, 8, False),
        ("bfloat16", 16, 4, False),
        ("bfloat16", 16, 136, False),
    ],
)
def test_the_kernel_of_a_gpu_gets_what_it_can_take(dtype, time, size, fits, monkeypatch):
    monkeypatch.setattr(attention, "by_cudnn", lambda: True)
    monkeypatch.setattr(attention, "_fused", lambda q, k, v, mask: jnp.full(q.shape, 7))
    monkeypatch.setattr(attention, "_attention", lambda q, k, v, mask: q)
    q, kv = jnp.zeros((1, time, 2, size), dtype), jnp.zeros((1, time, 1, size), dtype)
    assert (attention.attend(q, kv, kv, None) == 7).all() == fits


def test_training_keeps_no_scores_per_key():
    # The backward pass recomputes attention: what is stored grows with time, not with its square.
    params, lora = make_params(BASE), make_lora(BASE, ("q_proj",))

    def temporary(time):
        tokens = make_tokens(1, time)
        compiled = jax.jit(jax.grad(lambda lora: jnp.sum(run(BASE, params, tokens, None, None, lora)))).lower(lora)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    deep = dataclasses.replace(BASE, layers=12)
    assert deep.layers * 512 * 512 * BASE.heads * 4 > temporary(512)
