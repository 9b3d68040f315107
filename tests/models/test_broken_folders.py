"""One clear line for a Hugging Face folder that does not fit or is not whole."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_models import LLAMA3, edit_config
from transformers import AutoTokenizer

from fedrouter_jax import models
from fedrouter_jax.errors import UserError

CONFIG_ERRORS = {
    "too large": (
        {"vocab_size": 2**31 - 1, "hidden_size": 2**20, "head_dim": 8},
        "does not fit in this machine's memory",
    ),
    "family": ({"model_type": "gpt2"}, "'gpt2'; expected one of llama, mistral, qwen2, qwen3"),
    "rope": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'yarn'"),
    "llama3 without factor": ({"rope_parameters": {"rope_type": "llama3"}}, "without its parameter 'factor'"),
    "llama3 without positions": (
        {"rope_parameters": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}},
        "without its parameter 'original_max_position_embeddings'",
    ),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "partial by rope": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    "bias": ({"attention_bias": True}, "attention_bias true"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias true"),
    "activation": ({"hidden_act": "gelu"}, "activation 'gelu'"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
    "no width": ({"hidden_size": None}, "lacks or garbles a field of the llama family"),
    "no heads": ({"num_attention_heads": 0}, "lacks or garbles a field of the llama family"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "share 3 of keys and values"),
    "odd heads": ({"head_dim": 7}, "4 heads of 7 numbers share 2 .*an even head"),
    "no window": ({"model_type": "mistral", "sliding_window": -5}, "sliding_window is -5; expected 1 to 2147483647"),
    "endless positions": ({"max_position_embeddings": 1e999}, "lacks or garbles .*: cannot convert float infinity"),
    "endless rope": ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 1e999}}, "float infinity"),
    "no layers": ({"num_hidden_layers": -1}, "layers is -1; expected 1 to 2147483647"),
    "too wide": ({"hidden_size": 1e300}, r"width is 1e\+300; expected 1 to 2147483647"),
    "endless theta": (
        {"rope_parameters": {"rope_theta": 1e999}},
        "rope theta is inf .*; expected a finite number",
    ),
    "theta of zero": ({"rope_parameters": {"rope_theta": 0}}, "rope theta is 0.0 .*; expected a finite number above"),
    "epsilon not a number": ({"rms_norm_eps": float("nan")}, "epsilon nan; expected"),
    "rope a list": ({"rope_parameters": None, "rope_scaling": ["x"]}, "lacks or garbles"),
    "theta a word": ({"rope_parameters": {"rope_theta": "x"}}, "lacks or garbles"),
    "family a list": ({"model_type": ["llama"]}, "expected one of llama, mistral, qwen2, qwen3"),
    "mixed layers": (
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
        "mixes 1 layers of full attention with 2 of sliding window",
    ),
    "layer types mixed": (
        {
            "model_type": "qwen3",
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "mixes 1 layers of full attention with 2 of sliding window",
    ),
    "layer types unknown": (
        {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["linear_attention"] * 3},
        "lacks or garbles a field of the qwen3 family: layer_types",
    ),
    "too many layers": ({"num_hidden_layers": 4}, r"lack the tensor model.layers.3.input_layernorm.weight \(9 such\)"),
    "too few layers": ({"num_hidden_layers": 2}, r"hold the tensor model.layers.2.*does not account for"),
    "untied": ({"tie_word_embeddings": False}, "lack the tensor lm_head.weight"),
    "shape": ({"intermediate_size": 40}, r"mlp.gate_proj.weight has shape \[48, 32\]; expected \[40, 32\]"),
}


@pytest.mark.parametrize("kind", CONFIG_ERRORS)
def test_a_configuration_that_does_not_fit(kind, broken):
    changes, message = CONFIG_ERRORS[kind]
    edit_config(broken, **changes)
    with pytest.raises(UserError, match=message) as caught:
        models.load_model(str(broken))
    assert "\n" not in str(caught.value) and str(broken) in str(caught.value)


def break_weights(broken, kind):
    weights = broken / "model.safetensors"
    if kind == "no config":
        (broken / "config.json").unlink()
    elif kind == "config no JSON":
        (broken / "config.json").write_text("{")
    elif kind == "config a list":
        (broken / "config.json").write_text("[]")
    elif kind == "no weights":
        weights.rename(broken / "pytorch_model.bin")
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "missing tensor":
        save_file({k: v for k, v in load_file(weights).items() if k != "model.norm.weight"}, weights)
    elif kind == "transposed tensor":
        turned = {k: v.T.copy() if "up_proj" in k else v for k, v in load_file(weights).items()}
        save_file(turned, weights)
    elif kind == "integers":
        save_file({k: v.astype(np.int32) for k, v in load_file(weights).items()}, weights)
    elif kind == "not finite":
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
        save_file(tensors, weights)
    elif kind == "another head":
        tensors = load_file(weights)
        edit_config(broken, tie_word_embeddings=True)
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"][::-1].copy()}, weights)
    elif kind == "missing shard":
        weights.unlink()
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "empty index":
        weights.unlink()
        (broken / "model.safetensors.index.json").write_text("{}")
    elif kind == "no end token":
        path = broken / "tokenizer_config.json"
        told = json.loads(path.read_text())
        path.write_text(json.dumps({key: told[key] for key in told if key not in ("eos_token", "pad_token")}))
    elif kind == "end token too large":
        tokenizer = AutoTokenizer.from_pretrained(broken)
        tokenizer.add_special_tokens({"eos_token": "<|the very end|>"})
        tokenizer.save_pretrained(broken)
    elif kind == "tokenizer of another kind":
        (broken / "tokenizer.json").write_text('{"model": {"type": "Telepathy"}}')
    elif kind == "no tokenizer":
        for path in broken.glob("tokenizer*"):
            path.unlink()


FILE_ERRORS = {
    "no config": "config.json does not exist",
    "config no JSON": "config.json cannot be read as JSON",
    "config a list": "config.json holds JSON of type list",
    "no weights": "holds no model.safetensors",
    "truncated": "model.safetensors is truncated",
    "empty": "model.safetensors is truncated",
    "missing tensor": "lack the tensor model.norm.weight",
    "transposed tensor": r"up_proj.weight has shape \[32, 48\]; expected \[48, 32\]",
    "integers": "is of type I32; expected one of F32",
    "not finite": r"has weights that are no finite numbers \(in blocks.down_proj.kernel\)",
    "another head": "ties the head to the embedding, but the weights hold two different ones",
    "missing shard": "model-00001-of-00002.safetensors does not exist, but",
    "empty index": "holds no weight_map",
    "no tokenizer": "has no tokenizer that can be read",
    "no end token": "has no end token",
    "end token too large": "the end token of .* is number .*, but the model embeds 257",
    "tokenizer of another kind": "has no tokenizer that can be read",
}


@pytest.mark.parametrize("kind", FILE_ERRORS)
def test_a_folder_that_is_not_whole(kind, broken):
    break_weights(broken, kind)
    with pytest.raises(UserError, match=FILE_ERRORS[kind]) as caught:
        models.load_model(str(broken))
    assert "\n" not in str(caught.value)
