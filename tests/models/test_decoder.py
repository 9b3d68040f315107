"""Properties of the decoder on small random models: no other library needed."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrouter_jax import models
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import attention, decoder, low_rank, matrices
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


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def config(request):
    return request.param


def make_params(config):
    """Weights several times their usual scale and norms away from one, so that mistakes show."""
    rng = np.random.default_rng(1)

    def leaf(path, shape):
        name = path[-1].key
        scale = {"kernel": 0.1, "embedding": 1.0, "head": 0.1, "bias": 0.3}.get(name)
        draw = rng.normal(size=shape.shape) * scale if scale else rng.uniform(0.5, 1.5, shape.shape)
        return jnp.asarray(draw, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, decoder.param_shapes(config))


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


@partial(jax.jit, static_argnums=0, static_argnames=("dropout", "layers", "final_norm"))
def run(config, params, tokens, positions=None, segments=None, lora=None, gates=None, **options):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    return models.hidden_states(config, params, tokens, positions, segments, lora, gates, **options)


def close(one, other, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=tolerance, atol=tolerance)


def test_packed_rows_equal_separate_rows(config):
    params, lengths = make_params(config), [9, 9]
    row, positions, segments = np.zeros((1, 24), np.int32), np.zeros((1, 24), np.int32), np.zeros((1, 24), np.int32)
    texts, start = [make_tokens(1, length, seed=length) for length in lengths], 2
    spans = []
    for number, text in enumerate(texts, start=1):
        end = start + text.shape[1]
        row[0, start:end], positions[0, start:end], segments[0, start:end] = text[0], np.arange(end - start), number
        spans.append((start, end))
        start = end
    packed = run(config, params, row, positions, segments)
    assert np.isfinite(packed).all()
    for (start, end), text in zip(spans, texts, strict=True):
        close(packed[:, start:end], run(config, params, text))


def test_padding_never_changes_real_outputs():
    params, tokens = make_params(BASE), make_tokens(2, 12)
    segments = jnp.asarray([[1] * 8 + [0] * 4, [1] * 12])
    other = tokens.at[0, 8:].set((tokens[0, 8:] + 5) % 97)
    one, two = run(BASE, params, tokens, None, segments), run(BASE, params, other, None, segments)
    np.testing.assert_array_equal(one[0, :8], two[0, :8])
    close(one[0, :8], run(BASE, params, tokens[:1, :8])[0])


def test_gradients_are_causal_and_windowed(config):
    # d hidden[t] / d embedding of input s is zero exactly where s is after t or out of reach of the layers' windows.
    params, time = make_params(config), 20
    tokens = jnp.arange(time)[None]  # each token once, so that a row of the embedding is a position

    def touched(t):
        loss = lambda e: jnp.sum(run(config, {**params, "embedding": e}, tokens)[0, t] ** 2)  # noqa: E731
        return np.abs(jax.grad(loss)(params["embedding"])).sum(-1)[:time] > 0

    reach = time if config.sliding_window is None else config.layers * (config.sliding_window - 1)
    for t in (0, 6, time - 1):
        np.testing.assert_array_equal(touched(t), [t - reach <= s <= t for s in range(time)])


def test_gradients_are_finite_with_padding():
    config = KINDS["window"]
    params, lora, tokens = make_params(config), make_lora(config), make_tokens(2, 10)
    segments = jnp.asarray([[0] * 10, [0] * 3 + [1] * 4 + [0] * 3])
    loss = lambda lora: jnp.sum(run(config, params, tokens, None, segments, lora) ** 2)  # noqa: E731
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(loss)(lora)))


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


@pytest.mark.parametrize(
    ("config", "gates"),
    list(zip(KINDS.values(), ("none", "shared", "per row"), strict=True)),
    ids=KINDS,
    indirect=["config"],
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


@pytest.mark.parametrize("modules", [models.MODULES, ("q_proj", "v_proj"), ("down_proj",)])
def test_lora_equals_merged_weights(modules):
    config = KINDS["biased, normed, wide heads"]
    params, lora, tokens = make_params(config), make_lora(config, modules), make_tokens(2, 9)
    gate = jnp.asarray(np.random.default_rng(7).normal(size=RANK), jnp.float32)
    merged = jax.tree.map(lambda leaf: leaf, params)
    for module in modules:
        update = jnp.einsum("lir,r,lro->lio", lora.a[module], gate, lora.b[module])
        kernel = params["blocks"][module]["kernel"] + update
        merged["blocks"][module] = {**params["blocks"][module], "kernel": kernel}
    ours = run(config, params, tokens, None, None, lora, gate)
    close(ours, run(config, merged, tokens), 1e-4)
    close(ours, run(config, params, tokens, None, None, lora, jnp.stack([gate, gate])))
    ones = run(config, params, tokens, None, None, lora, jnp.ones(RANK))
    close(ones, run(config, params, tokens, None, None, lora))
    assert np.abs(ones - ours).max() > 1e-3


def test_adapters_with_gates_compete_for_every_token():
    """One module against the plain formula; then, in the model: equal scores are halves, and one alone has it all."""
    rng = np.random.default_rng(0)
    x, a, b, score = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 4), (4, 6), (6, 3), (4, 3)))
    gates = np.array([[2, 2, 2, 2, 0, 0]] * 4 + [[0, 0, 2, 2, 2, 2]], np.float32)  # slots of rank 2, one closed
    raw = np.exp(x @ score) * (gates[:, ::2] != 0)
    mix = raw / raw.sum(axis=1, keepdims=True)
    own = [x @ a[:, here] @ b[here] for here in (slice(0, 2), slice(2, 4), slice(4, 6))]
    expected = sum(gates[:, [2 * s]] * mix[:, [s]] * own[s] for s in range(3))
    one = LoRA({"q_proj": jnp.asarray(a)}, {"q_proj": jnp.asarray(b)}, {"q_proj": jnp.asarray(score)[..., None]})
    found = low_rank.low_rank(jnp.asarray(x), "q_proj", low_rank.Adapter(one, jnp.asarray(gates), None), 0.0)
    close(found, expected)
    params, lora, tokens = make_params(BASE), make_lora(BASE), make_tokens(1, 9)
    gated = with_gates(BASE, lora)
    equal = lora._replace(gate=jax.tree.map(lambda gate: gate[..., :1, :].repeat(2, axis=-2), gated.gate))
    ones, second = jnp.ones(RANK), jnp.asarray([0.0] * (RANK // 2) + [1.0] * (RANK // 2))
    close(run(BASE, params, tokens, None, None, equal, ones), run(BASE, params, tokens, None, None, lora, ones / 2))
    close(run(BASE, params, tokens, None, None, gated, second), run(BASE, params, tokens, None, None, lora, second))
    mixed = run(BASE, params, tokens, None, None, gated, ones)
    assert np.abs(mixed - run(BASE, params, tokens, None, None, lora, ones / 2)).max() > 1e-3


def test_gates_belong_to_their_row():
    params, lora, tokens = make_params(BASE), make_lora(BASE), make_tokens(1, 9)
    gates = jnp.asarray([[1.0] * 3 + [0.0] * 3, [0.0] * 6])
    both = run(BASE, params, jnp.tile(tokens, (2, 1)), None, None, lora, gates)
    close(both[0], run(BASE, params, tokens, None, None, lora, gates[0])[0])
    close(both[1], run(BASE, params, tokens)[0])


def test_first_layers_are_a_shallower_model():
    params, tokens, lora = make_params(BASE), make_tokens(2, 9), make_lora(BASE)
    shallow = dataclasses.replace(BASE, layers=2)
    cut = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:2], params["blocks"])}
    adapter = jax.tree.map(lambda leaf: leaf[:2], lora)
    close(run(BASE, params, tokens, None, None, lora, layers=2), run(shallow, cut, tokens, None, None, adapter))
    close(run(BASE, params, tokens, layers=0, final_norm=False), params["embedding"][tokens])
    raw = run(BASE, params, tokens, final_norm=False)
    close(run(BASE, params, tokens), decoder._rms_norm(raw, params["norm"], BASE.norm_eps))


def test_vmap_over_lanes_equals_one_by_one():
    params = make_params(BASE)
    lanes = [make_lora(BASE, ("q_proj", "v_proj"), seed) for seed in range(3)]
    tokens, keys = make_tokens(3, 2, 9), jax.random.split(jax.random.key(0), (3, 2, 9))

    def loss(lora, tokens, keys):
        return jnp.mean(run(BASE, params, tokens, None, None, lora, jnp.ones(RANK), dropout=0.3, keys=keys) ** 2)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
    together = jax.vmap(jax.grad(loss))(stacked, tokens, keys)
    for lane, lora in enumerate(lanes):
        alone = jax.grad(loss)(lora, tokens[lane], keys[lane])
        jax.tree.map(lambda a, b, lane=lane: close(a[lane], b), together, alone)


def test_dropout_is_on_the_branch_only_unbiased_and_different_everywhere():
    x = jnp.ones((200, 500))
    dropped = low_rank._dropout(jax.random.key_data(jax.random.split(jax.random.key(0), 200)), 0.25, x)
    assert abs(float(jnp.mean(dropped == 0)) - 0.25) < 0.01 and abs(float(jnp.mean(dropped)) - 1) < 0.01
    level = np.asarray(dropped) - 1
    for one, other in ((level[1:], level[:-1]), (level[:, 1:], level[:, :-1]), (level[:, 3:], level[:, :-3])):
        assert abs(np.mean(one * other)) / np.mean(level**2) < 0.015  # neither tokens nor elements drop together
    params, tokens, lora = make_params(BASE), make_tokens(1, 9), make_lora(BASE)
    keys = [jax.random.split(jax.random.key(seed), (1, 9)) for seed in (0, 1)]
    silent = run(BASE, params, tokens, None, None, lora, jnp.zeros(RANK), dropout=0.5, keys=keys[0])
    close(silent, run(BASE, params, tokens))
    one, again, other = (
        run(BASE, params, tokens, None, None, lora, dropout=0.5, keys=keys[seed]) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    keyless = run(BASE, params, tokens, None, None, lora, dropout=0.5)
    close(keyless, run(BASE, params, tokens, None, None, lora))


def test_a_gradient_keeps_nothing_of_dropout():
    """Of arrays as wide as the model it keeps three a block: the inputs of both norms, and what both adapters see."""
    params, tokens, lora = make_params(BASE), make_tokens(1, 9), make_lora(BASE, ("q_proj", "v_proj"))
    keys = jax.random.split(jax.random.key(0), (1, 9))

    def kept(lora):
        return jax.vjp(lambda lora: run(BASE, params, tokens, None, None, lora, dropout=0.5, keys=keys), lora)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, lora))
    assert sum(leaf.shape == (BASE.layers, 1, 9, BASE.width) for leaf in leaves) == 3
    assert not any(leaf.dtype == bool and leaf.shape[-1] == BASE.width for leaf in leaves)


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


def rounded(params):
    """Mixed precision: matrices in bfloat16, the rest in float32."""
    shapes = decoder.param_shapes(BASE, "mixed")
    return jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), params, shapes)


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


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_the_norms_gradient_is_that_of_its_formula(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # a device's own way to the sum
    rng = np.random.default_rng(0)
    x, scale, weights = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 7, 32), (32,), (2, 7, 32)))
    formula = lambda x, scale: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 0.1) * scale  # noqa: E731
    found, expected = (
        jax.grad(lambda x, scale, f=f: jnp.sum(f(x, scale) * weights), (0, 1))(x, scale)
        for f in (lambda x, scale: decoder._rms_norm(x, scale, 0.1), formula)
    )
    jax.tree.map(close, found, expected)


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


def test_training_keeps_no_scores_per_key():
    # The backward pass recomputes attention: what is stored grows with time, not with its square.
    params, lora = make_params(BASE), make_lora(BASE, ("q_proj",))

    def temporary(time):
        tokens = make_tokens(1, time)
        compiled = jax.jit(jax.grad(lambda lora: jnp.sum(run(BASE, params, tokens, None, None, lora)))).lower(lora)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    deep = dataclasses.replace(BASE, layers=12)
    assert deep.layers * 512 * 512 * BASE.heads * 4 > temporary(512)


def test_init_params_match_the_declared_shapes():
    config = KINDS["biased, normed, wide heads"]
    params = models.init_params(config, jax.random.key(0), "bfloat16")
    shapes = decoder.param_shapes(config, "bfloat16")
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
    for module, shape in models.module_shapes(config).items():
        assert params["blocks"][module]["kernel"].shape == (config.layers, *shape)


def test_fresh_matrices_are_normal_and_each_its_own_biases_zero_and_norms_one():
    params = models.init_params(KINDS["biased, normed, wide heads"], jax.random.key(0), "bfloat16")
    firsts = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key in matrices.MATRICES:
            assert 0.018 < float(jnp.std(leaf.astype(jnp.float32))) < 0.022
            firsts.append(float(leaf.ravel()[0]))
        else:
            assert (leaf == (0 if path[-1].key == "bias" else 1)).all()
    assert len(set(firsts)) == len(firsts) == len(models.MODULES) + 2


def test_bad_input_is_one_line():
    params, tokens = models.init_params(BASE, jax.random.key(0)), make_tokens(1, 4)
    stray = LoRA({"lm_head": jnp.zeros((3, 32, 2))}, {"lm_head": jnp.zeros((3, 2, 97))})
    with pytest.raises(UserError, match="'lm_head'; expected any of q_proj"):
        models.hidden_states(BASE, params, tokens, jnp.arange(4)[None], lora=stray)
    cache, ones = empty(BASE, 1, 4, 1, jnp.float32), jnp.ones((1, 4), jnp.int32)
    with pytest.raises(UserError, match="'lm_head'; expected any of q_proj"):
        models.prefill(BASE, params, tokens, jnp.arange(4)[None], ones, ones - 1, cache, stray)
    with pytest.raises(UserError, match="'lm_head'; expected any of q_proj"):
        models.decode_step(BASE, params, tokens[:, 0], cache, stray)
    with pytest.raises(UserError, match="asked for 4 layers; expected 0 to 3"):
        models.hidden_states(BASE, params, tokens, jnp.arange(4)[None], layers=4)
