"""GGUF against its own writer and transformers, and one clear line for bad files."""

import dataclasses
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from torch_models import LLAMA3, our_logits, torch_logits, torch_model

from fedrouter_jax import models
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import config as configs
from fedrouter_jax.models import gguf, load


def write_gguf(path, model, family="llama", **metadata):
    """A GGUF file as llama.cpp's converter writes it: rows of q and k permuted for llama, matrices in Q8_0.

    Returns the parameters as the file holds them, under the names of transformers.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    c, names = model.config, get_tensor_name_map(getattr(MODEL_ARCH, family.upper()), model.config.num_hidden_layers)
    writer = GGUFWriter(path, family)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    if c.rope_parameters["rope_type"] == "llama3":
        slowed = model.model.rotary_emb.inv_freq.numpy()
        even = np.arange(0, 2 * len(slowed), 2, dtype=np.float32) / (2 * len(slowed))
        writer.add_tensor("rope_freqs.weight", c.rope_parameters["rope_theta"] ** -even / slowed)
    if getattr(c, "head_dim", None):
        writer.add_key_length(c.head_dim)
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    held = {}
    for name, leaf in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        array, kind = leaf.numpy(), GGMLQuantizationType.F32
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = GGMLQuantizationType.Q8_0
            array = dequantize(quantize(array, kind), kind)
        held[name] = array
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        raw = array if kind == GGMLQuantizationType.F32 else quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        ("Llama", "llama", {"tie_word_embeddings": True}),
        ("Llama", "llama", {}),
        ("Llama", "llama", {"rope_parameters": LLAMA3}),
        ("Qwen2", "qwen2", {}),
        ("Qwen3", "qwen3", {"head_dim": 16}),
    ],
)
def test_gguf_logits_equal_transformers(family, name, options, tmp_path):
    import torch

    model = torch_model(family, options)
    held = write_gguf(tmp_path / "m.gguf", model, name)
    model.load_state_dict({k: torch.tensor(v) for k, v in held.items()}, strict=False)
    config, params = gguf.load_gguf(tmp_path / "m.gguf", "float32")
    tokens = np.random.default_rng(0).integers(0, 96, (2, 12))
    np.testing.assert_allclose(our_logits(config, params, tokens), torch_logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_gguf_metadata_may_say_more_or_less(tmp_path, monkeypatch):
    """What is left out is as in llama.cpp; a window and a vocabulary's size, as converters write them, are taken."""
    write_gguf(tmp_path / "m.gguf", torch_model("Llama", {"rope_parameters": {"rope_theta": 500.0}}))
    monkeypatch.setattr(load, "_gguf_tokenizer", lambda path, fingerprint: models.tiny_tokenizer())
    assert models.load_model(str(tmp_path / "m.gguf")).base_name == "m"
    whole = gguf._metadata(gguf._open(tmp_path / "m.gguf"))
    named = configs.from_gguf(whole)
    assert (named.rope_theta, named.kv_heads, named.vocab_size, named.sliding_window) == (500.0, 2, 257, None)
    assert (named.max_positions, named.norm_eps) == (128, pytest.approx(1e-6))
    bare = {k: v for k, v in whole.items() if k not in ("llama.rope.freq_base", "llama.attention.head_count_kv")}
    more = configs.from_gguf(bare | {"llama.attention.sliding_window": 7, "llama.vocab_size": 300})
    assert more == dataclasses.replace(named, rope_theta=1e4, kv_heads=4, vocab_size=300, sliding_window=7)


def test_what_is_not_asked_of_a_gguf_file_may_be_garbled(tmp_path):
    path, model = tmp_path / "m.gguf", torch_model("Llama", {})
    write_gguf(path, model, general__name="cafe")
    path.write_bytes(path.read_bytes().replace(b"cafe", b"caf\xe9"))
    assert gguf.gguf_config(path).layers == model.config.num_hidden_layers


def test_gguf_errors(tmp_path, monkeypatch):
    model, path = torch_model("Llama", {}), tmp_path / "m.gguf"
    write_gguf(path, model)
    whole = path.read_bytes()
    for cut in (10, 700, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="truncated or no GGUF file"):
            gguf.load_gguf(path, "float32")
    endless = whole.replace(*(struct.pack("<IIQ", 9, 8, count) for count in (model.config.vocab_size, 2**40)))
    path.write_bytes(endless)
    with pytest.raises(UserError, match="truncated or no GGUF file .it ends early"):
        gguf.load_gguf(path, "float32")
    path.write_bytes(b"not a model")
    with pytest.raises(UserError, match="truncated or no GGUF file"):
        gguf.load_gguf(path, "float32")
    for name in ("absent.gguf", "ABSENT.GGUF"):
        with pytest.raises(UserError, match=f"{name} does not exist"):
            models.load_model(str(tmp_path / name))
    write_gguf(path, model, llama__rope__scaling__type="yarn")
    with pytest.raises(UserError, match="scales the llama rope frequencies"):
        gguf.load_gguf(path, "float32")
    for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear"):
        metadata = {**gguf._metadata(gguf._open(path)), "llama.rope.scaling.type": "none"}
        assert configs.from_gguf(metadata | {key: 1.0}).rope_scaling is None
        with pytest.raises(UserError, match="scales the llama rope frequencies"):
            configs.from_gguf(metadata | {key: 4.0})
    with pytest.raises(UserError, match="garbles a field of the llama family: cannot convert float infinity"):
        configs.from_gguf(metadata | {"llama.block_count": float("inf")})
    for slowed in ((1.0,) * 3, (1.0,) * 5, (1.0, 2.0, 0.0, 4.0), (1.0, 2.0, float("nan"), 4.0)):
        with pytest.raises(UserError, match="rope_freqs.weight is not 4 finite numbers above 0"):
            configs.from_gguf(metadata | {"rope_freqs": slowed})
    with pytest.raises(UserError, match="is a mixture of experts; expected a dense decoder"):
        configs.from_gguf(metadata | {"llama.expert_count": 8})
    with pytest.raises(UserError, match="rope.dimension_count is not the head dimension 8"):
        configs.from_gguf(metadata | {"llama.rope.dimension_count": 4})
    heads = dict.fromkeys(("llama.attention.head_count", "llama.attention.head_count_kv"), 3)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"has shape \[32, 32\]; expected \[24, 32\]"):
        patch.setattr(gguf, "_metadata", lambda reader: metadata | heads)
        gguf.load_gguf(path, "float32")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="token_embd.weight is of type Q8_0, not supp"):
        patch.setattr(gguf, "_metadata", lambda reader: metadata)
        patch.setattr(gguf, "dequantize", lambda data, kind: (_ for _ in ()).throw(NotImplementedError))
        gguf.load_gguf(path, "float32")
    writer = GGUFWriter(path, "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="'gemma'; expected one of llama, qwen2, qwen3"):
        gguf.load_gguf(path, "float32")


@pytest.mark.parametrize("kind, said, expected", [("llama", None, True), ("llama", False, False), ("gpt2", None, None)])
def test_a_sentencepiece_vocabulary_begins_with_its_first_token_unless_the_file_denies_it(
    kind, said, expected, monkeypatch
):
    values = {"general.architecture": "llama", "tokenizer.ggml.model": kind, "tokenizer.ggml.tokens": ["<s>"]}
    values |= {} if said is None else {"tokenizer.ggml.add_bos_token": said}
    fields = {name: SimpleNamespace(contents=lambda value=value: value) for name, value in values.items()}
    mapping = {
        "tokenizer": {"ggml.model": "tokenizer_type", "ggml.tokens": "tokens"},
        "tokenizer_config": {"ggml.add_bos_token": "add_bos_token"},
    }
    monkeypatch.setattr(gguf, "_open", lambda path: SimpleNamespace(fields=fields))
    monkeypatch.setattr(gguf, "_converter", lambda: (mapping, lambda *_: ("backend", {})))
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast", lambda **options: options)
    assert gguf.load_tokenizer(Path("any.gguf")).get("add_bos_token") is expected
