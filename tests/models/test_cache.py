"""The cache of keys and values: what it holds, and that decoding equals the full forward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_decoders import BASE, KINDS, RANK, close, empty, filled, make_lora, make_params, make_tokens, run, with_gates

from fedrouter_jax import models


@pytest.mark.parametrize(
    ("config", "gates"),
    list(zip(KINDS.values(), ("none", "shared", "per row"), strict=True)),
    ids=KINDS,
)
def test_prefill_and_decode_equal_the_full_forward(config, gates):
    params, lora, tokens = make_params(config), make_lora(config), make_tokens(3, 14)
    gate = {
        "none": None,
        "shared": jnp.linspace(-1, 2, RANK),
        "per row": jnp.asarray(np.random.default_rng(5).normal(size=(3, RANK)), jnp.float32),
    }[gates]
    if gates == "per row":
        lora = with_gates(config, lora, seats=2)
    full = run(config, params, tokens, None, None, lora, gate)
    lengths = np.array([8, 3, 1])
    prompts = jnp.where(jnp.arange(8) < lengths[:, None], tokens[:, :8], 96)
    hidden, cache = filled(config, params, prompts, lengths, 8, 6, lora, gate)
    assert cache.k.shape == (config.layers, 4, config.kv_heads, config.head_dim, models.PAGE)
    assert cache.v.shape == (config.layers, 4, config.kv_heads, models.PAGE, config.head_dim)
    for row, length in enumerate(lengths):
        close(hidden[row, :length], full[row, :length])
    step = jax.jit(models.decode_step, static_argnums=0)
    for _ in range(6):
        at = cache.length + cache.written
        hidden, cache = step(config, params, tokens[jnp.arange(3), at], cache, lora, gate)
        close(hidden, full[jnp.arange(3), at])
    np.testing.assert_array_equal(cache.length + cache.written, lengths + 6)


def test_packed_prompts_fill_the_cache_as_each_alone():
    params, tokens = make_params(BASE), make_tokens(3, 8)
    lengths = [3, 4, 5]
    _, expected = filled(BASE, params, tokens, lengths, 6)
    packed = jnp.concatenate([row[:length] for row, length in zip(tokens, lengths, strict=True)]).reshape(1, 12)
    positions = jnp.concatenate([jnp.arange(length) for length in lengths]).reshape(1, 12)
    owner = jnp.repeat(jnp.arange(3), jnp.asarray(lengths)).reshape(1, 12)
    _, found = models.prefill(BASE, params, packed, positions, owner + 1, owner, empty(BASE, 3, 6, 1, jnp.float32))
    jax.tree.map(close, found, expected)


def test_prompts_of_several_pages_are_read_where_they_lie():
    """Prompts of one and three pages: as a full forward, whatever the order of the pages."""
    size = models.PAGE
    params, lengths = make_params(BASE), np.array([2 * size + 5, 3])
    tokens = make_tokens(2, 2 * size + 6)
    full = run(BASE, params, tokens, None, None)
    _, cache = filled(BASE, params, tokens[:, :-1], lengths, 3 * size)
    hidden, _ = models.decode_step(BASE, params, tokens[jnp.arange(2), lengths], cache)
    close(hidden, full[jnp.arange(2), lengths])


def test_scores_far_above_their_own_do_not_overflow():
    """A key of the prompt, and one of the answer, that a token scores hundreds above itself: exp would be infinite."""
    params, tokens = make_params(BASE), make_tokens(2, 8)
    loud = {"kernel": 600 * params["blocks"]["q_proj"]["kernel"]}
    params = {**params, "blocks": {**params["blocks"], "q_proj": loud}}
    full = run(BASE, params, tokens)
    assert np.isfinite(full).all()
    _, cache = filled(BASE, params, tokens[:, :5], [5, 3], 8, 6)
    step = jax.jit(models.decode_step, static_argnums=0)
    for number in range(3):
        at = jnp.array([5, 3]) + number
        hidden, cache = step(BASE, params, tokens[jnp.arange(2), at], cache)
        close(hidden, full[jnp.arange(2), at], 1e-3)


def test_what_a_free_page_held_is_not_seen():
    params, tokens = make_params(BASE), make_tokens(2, 5)
    _, cache = filled(BASE, params, tokens, [5, 3], 6)
    free = np.flatnonzero(cache.owner == 2)
    step = jax.jit(models.decode_step, static_argnums=0)
    hidden, _ = step(BASE, params, tokens[:, 0], cache)
    for key in (1e4, -1e4):
        stale = cache._replace(k=cache.k.at[:, free].set(key))
        np.testing.assert_array_equal(step(BASE, params, tokens[:, 0], stale)[0], hidden)


def test_what_has_no_room_is_not_stored():
    size = models.PAGE
    params, tokens = make_params(BASE), make_tokens(2, size + 1)
    _, cache = filled(BASE, params, tokens, [size + 1, 2], size, 1)  # the longer prompt loses its last token
    whole = filled(BASE, params, tokens[:, :size], [size, 2], size, 1)[1]
    close(cache.k, whole.k)
    close(cache.v, whole.v)


def test_rows_of_a_cache_begin_at_different_steps():
    config = dataclasses.replace(BASE, sliding_window=4)
    params, tokens, other = make_params(config), make_tokens(3, 14), make_tokens(1, 14, seed=8)
    full, expected = (run(config, params, text, None, None) for text in (tokens, other))
    lengths = np.array([8, 3, 1])
    _, cache = filled(config, params, jnp.where(jnp.arange(8) < lengths[:, None], tokens[:, :8], 96), lengths, 8, 4)
    step = jax.jit(models.decode_step, static_argnums=0)
    for number in range(6):  # more than the answers have room for, but a window sees no more than those
        if number == 3:  # the second row takes another prompt
            cache = models.reuse_rows(cache, jnp.array([False, True, False]), cache.owner, cache.start)
            texts = other[:, :5], jnp.arange(5)[None], jnp.ones((1, 5), jnp.int32), jnp.full((1, 5), 1)
            hidden, cache = models.prefill(config, params, *texts, cache)
            close(hidden[0], expected[0, :5])
            tokens, full = tokens.at[1].set(other[0]), full.at[1].set(expected[0])
        at = cache.length + cache.written - cache.began
        hidden, cache = step(config, params, tokens[jnp.arange(3), at], cache)
        close(hidden, full[jnp.arange(3), at])
    pages = jnp.array([int(np.flatnonzero(cache.owner == row)[0]) for row in (1, 2)])
    kept = models.select_rows(cache, jnp.array([2, 1]), pages, jnp.array([1, 0]), cache.start[pages])
    assert kept.k.shape[1] == kept.new_k.shape[1] == 2
    at = (cache.length + cache.written - cache.began)[jnp.array([2, 1])]
    hidden, _ = step(config, params, tokens[jnp.array([2, 1]), at], kept)
    close(hidden, full[jnp.array([2, 1]), at])


def test_decoding_in_a_loop_compiles_to_one_cache_in_place():
    # The step reads the cache and writes one slot: a loop that carries it must not hold a second copy.
    config = dataclasses.replace(BASE, layers=4)
    params = models.init_params(config, jax.random.key(0))
    cache = empty(config, 8, 2048, 2048, jnp.float32)

    def loop(params, cache):
        body = lambda _, cache: models.decode_step(config, params, jnp.zeros(8, jnp.int32), cache)[1]  # noqa: E731
        return jax.lax.fori_loop(0, 4, body, cache)

    used = jax.jit(loop, donate_argnums=1).lower(params, cache).compile().memory_analysis()
    layer = sum(leaf.nbytes for leaf in cache) / config.layers
    assert used.temp_size_in_bytes < 1.5 * layer
