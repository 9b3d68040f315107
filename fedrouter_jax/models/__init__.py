"""The base model: one decoder, loaded from Hugging Face safetensors or GGUF, used through plain functions."""

from fedrouter_jax.models.cache import PAGE, Cache, empty_cache, reuse_rows, select_rows
from fedrouter_jax.models.config import MODULES, DecoderConfig, Llama3Scaling, module_shapes
from fedrouter_jax.models.decoder import (
    LOOP,
    Blocks,
    decode_step,
    first_blocks,
    hidden_states,
    logits,
    prefill,
)
from fedrouter_jax.models.load import Model, load_model, model_config, on_device
from fedrouter_jax.models.matrices import values
from fedrouter_jax.models.parameters import init_params
from fedrouter_jax.models.tiny import tiny_params, tiny_tokenizer

__all__ = [
    "LOOP",
    "MODULES",
    "PAGE",
    "Blocks",
    "Cache",
    "DecoderConfig",
    "Llama3Scaling",
    "Model",
    "decode_step",
    "empty_cache",
    "first_blocks",
    "hidden_states",
    "init_params",
    "load_model",
    "logits",
    "model_config",
    "module_shapes",
    "on_device",
    "prefill",
    "reuse_rows",
    "select_rows",
    "tiny_params",
    "tiny_tokenizer",
    "values",
]
