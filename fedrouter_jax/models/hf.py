"""Hugging Face folders: config.json and safetensors, by a table from tensor names to places in the parameters."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from fedrouter_jax.errors import UserError, one_line
from fedrouter_jax.models.config import DecoderConfig, from_hf
from fedrouter_jax.models.parameters import param_shapes
from fedrouter_jax.types import PyTree

PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_FLOATS = ("F32", "F16", "BF16")
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


class _Place(NamedTuple):
    path: tuple[str, ...]  # in the parameters
    transposed: bool = False  # torch keeps [out, in], we keep [in, out]


_TOP = {
    "model.embed_tokens.weight": _Place(("embedding",)),
    "model.norm.weight": _Place(("norm",)),
    "lm_head.weight": _Place(("head",)),
}
_BLOCK = {
    "input_layernorm.weight": _Place(("attention_norm",)),
    "post_attention_layernorm.weight": _Place(("mlp_norm",)),
    "self_attn.q_norm.weight": _Place(("q_norm",)),
    "self_attn.k_norm.weight": _Place(("k_norm",)),
    **{f"self_attn.{m}.weight": _Place((m, "kernel"), True) for m in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"self_attn.{m}.bias": _Place((m, "bias")) for m in ("q_proj", "k_proj", "v_proj")},
    **{f"mlp.{m}.weight": _Place((m, "kernel"), True) for m in ("gate_proj", "up_proj", "down_proj")},
}


def _get(tree: PyTree, path: tuple[str, ...]) -> Any:
    for step in path:
        tree = tree.get(step) if tree is not None else None
    return tree


def assemble(config: DecoderConfig, dtype: str, names: set[str], read: Callable[[str], np.ndarray]) -> PyTree:
    """Parameters from named tensors, read one at a time into stacked arrays of NumPy, so that memory holds one copy.

    `names` are the tensors there are, spelled as in transformers' Llama; `read` gives one of them. Raises
    `UserError` for a tensor that is missing, unexpected or of the wrong shape.
    """
    try:
        params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), param_shapes(config, dtype))
    except MemoryError as error:
        raise UserError(
            f"the model does not fit in this machine's memory ({one_line(error)}); give --dtype bfloat16 or a smaller "
            "one, or see whether its configuration is whole"
        ) from error
    wanted = {name: (place, _get(params, place.path)) for name, place in _TOP.items()}
    for layer in range(config.layers):
        for name, place in _BLOCK.items():
            stack = _get(params["blocks"], place.path)
            wanted[f"model.layers.{layer}.{name}"] = (place, None if stack is None else stack[layer])
    wanted = {name: entry for name, entry in wanted.items() if entry[1] is not None}
    missing = sorted(set(wanted) - names)
    # A tied model may store its head as well.
    unexpected = sorted(n for n in names - set(wanted) - {"lm_head.weight"} if not _IGNORED.fullmatch(n))
    if missing or unexpected:
        what, first, count = ("lack", missing, len(missing)) if missing else ("hold", unexpected, len(unexpected))
        reason = "that its configuration calls for" if missing else "that its configuration does not account for"
        raise UserError(f"the weights {what} the tensor {first[0]} ({count} such) {reason}; expected a matching pair")
    for name, (place, target) in wanted.items():
        found = read(name)
        found = found.T if place.transposed else found
        if found.shape != target.shape:
            shapes = [list(s[::-1] if place.transposed else s) for s in (found.shape, target.shape)]
            raise UserError(f"the tensor {name} has shape {shapes[0]}; expected {shapes[1]} by its configuration")
        target[...] = found
    both = config.tied and "lm_head.weight" in names
    if both and not np.array_equal(read("lm_head.weight"), read("model.embed_tokens.weight")):
        raise UserError(
            "the configuration ties the head to the embedding, but the weights hold two different ones; expected equal "
            "ones: set tie_word_embeddings false in config.json to keep both"
        )
    return params


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors in here say which file or folder they are about."""
    try:
        yield
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error.__cause__


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; expected a Hugging Face folder with that file in it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds JSON of type {type(found).__name__}; expected an object")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `model.safetensors`, or the shards that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():  # as in transformers, whatever an index beside it says
        return [single]
    if not index.exists():
        raise UserError(f"{folder} holds no model.safetensors and no index of shards; expected safetensors weights")
    shards = _json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} holds no weight_map; expected an index of safetensors shards")
    files = [folder / Path(name).name for name in sorted(set(map(str, shards.values())))]
    for path in files:
        if not path.exists():
            raise UserError(
                f"{path} does not exist, but {index.name} names it; expected every shard: download it again"
            )
    return files


def description_files(folder: Path) -> list[Path]:
    """What a folder has to say of a model's configuration and tokenizer."""
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    names += ["tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"]
    return [folder / name for name in names if (folder / name).exists()]


def load_folder(folder: Path, dtype: str) -> tuple[DecoderConfig, PyTree]:
    """Configuration and parameters of a Hugging Face folder; floats of any width become `dtype`.

    Raises `UserError` for a folder that lacks or garbles what it must hold.
    """
    config = folder_config(folder)
    where = {}
    for path in weight_files(folder):
        try:
            handle = safe_open(path, framework="numpy")
        except (SafetensorError, OSError, struct.error) as error:
            raise UserError(f"{path} is truncated or no safetensors file ({error}); download it again") from error
        where |= dict.fromkeys(handle.keys(), handle)

    def read(name: str) -> np.ndarray:
        kind = where[name].get_slice(name).get_dtype()
        if kind not in _FLOATS:
            raise UserError(f"the tensor {name} is of type {kind}; expected one of {', '.join(_FLOATS)}")
        return where[name].get_tensor(name)

    with named(folder):
        return config, assemble(config, dtype, set(where), read)


def folder_config(folder: Path) -> DecoderConfig:
    """The configuration alone."""
    with named(folder):
        return from_hf(_json(folder / "config.json"))


def download(name: str, patterns: Sequence[str] = PATTERNS) -> Path:
    """The folder of a hub id, fetched into (or found in) the Hugging Face cache. Never fetches pickled weights."""
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["consolidated*", "*/*"]))
    except Exception as error:  # the hub's HTTP library changes between versions, and each has errors of its own
        what = {HFValidationError: "is no valid hub id", LocalEntryNotFoundError: "is not cached, nor the hub reached"}
        found = next((text for kind, text in what.items() if isinstance(error, kind)), "was refused by the hub")
        raise UserError(
            f"the model {name!r} is no folder in {Path.cwd()}, no .gguf file and {found}; expected 'smollm2-135m', "
            f"'tiny', a path or a hub id ({type(error).__name__}: {one_line(error)})"
        ) from error
