"""What distinguishes one decoder from another, read from a Hugging Face `config.json` or from GGUF metadata.

The families share one block: RMSNorm (arXiv 1910.07467), rotary positions (arXiv 2104.09864), grouped-query
attention (arXiv 2305.13245) and a SwiGLU MLP (arXiv 2002.05202). They differ only in the fields below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fedrouter_jax.errors import UserError

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Llama3Scaling:
    """Rotary frequencies of Llama 3.1 and later: long wavelengths slowed by `factor`, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class DecoderConfig:
    """Static description of a decoder. Hashable, so it may be a static argument of `jax.jit`."""

    vocab_size: int
    width: int
    """Size of the residual stream."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Llama3Scaling | tuple[float, ...] | None = None
    """How rotary frequencies are slowed: by a rule, or each by a number of its own, as GGUF files have it."""
    max_positions: int = 2048
    tied: bool = True
    """The head is the embedding, transposed."""
    qkv_bias: bool = False
    """Query, key and value projections have a bias (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm over the head dimension of queries and keys (Qwen3)."""
    sliding_window: int | None = None
    """A token sees this many last tokens, itself included; None sees all earlier ones."""


def module_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """`{module: (in, out)}` of the linear modules of a block, in the order of `MODULES`."""
    queries, values = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "q_proj": (config.width, queries),
        "k_proj": (config.width, values),
        "v_proj": (config.width, values),
        "o_proj": (queries, config.width),
        "gate_proj": (config.width, config.mlp_width),
        "up_proj": (config.width, config.mlp_width),
        "down_proj": (config.mlp_width, config.width),
    }


_KINDS = ("full_attention", "sliding_attention")  # of a layer, as transformers calls them


def _no_window(_: dict[str, Any]) -> None:
    return None


def _mistral_window(found: dict[str, Any]) -> int | None:
    return found.get("sliding_window", 4096)


def _qwen_window(found: dict[str, Any]) -> int | None:
    """Qwen's window needs `use_sliding_window`; it holds where `layer_types` says, or from `max_window_layers` on."""
    if not found.get("use_sliding_window", False):
        return None
    layers, first = int(found["num_hidden_layers"]), found.get("max_window_layers", 28)
    kinds = found.get("layer_types") or [_KINDS[layer >= first] for layer in range(layers)]
    if len(kinds) != layers or not set(kinds) <= set(_KINDS):
        raise ValueError(f"layer_types is {kinds}; expected {' or '.join(_KINDS)} for each of {layers} layers")
    full = kinds.count(_KINDS[0])
    if 0 < full < layers:
        raise UserError(
            f"config.json mixes {full} layers of full attention with {layers - full} of sliding window; expected one "
            "kind for all layers: choose a model with use_sliding_window false"
        )
    return found.get("sliding_window", 4096) if full == 0 else None


@dataclass(frozen=True)
class _Family:
    qkv_bias: bool = False
    qk_norm: bool = False
    window: Callable[[dict[str, Any]], int | None] = _no_window


FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(window=_mistral_window),
    "qwen2": _Family(qkv_bias=True, window=_qwen_window),
    "qwen3": _Family(qk_norm=True, window=_qwen_window),
}


# llama.cpp has no architecture of its own for Mistral: it is written as llama.
GGUF_FAMILIES = ("llama", "qwen2", "qwen3")


def _family(name: str | None, supported: Iterable[str], where: str) -> _Family:
    if name not in supported:
        raise UserError(f"{where} names the model family {name!r}; expected one of {', '.join(supported)}")
    return FAMILIES[name]


_LARGEST = 2**31 - 1  # of any size: indices are int32


def _checked(config: DecoderConfig) -> DecoderConfig:
    sizes = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width", "max_positions")
    found = {name: getattr(config, name) for name in sizes}
    if config.sliding_window is not None:
        found["sliding_window"] = config.sliding_window
    odd = next((name for name, size in found.items() if not 1 <= size <= _LARGEST), None)
    if odd:
        raise ValueError(f"{odd} is {found[odd]:.12g}; expected 1 to {_LARGEST}")
    if not (0 < config.rope_theta < math.inf and 0 <= config.norm_eps < math.inf):
        raise ValueError(
            f"rope theta is {config.rope_theta} and the norms' epsilon {config.norm_eps}; expected a finite number "
            "above 0, and one not below 0"
        )
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise ValueError(
            f"{config.heads} heads of {config.head_dim} numbers share {config.kv_heads} of keys and values; expected a "
            "divisor, and an even head"
        )
    return config


def _window(found: Any) -> int | None:
    return int(found) if found else None


def _rope(found: dict[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = {**(found.get("rope_scaling") or {}), **(found.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta", found.get("rope_theta") or 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", found.get("partial_rotary_factor", 1.0))
    if kind not in ("default", "llama3") or partial != 1.0:
        what = f"rope type {kind!r}" if partial == 1.0 else f"partial_rotary_factor {partial}"
        raise UserError(f"config.json asks for {what}; expected rope type 'default' or 'llama3' over the whole head")
    if kind == "default":
        return theta, None
    try:
        name = "original_max_position_embeddings"
        scaling = Llama3Scaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_positions=int(rope[name] if name in rope else found[name]),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"config.json asks for rope type 'llama3' without its parameter {error}") from error
    return theta, scaling


def from_hf(found: dict[str, Any]) -> DecoderConfig:
    """The decoder that a parsed Hugging Face `config.json` describes.

    Raises `UserError` for a family, an activation, a bias, a rope type or a mix of attention kinds not supported.
    """
    family = _family(str(found.get("model_type")), FAMILIES, "config.json")
    for flag in ("attention_bias", "mlp_bias"):
        if found.get(flag):
            raise UserError(f"config.json sets {flag} true; expected false: this decoder has no such biases")
    if found.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise UserError(f"config.json names the activation {found['hidden_act']!r}; expected 'silu'")
    if found.get("quantization_config"):
        raise UserError("config.json describes quantised weights; expected plain float32, float16 or bfloat16 weights")
    try:
        theta, scaling = _rope(found)
        heads = int(found["num_attention_heads"])
        config = DecoderConfig(
            vocab_size=int(found["vocab_size"]),
            width=int(found["hidden_size"]),
            layers=int(found["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(found.get("num_key_value_heads") or heads),
            head_dim=int(found.get("head_dim") or found["hidden_size"] // heads),
            mlp_width=int(found["intermediate_size"]),
            norm_eps=float(found.get("rms_norm_eps", 1e-6)),  # as transformers, where the config does not say
            rope_theta=theta,
            rope_scaling=scaling,
            max_positions=int(found.get("max_position_embeddings", 2048)),
            tied=bool(found.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            sliding_window=_window(family.window(found)),
        )
        return _checked(config)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"config.json lacks or garbles a field of the {found['model_type']} family: {error}") from error


def from_gguf(metadata: dict[str, Any]) -> DecoderConfig:
    """The decoder that GGUF metadata describes: `{key: value}`, with the tensor names under the key "tensors".

    What is in the tensor "rope_freqs.weight" of Llama 3.1 and later, where there is one, is under the key "rope_freqs".
    Raises `UserError` for an architecture or a rope scaling not supported.
    """
    name = metadata.get("general.architecture")
    family = _family(name, GGUF_FAMILIES, "GGUF key general.architecture")
    factors = (f"{name}.rope.{key}" for key in ("scaling.factor", "scale_linear"))  # of files that name no type
    scaled = metadata.get(f"{name}.rope.scaling.type", "none") != "none" or any(
        metadata.get(key, 0) not in (0, 1) for key in factors
    )
    if scaled:
        raise UserError(
            f"the GGUF file scales the {name} rope frequencies by a rule; expected none, or a tensor rope_freqs: load "
            "the safetensors folder"
        )
    if f"{name}.expert_count" in metadata:
        raise UserError("the GGUF file is a mixture of experts; expected a dense decoder")
    try:
        width, heads = int(metadata[f"{name}.embedding_length"]), int(metadata[f"{name}.attention.head_count"])
        vocabulary = metadata.get(f"{name}.vocab_size") or len(metadata["tokenizer.ggml.tokens"])
        head_dim = int(metadata.get(f"{name}.attention.key_length", width // heads))
        if int(metadata.get(f"{name}.rope.dimension_count", head_dim)) != head_dim:
            raise ValueError(f"rope.dimension_count is not the head dimension {head_dim}")
        slowed = metadata.get("rope_freqs")
        if slowed is not None and (len(slowed) != head_dim // 2 or not all(0 < by < math.inf for by in slowed)):
            raise ValueError(f"rope_freqs.weight is not {head_dim // 2} finite numbers above 0")
        config = DecoderConfig(
            vocab_size=int(vocabulary),
            width=width,
            layers=int(metadata[f"{name}.block_count"]),
            heads=heads,
            kv_heads=int(metadata.get(f"{name}.attention.head_count_kv", heads)),
            head_dim=head_dim,
            mlp_width=int(metadata[f"{name}.feed_forward_length"]),
            norm_eps=float(metadata[f"{name}.attention.layer_norm_rms_epsilon"]),
            rope_theta=float(metadata.get(f"{name}.rope.freq_base", 10000.0)),
            rope_scaling=slowed,
            max_positions=int(metadata[f"{name}.context_length"]),
            tied="output.weight" not in metadata["tensors"],
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            sliding_window=_window(metadata.get(f"{name}.attention.sliding_window")),
        )
        return _checked(config)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"the GGUF metadata lacks or garbles a field of the {name} family: {error}") from error
