"""GGUF files: metadata to configuration, quantised tensors to parameters.

`GGUFReader` parses and `gguf.quants.dequantize` decodes (both of the gguf package). llama.cpp's converter stores the
rows of q and k of the llama architecture in an order that suits interleaved rotary pairs; this undoes it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from fedrouter_jax.errors import UserError, one_line
from fedrouter_jax.models.config import DecoderConfig, from_gguf
from fedrouter_jax.models.hf import assemble, named
from fedrouter_jax.types import PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ROPE = "rope_freqs.weight"  # what Llama 3.1 and later divide their rotary frequencies by
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _BLOCK:
        return _TOP.get(name, name)
    return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.{match[3]}"


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """From interleaved pairs (0, 1), (2, 3), ... inside each head to the half-split order of transformers."""
    if len(rows) % (2 * heads):  # not so many heads: `assemble` says that the shape is wrong
        return rows
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


class _Reader(GGUFReader):
    """The package's reader, which takes what lies behind the end of a file for arrays of nothing, however long."""

    def _get(self, offset, dtype, count=1, override_order=None):
        found = super()._get(offset, dtype, count, override_order)
        if len(found) < int(count):
            raise IndexError("it ends early")
        return found


def _open(path: Path) -> GGUFReader:
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a GGUF file")
    try:
        return _Reader(path)
    except (ValueError, IndexError, KeyError, OSError, struct.error, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is truncated or no GGUF file ({error}); download it again") from error


def _metadata(reader: GGUFReader) -> dict[str, Any]:
    keep = ("general.architecture", "tokenizer.ggml.tokens")
    name = reader.fields["general.architecture"].contents() if "general.architecture" in reader.fields else None
    metadata = {
        key: len(field.data) * [""] if key == keep[1] else field.contents()
        for key, field in reader.fields.items()
        if key.startswith((keep[0], f"{name}.", keep[1]))
    }
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    slowed = tuple(map(float, np.ravel(tensors[_ROPE]))) if _ROPE in tensors else None
    return {**metadata, "tensors": set(tensors), "rope_freqs": slowed}


def gguf_config(path: Path) -> DecoderConfig:
    """The configuration alone; errors as `load_gguf`."""
    with named(path):
        return from_gguf(_metadata(_open(path)))


def load_gguf(path: Path, dtype: str) -> tuple[DecoderConfig, PyTree]:
    """Configuration and parameters of a GGUF file of the llama, qwen2 or qwen3 architecture.

    Raises `UserError` for a file that is missing, truncated, not GGUF, or of a kind not supported.
    """
    reader = _open(path)
    tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors if tensor.name != _ROPE}
    metadata = _metadata(reader)
    with named(path):
        config = from_gguf(metadata)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            found = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(f"the tensor {tensor.name} is of type {tensor.tensor_type.name}, not supported") from error
        if metadata["general.architecture"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            found = _unpermute(found, config.heads if name.endswith("q_proj.weight") else config.kv_heads)
        return found

    with named(path):
        return config, assemble(config, dtype, set(tensors), read)


def _converter() -> tuple[dict, Callable]:
    """transformers' names of a tokenizer's parts and its conversion; what they are called moved with 5.19."""
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping as found

        return found.GGUF_TOKENIZER_MAPPING, found.convert_gguf_tokenizer
    except (ImportError, AttributeError):
        from transformers.integrations.ggml import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

        return GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer inside a GGUF file. Takes many seconds.

    The conversion is transformers'. Its own way to it, `AutoTokenizer.from_pretrained(gguf_file=...)`, imports torch
    (5.17 to 5.24), and this project runs without; so the file is read here, and the two are tested to agree.
    Raises `UserError` where there is no tokenizer, or none that transformers can convert.
    """
    from transformers import PreTrainedTokenizerFast  # half a second, which no other command should wait for

    try:
        mapping, convert = _converter()
    except ImportError as error:
        raise UserError(f"this transformers converts no GGUF tokenizers ({error}); install 5.17 to 5.24") from error
    fields = _open(path).fields
    try:
        parts, options = (
            {name: fields[f"tokenizer.{key}"].contents() for key, name in named.items() if f"tokenizer.{key}" in fields}
            for named in (mapping["tokenizer"], mapping["tokenizer_config"])
        )
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            number = fields.get(f"tokenizer.ggml.{key}_token_id")
            options[f"{role}_token"] = None if number is None else parts["tokens"][number.contents()]
        if parts["tokenizer_type"] == "llama":  # a SentencePiece vocabulary starts with BOS unless the file denies it
            options.setdefault("add_bos_token", True)
        backend, more = convert(fields["general.architecture"].contents(), parts)
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"{path.name} holds no tokenizer that can be read: {one_line(error)}") from error
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**more, **options})  # 5.17 says some things twice
