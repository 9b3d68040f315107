"""The frozen base in 8 and 4 bits: codes against qwix, the model against itself with the dequantised kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from helpers import assert_close, inputs

from fedrouter_jax.models import MODULES, hidden_states, load_model
from fedrouter_jax.models.quantise import LEVELS, kernel, quantise
from fedrouter_jax.strategies import fedrouter

WAYS = ("int8", "nf4")


def plain(params):
    """The same parameters with the kernels that the codes stand for."""

    def module(leaf):
        if not isinstance(leaf, dict) or "codes" not in leaf:
            return leaf
        rest = {name: value for name, value in leaf.items() if name not in ("codes", "scales")}
        layers = [
            kernel({"codes": c, "scales": s}, jnp.float32) for c, s in zip(leaf["codes"], leaf["scales"], strict=True)
        ]
        return rest | {"kernel": jnp.stack(layers)}

    return {**params, "blocks": {name: module(leaf) for name, leaf in params["blocks"].items()}}


@pytest.mark.parametrize(
    "how, rule, inputs, bits",
    [
        ("int8", {}, 192, 8 + 32 / 192),
        ("nf4", {"tiled_axes": {0: 64}}, 192, 4.25),
        ("nf4", {"tiled_axes": {0: 32}}, 96, 4.5),  # no multiple of 64: blocks that divide it
    ],
)
def test_codes_stand_for_what_qwix_dequantises(how, rule, inputs, bits):
    w = jax.random.normal(jax.random.key(0), (2, inputs, 24)) * 0.1
    stored = quantise({"blocks": {"q_proj": {"kernel": w}}}, how)["blocks"]["q_proj"]
    for layer in range(2):
        expected = qwix.dequantize(
            qwix.quantize(w[layer], {"int8": jnp.int8}.get(how, how), channelwise_axes=(1,), **rule)
        )
        found = kernel(jax.tree.map(lambda leaf, at=layer: leaf[at], stored), jnp.float32)
        # Scales of nf4 are kept in bfloat16: eight bits of them.
        np.testing.assert_allclose(found, expected, rtol=1e-6 if how == "int8" else 2**-8, atol=1e-6)
    assert 8 * sum(leaf.nbytes for leaf in stored.values()) / w.size == pytest.approx(bits)


def test_a_base_in_bfloat16_is_quantised_as_exactly_as_its_numbers_in_float32():
    w = (jax.random.normal(jax.random.key(0), (1, 192, 24)) * 0.1).astype(jnp.bfloat16)
    for how in WAYS:
        found, expected = (
            quantise({"blocks": {"q_proj": {"kernel": kernel}}}, how) for kernel in (w, w.astype(jnp.float32))
        )
        assert_close(found, expected, 0)


def test_levels_of_nf4_are_quantiles_of_a_normal_distribution():
    """QLoRA's construction: evenly spaced quantiles of either side, eight levels above zero and seven below."""
    from scipy.stats import norm

    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above, below = (norm.ppf(np.linspace(offset, 0.5, count + 1)[:-1]) for count in (8, 7))
    levels = np.sort(np.concatenate([above, [0], -below]))
    np.testing.assert_allclose(LEVELS, levels / levels.max(), atol=1e-6)


@pytest.mark.parametrize("how", WAYS)
def test_a_quantised_model_is_the_model_of_its_kernels(tiny, how):
    params = quantise(tiny.params, how)
    assert all("kernel" not in params["blocks"][module] for module in MODULES)
    assert params["embedding"] is tiny.params["embedding"]
    tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, 256)
    positions = jnp.broadcast_to(jnp.arange(20), (2, 20))
    found, expected, exact = (
        hidden_states(tiny.config, p, tokens, positions) for p in (params, plain(params), tiny.params)
    )
    assert_close(found, expected, 1e-4)
    error = float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))
    assert 1e-4 < error < {"int8": 0.02, "nf4": 0.3}[how]


@pytest.mark.parametrize("how", WAYS)
def test_training_on_a_quantised_base_is_training_on_its_kernels(federation, how):
    params = quantise(federation.model.params, how)
    strategy = fedrouter()
    state = strategy.init(dict.fromkeys(strategy.owners, federation.adapters["main"]), federation.enrolment)
    work, batch = inputs(federation, 1, together=4)
    keys = jax.vmap(jax.random.key)(jnp.arange(len(work.client)))
    group = jax.tree.map(lambda leaf: leaf[0], batch)
    found, expected = (
        federation.update(p, strategy.ask(state, work), group, 1e-2, keys, strategy.phases(1, 5))
        for p in (params, plain(params))
    )
    assert_close(found, expected, 5e-4)


@pytest.mark.parametrize("how", ("none", *WAYS))
def test_a_shift_is_added_to_what_codes_or_kernels_stand_for(tiny, how):
    """However small it is beside the weights."""
    shift = {m: 1e-3 * jax.random.normal(jax.random.key(2), tiny.params["blocks"][m]["kernel"].shape) for m in MODULES}

    def states(params, change):
        blocks = {name: change(name, leaf) if name in MODULES else leaf for name, leaf in params["blocks"].items()}
        tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, 256)
        return hidden_states(tiny.config, {**params, "blocks": blocks}, tokens, jnp.tile(jnp.arange(20), (2, 1)))

    params = quantise(tiny.params, how)
    found = states(params, lambda name, leaf: leaf | {"shift": shift[name]})
    expected = states(plain(params), lambda name, leaf: leaf | {"kernel": leaf["kernel"] + shift[name]})
    assert_close(found, expected, 1e-4)
    assert float(jnp.abs(found - states(params, lambda name, leaf: leaf)).max()) > 1e-3


def test_a_base_is_loaded_as_codes():
    assert "codes" in load_model("tiny", "bfloat16", "nf4").params["blocks"]["up_proj"]
