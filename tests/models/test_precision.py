"""What is rounded to bfloat16 and what is not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_decoders import BASE, close, filled, make_lora, make_params, make_tokens, rounded, run

from fedrouter_jax import models
from fedrouter_jax.models import attention, decoder, matrices


def test_bfloat16_is_close_and_stays_bfloat16():
    params, tokens, lora = make_params(BASE), make_tokens(2, 9), make_lora(BASE)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    hidden = run(BASE, half, tokens, None, None, lora)
    assert hidden.dtype == jnp.bfloat16 and models.logits(BASE, half, hidden).dtype == jnp.float32
    exact = run(BASE, params, tokens, None, None, lora)
    assert float(jnp.mean(jnp.abs(hidden - exact)) / jnp.mean(jnp.abs(exact))) < 0.05
    _, cache = jax.eval_shape(lambda: filled(BASE, half, tokens, [9, 4], 12))
    step, cache = jax.eval_shape(lambda cache: models.decode_step(BASE, half, tokens[:, 0], cache), cache)
    assert step.dtype == cache.k.dtype == cache.v.dtype == jnp.bfloat16


def test_far_positions_are_not_rounded_to_bfloat16():
    """Of whole numbers it holds every one up to 256 only."""
    params, tokens = make_params(BASE), make_tokens(2, 9)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    positions = jnp.broadcast_to(jnp.arange(9) + 1001, tokens.shape)
    found, exact = (run(BASE, weights, tokens, positions) for weights in (half, widened))
    assert float(jnp.mean(jnp.abs(found - exact)) / jnp.mean(jnp.abs(exact))) < 0.01


def test_sums_over_many_bfloat16_numbers_are_float32():
    """Of scores and values in attention, and of squares in the norm: what is left is the rounding of results."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    def error(function, *rounded):
        function = jax.jit(function)
        exact = function(*(part.astype(jnp.float32) for part in rounded))
        return float(jnp.max(jnp.abs(function(*rounded).astype(jnp.float32) - exact)))

    mask = attention.attention_mask(BASE, jnp.ones((1, 300), jnp.int32))
    q, k, v = 3 * draw(1, 300, 4, 8), draw(1, 300, 2, 8), draw(1, 300, 2, 8)
    assert error(lambda *qkv: attention.attend(*qkv, mask), q, k, v) < 0.015
    assert error(lambda x, scale: decoder._rms_norm(x, scale, 1e-6), draw(64, 512), jnp.ones(512, jnp.bfloat16)) < 0.012


def test_mixed_precision_rounds_operands_and_keeps_float32():
    params, tokens, lora = make_params(BASE), make_tokens(2, 9), make_lora(BASE)
    mixed = rounded(params)
    assert mixed["norm"].dtype == jnp.float32 and mixed["embedding"].dtype == jnp.bfloat16
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), mixed)

    def loss(params, lora):
        hidden = run(BASE, params, tokens, None, None, lora)
        assert hidden.dtype == jnp.float32
        return jnp.mean(jax.nn.logsumexp(models.logits(BASE, params, hidden), axis=-1))

    ours, theirs = (jax.value_and_grad(loss, 1)(params, lora) for params in (mixed, widened))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=2e-3)  # operands of eight bits, on the same weights
    for one, other in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
        assert np.linalg.norm(one - other) < 0.02 * np.linalg.norm(other)


@pytest.mark.parametrize("axis", [0, 1])
def test_products_of_rounded_operands_are_summed_in_float32(axis):
    """Forward and back; a result in bfloat16 would be off by a thousandth."""
    rng = np.random.default_rng(0)
    x, slope = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 64), (4, 8)))
    weight = jnp.asarray(rng.normal(size=(64, 8)), jnp.bfloat16)
    found, back = jax.vjp(lambda x: matrices.rounded_product(x, weight if axis == 0 else weight.T, axis), x)
    wide = lambda part: np.asarray(part.astype(jnp.bfloat16), np.float32)  # noqa: E731
    close(found, wide(x) @ wide(weight))
    close(back(slope)[0], wide(slope) @ wide(weight).T)


def test_bits_are_the_matrices_they_stand_for():
    params, tokens, lora = rounded(make_params(BASE)), make_tokens(2, 9), make_lora(BASE)
    bits = matrices.as_bits(params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(bits)} == {"uint16", "float32"}
    for one, other in zip(jax.tree.leaves(bits), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(matrices.values(one), other)

    def everything(params):
        loss = lambda lora: jnp.sum(run(BASE, params, tokens, None, None, lora) ** 2)  # noqa: E731
        cache = filled(BASE, params, tokens, [9, 4], 12, lora=lora)[1]
        hidden, cache = models.decode_step(BASE, params, tokens[:, 0], cache, lora)
        assert cache.k.dtype == cache.new_v.dtype == params["embedding"].dtype
        keys = [matrices.values(part) for part in (cache.k, cache.v, cache.new_k, cache.new_v)]
        return jax.grad(loss)(lora), hidden, models.logits(BASE, params, hidden), keys

    jax.tree.map(partial(close, tolerance=1e-3), everything(bits), everything(params))
