"""Properties of the decoder on small random models: no other library needed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_decoders import BASE, KINDS, RANK, close, empty, make_lora, make_params, make_tokens, run, with_gates

from fedrouter_jax import models
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import decoder, low_rank, matrices
from fedrouter_jax.models.parameters import param_shapes
from fedrouter_jax.types import LoRA


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def config(request):
    return request.param


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
    config, some, part = models.first_blocks(BASE, params, lora, 2)
    assert config == shallow
    close(run(config, some, tokens, None, None, part), run(shallow, cut, tokens, None, None, adapter))
    config, none, _ = models.first_blocks(BASE, params, None, 0)
    close(run(config, none, tokens, final_norm=False), params["embedding"][tokens])
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
    assert not low_rank._dropout(jnp.ones((200, 2), jnp.uint32), 1 - 1e-12, x).any()  # nearly all, as a config may say
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


def test_init_params_match_the_declared_shapes():
    config = KINDS["biased, normed, wide heads"]
    params = models.init_params(config, jax.random.key(0), "bfloat16")
    shapes = param_shapes(config, "bfloat16")
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
        models.first_blocks(BASE, params, None, 4)


@pytest.mark.parametrize("unroll", [True, False])
def test_blocks_are_a_loop_unless_they_are_compiled_one_by_one(unroll):
    """Forward and back: what `--unroll` is for."""

    def total(x, tokens):
        params = tiny.params | {"norm": tiny.params["norm"] * x}
        return models.hidden_states(tiny.config, params, tokens, tokens * 0, blocks=decoder.Blocks(unroll=unroll)).sum()

    tiny = models.load_model("tiny")
    program = jax.jit(jax.grad(total)).lower(1.0, jnp.ones((1, 4), jnp.int32)).as_text()
    assert ("stablehlo.while" in program) == (not unroll)
