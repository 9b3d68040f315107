"""PEFT and transformers on torch as oracles: the same adapter, loss, gradients, training and answers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, read_adapter, tiny_llama, word_rows
from safetensors.numpy import load_file

from fedrouter_jax import client, likelihood, lora, peft_io
from fedrouter_jax.data import packing, schedule, tokens
from fedrouter_jax.generate import generate
from fedrouter_jax.models import hf, hidden_states, load_model, logits, tiny_tokenizer
from fedrouter_jax.routing import Router
from fedrouter_jax.types import LoRA, Work, one_phase

torch = pytest.importorskip("torch", reason="torch is a development dependency: pip install -r requirements-dev.txt")
peft = pytest.importorskip("peft", reason="peft is a development dependency: pip install -r requirements-dev.txt")
transformers = pytest.importorskip("transformers")

CONFIG = lora.LoRAConfig(rank=4, alpha=8.0, dropout=0.0, targets=("down_proj", "k_proj", "q_proj", "v_proj"))
LOCAL = client.LocalConfig(steps=20, batch=4, learning_rate=5e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random Llama: its folder, and (config, params) here."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(folder, seed=0)
    return folder, *hf.load_folder(folder, "float32")


@pytest.fixture(scope="module")
def adapter(base):
    """A random adapter with both halves nonzero."""
    _, decoder, _ = base
    fresh = lora.init(jax.random.key(3), decoder, CONFIG)
    keys = iter(jax.random.split(jax.random.key(4), len(fresh.b)))
    return fresh._replace(b={m: 0.1 * jax.random.normal(next(keys), b.shape) for m, b in fresh.b.items()})


@pytest.fixture(scope="module")
def rows():
    """Encoded rows of uneven lengths; the last answers with token 0, a token like any other."""
    return [*word_rows(np.random.default_rng(0), 23), tokens.Tokens([70, 71, 72], [0, 0, 73], False)]


def in_torch(folder, adapter_folder, trainable=False):
    """The base model with an exported adapter, loaded by PEFT."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, str(adapter_folder), is_trainable=trainable).eval()


def torch_loss(model, rows):
    """The mean cross-entropy over response tokens of a right-padded batch."""
    longest = max(row.length for row in rows)
    ids, labels, mask = np.zeros((3, len(rows), longest), np.int64)
    labels -= 100
    for i, row in enumerate(rows):
        ids[i, : row.length] = row.prompt + row.response
        labels[i, len(row.prompt) : row.length] = row.response
        mask[i, : row.length] = 1
    return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss


def torch_grads(model):
    """Gradients as `LoRA` leaves, stacked over layers."""
    named = {name.replace(".default", ""): p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}

    def leaf(module, side):
        names = [peft_io.tensor_name(layer, module, side) for layer in range(2)]
        return np.stack([named[name].T for name in names])

    return LoRA({m: leaf(m, "A") for m in CONFIG.targets}, {m: leaf(m, "B") for m in CONFIG.targets})


def lane(rows, steps, batch):
    work = Work(np.array([0]), np.array([0]), np.array([1.0], np.float32))
    packed = schedule.batches(work, [[rows]], 1, steps, batch, 256, 64, 0)
    order = schedule.draw(len(rows), steps * batch, np.random.default_rng([0, 1, 0, 0]))
    drawn = [[rows[i] for i in order[step * batch :][:batch]] for step in range(steps)]
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), packed), drawn


def test_loss_and_gradients_equal_peft(base, adapter, rows, tmp_path):
    folder, decoder, params = base
    peft_io.write_adapter(tmp_path, adapter, CONFIG, str(folder))
    model = in_torch(folder, tmp_path, trainable=True)
    expected = torch_loss(model, rows[:6])
    expected.backward()
    packs = packing.batch([rows[:6]], 6, 128, 64)
    assert int(packs.count) > 1  # several packs, so that accumulation over packs is part of the test
    responses = sum(len(row.response) for row in rows[:6])

    keys = jax.random.split(jax.random.key(0), 1)

    def mean_loss(adapters):
        one_lane = jax.tree.map(lambda leaf: leaf[None], adapters)
        each = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], packs.rows) for i in range(int(packs.count))]
        per_pack = [
            client.response_losses(decoder, CONFIG, params, one_lane, {"main": 1.0}, pack, keys) for pack in each
        ]
        return sum(losses[0] for losses in per_pack) / responses

    loss, grads = jax.value_and_grad(mean_loss)({"main": adapter})
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    for found, other in zip(jax.tree.leaves(grads["main"]), jax.tree.leaves(torch_grads(model)), strict=True):
        assert np.linalg.norm(found - other) <= 1e-5 * np.linalg.norm(other)


def test_each_rows_loss_equals_torchs_under_its_own_adapter(base, adapter, rows, tmp_path, monkeypatch):
    """Three adapters, one of them empty, and more rows than go together."""
    folder, decoder, params = base
    other = jax.tree.map(lambda leaf: -2 * leaf, adapter)
    empty = jax.tree.map(jnp.zeros_like, adapter)
    models = []
    for number, one in enumerate((adapter, other, empty)):
        peft_io.write_adapter(tmp_path / str(number), one, CONFIG, str(folder))
        models.append(in_torch(folder, tmp_path / str(number)))
    slots = np.arange(len(rows)) % 3
    monkeypatch.setattr(likelihood, "ROWS", 10)
    gates = np.asarray(lora.gates(jnp.eye(3)[slots], CONFIG))
    bank = lora.concatenate(jax.tree.map(lambda *leaves: jnp.stack(leaves), adapter, other, empty))
    done = []
    found = likelihood.losses(decoder, params, rows, bank, gates, advance=done.append)
    with torch.no_grad():
        expected = [torch_loss(models[slot], [row]).item() for slot, row in zip(slots, rows, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert sum(done) == len(rows) > 20
    np.testing.assert_allclose(likelihood.losses(decoder, params, rows, None, None)[2::3], found[2::3], rtol=2e-5)
    assert likelihood.losses(decoder, params, [], None, None).shape == (0,)


def test_twenty_steps_of_adamw_equal_torch(base, adapter, rows, tmp_path):
    folder, decoder, params = base
    peft_io.write_adapter(tmp_path, adapter, CONFIG, str(folder))
    model = in_torch(folder, tmp_path, trainable=True)
    batch, drawn = lane(rows, LOCAL.steps, LOCAL.batch)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    losses = []
    for step in drawn:
        optimiser.zero_grad()
        loss = torch_loss(model, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    update = jax.jit(client.make_client_update(decoder, CONFIG, LOCAL))
    one_lane = {"main": jax.tree.map(lambda leaf: leaf[None], adapter)}
    keys = jax.random.split(jax.random.key(0), 1)
    trained, loss = update(params, one_lane, batch, jnp.float32(2e-3), keys, one_phase(1, 1))
    trained = jax.tree.map(lambda leaf: leaf[0], trained)
    np.testing.assert_allclose(loss[0], losses, rtol=1e-3)
    model.save_pretrained(tmp_path / "trained")
    expected = read_adapter(tmp_path / "trained")
    for found, other in zip(jax.tree.leaves(trained["main"]), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(found - other) <= 1e-3 * np.linalg.norm(other)


def test_an_exported_adapter_gives_our_logits_and_answers_in_peft(base, adapter, rows, tmp_path):
    folder, decoder, params = base
    peft_io.write_adapter(tmp_path, adapter, CONFIG, str(folder))
    model = in_torch(folder, tmp_path)
    ids = np.array([row.prompt[:8] for row in rows[:4]])
    positions = np.broadcast_to(np.arange(8), ids.shape)
    gates = jnp.full((4, CONFIG.rank), CONFIG.scale)
    ours = logits(decoder, params, hidden_states(decoder, params, ids, positions, lora=adapter, gates=gates))
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
        with model.disable_adapter():
            plain = model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    assert np.abs(theirs - plain).max() > 0.1  # the adapter was really loaded

    prompts = [row.prompt for row in rows[:6]]
    stop = tiny_tokenizer().eos_token_id
    answers = generate(decoder, params, prompts, adapter, np.tile(gates[:1], (6, 1)), stop=stop, new_tokens=12)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            out = model.generate(
                input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False, max_new_tokens=12, eos_token_id=stop, pad_token_id=stop,
            )[0, len(prompt) :].tolist()  # fmt: skip
        assert answer == (out[: out.index(stop)] if stop in out else out)


def test_an_adapters_numbers_are_written_bit_by_bit_and_its_config_as_peft_reads_it(adapter, tmp_path):
    peft_io.write_adapter(tmp_path, adapter, CONFIG, "some/base")
    assert_close(read_adapter(tmp_path), adapter, tolerance=0)
    told = peft.LoraConfig.from_pretrained(tmp_path)
    assert (told.r, told.lora_alpha, told.lora_dropout) == (CONFIG.rank, CONFIG.alpha, CONFIG.dropout)
    assert (told.target_modules, told.base_model_name_or_path) == ({*CONFIG.targets}, "some/base")


def test_what_fedex_added_to_weights_is_written_by_the_names_of_transformers(tmp_path):
    blocks = load_model("tiny").params["blocks"]
    shapes = {module: blocks[module]["kernel"].shape for module in CONFIG.targets}
    added = {module: jax.random.normal(jax.random.key(0), shape) for module, shape in shapes.items()}
    peft_io.write_shift(tmp_path, {"blocks": {m: {"shift": shift} for m, shift in added.items()}})
    tensors = load_file(tmp_path / "base_shift.safetensors")
    for module, added_to in added.items():
        part = "mlp" if module == "down_proj" else "self_attn"
        for layer, shift in enumerate(added_to):  # torch keeps [out, in]
            np.testing.assert_array_equal(tensors.pop(f"model.layers.{layer}.{part}.{module}.weight"), shift.T)
    assert not tensors


@pytest.mark.parametrize("unit", [True, False])
def test_a_router_is_written_as_it_is(unit, tmp_path):
    router = Router(jnp.full((2, 3), 1.0), jnp.full(3, 2.0), jnp.full(3, 3.0), jnp.asarray(unit))
    peft_io.write_router(tmp_path, router, {"recipe": "paper"})
    found = load_file(tmp_path / "router.safetensors")
    assert_close(found, {name: np.asarray(leaf) for name, leaf in router._asdict().items() if name != "unit"}, 0)
    assert json.loads((tmp_path / "router.json").read_text()) == {"recipe": "paper", "unit_length": unit}
