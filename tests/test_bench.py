"""The PyTorch flow that speed is compared with: both ways of writing it compute the same; what the bench draws."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import tiny_llama, word_rows
from peft import PeftModel
from rich.console import Console

from experiments import bench, bench_measure, bench_phases
from experiments.torch_baseline import flow
from fedrouter_jax import client, embed, experiment, generate, lora, peft_io
from fedrouter_jax.data import packing, schedule, tokens
from fedrouter_jax.errors import UserError
from fedrouter_jax.models.hf import load_folder
from fedrouter_jax.presets import smoke
from fedrouter_jax.types import Phase

CONFIG = lora.LoRAConfig(rank=4, alpha=8.0, dropout=0.0)
PAD = 256
FLOWS = (flow.PUBLISHED, flow.BEST_EFFORT)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """A tiny random Llama here and in torch, two adapters in either form, and rows."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(folder, 0, layers=3)
    decoder, params = load_folder(folder, "float32")
    fresh = lora.init(jax.random.key(0), decoder, CONFIG)
    adapters = [
        fresh._replace(b={m: 0.3 * jax.random.normal(jax.random.key(s), b.shape) for m, b in fresh.b.items()})
        for s in range(2)
    ]
    peft_io.write_adapter(folder / "adapter", adapters[0], CONFIG, str(folder))
    import transformers

    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    rows = word_rows(np.random.default_rng(0), 12)
    return decoder, params, adapters, model, [bench_phases.in_torch(one, "cpu") for one in adapters], rows


def test_both_flows_have_the_same_losses_and_averages(sides):
    _, _, _, model, bank, rows = sides
    lanes = [(0, 1.0, [rows[:3], rows[3:6]]), (1, 1.0, [rows[6:8]] * 2), (0, 3.0, [rows[8:10]] * 2)]
    found = [flow.train_round(model, bank, lanes, 1e-2, PAD, each) for each in FLOWS]
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-4)
    alone = flow.train_client(model, bank[0], lanes[0][2], 1e-2, PAD, flow.PUBLISHED)[0]
    other = flow.train_client(model, bank[0], lanes[2][2], 1e-2, PAD, flow.PUBLISHED)[0]
    for name, leaf in found[0][0][0].items():
        torch.testing.assert_close(leaf, 0.25 * alone[name] + 0.75 * other[name])
        assert (leaf != bank[0][name]).any()


def test_training_has_no_batch_of_a_length_at_which_cudnn_has_no_gradients(sides, monkeypatch):
    model, (row, other, *_) = sides[3], sides[5]
    row = row._replace(prompt=row.prompt[:1] * (64 - len(row.response)))
    alone = []
    for each in (row, other):
        ids = torch.tensor([each.prompt + each.response])
        labels = torch.where(torch.arange(each.length) < len(each.prompt), -100, ids)
        alone.append(model(input_ids=ids, labels=labels).loss.item())
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **given: seen.append(given) or forward(**given))
    expected = np.average(alone, weights=[len(row.response), len(other.response)])
    for each in FLOWS:
        np.testing.assert_allclose(flow.loss_of(model, [row, other], PAD, each).item(), expected, rtol=1e-5)
    assert [given["attention_mask"].shape for given in seen] == [(2, 65)] * 2


@pytest.mark.parametrize(("what", "graphs"), [("layer", 2), ("model", 1)])
def test_one_compiled_forward_pass_serves_whatever_the_length(sides, monkeypatch, what, graphs):
    _, _, _, model, bank, rows = sides
    lanes = [(0, 1.0, [rows[:3], rows[3:6]]), (1, 1.0, [rows[6:8]] * 2)]
    others = [(0, 1.0, [rows[2:5]]), (1, 1.0, [rows[8:11]])]
    plain = [flow.train_round(model, bank, some, 1e-2, PAD, flow.BEST_EFFORT) for some in (lanes, others)]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # traced as for a GPU
    counted = torch._dynamo.utils.counters["stats"]
    with torch._dynamo.config.patch(specialize_float=False, recompile_limit=8):  # as they were, when it ends
        whose, forward = flow.compiled(model, what)
        monkeypatch.setattr(whose, "forward", forward)
        before, found, made = counted["unique_graphs"], [], []
        for some in (lanes, others):
            found.append(flow.train_round(model, bank, some, 1e-2, PAD, flow.BEST_EFFORT))
            made.append(counted["unique_graphs"] - before)
    assert made == [graphs, graphs]  # of layers two, for the first one's input has no gradient
    for (adapters, losses), (expected, wanted) in zip(found, plain, strict=True):
        np.testing.assert_allclose(np.concatenate(losses), np.concatenate(wanted), rtol=1e-5)
        for name, leaf in expected[0].items():
            torch.testing.assert_close(adapters[0][name], leaf, rtol=1e-4, atol=1e-5)


def test_both_flows_embed_and_answer_as_we_do(sides):
    decoder, params, adapters, model, bank, rows = sides
    prompts = [row.prompt for row in rows]
    ours = embed.embed(decoder, params, prompts, None)
    slots = [i % 2 for i in range(len(prompts))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    gates = np.asarray(lora.gates(jax.nn.one_hot(jnp.asarray(slots), 2), CONFIG))
    answers = generate.generate(
        decoder, params, prompts, lora.concatenate(stacked), gates, stop=PAD, new_tokens=6, rows_at_once=12
    )
    for each in FLOWS:
        np.testing.assert_allclose(flow.embed(model, prompts, PAD, each), ours, rtol=1e-3, atol=1e-4)
        assert flow.generate(model, bank, slots, prompts, PAD, PAD, 6, each) == answers


def test_an_adapter_that_was_merged_to_answer_is_taken_out_again(sides):
    _, _, _, model, bank, rows = sides
    weights = {name: leaf.clone() for name, leaf in model.named_parameters() if "base_layer" in name}
    merged = []
    model.base_model.model.register_forward_pre_hook(
        lambda *_: merged.append(any(module.merged for module in model.modules() if hasattr(module, "lora_A")))
    )
    for each in FLOWS:
        merged.clear()
        flow.generate(model, bank, [0, 1], [row.prompt for row in rows[:2]], PAD, PAD, 2, each)
        assert set(merged) == {each.merged}
    for name, leaf in model.named_parameters():
        if name in weights:
            torch.testing.assert_close(leaf, weights[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rate", "worth"), [(1.0, False), (2.0, True)])
def test_bfloat16_that_a_processor_makes_up_is_not_timed(rate, worth, monkeypatch):
    rates = {"float32": 8.0 * 1.5, "bfloat16": rate}
    monkeypatch.setattr(bench_measure, "torch_matrix_rate", lambda device, dtype, rows: rates[dtype])
    assert bench_measure.torch_bfloat16("cpu") is worth


@pytest.mark.parametrize(("devices", "cuda"), [(1, True), (2, False)])
def test_both_sides_compute_on_one_device_of_a_kind(devices, cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    with pytest.raises(UserError, match=f"JAX has {devices} device.*, cpu, and PyTorch computes on"):
        bench_measure.measure("synthetic", None, "float32", 1, True, "layer", Console(quiet=True))


def test_the_table_divides_what_was_measured(tmp_path):
    seconds = {
        "ours": [2.0, 1.0, 4.0],
        "ours, mixed": [1.0, 1.0, 1.0],
        "published": [8.0, 6.0, 7.0],
        "best effort": [3.0, 3.0, 3.0],
    }
    phase = {
        "useful": {"": 600, "ours, mixed": 300},
        "unit": "tokens",
        "seconds": seconds,
        "first": {"ours": 5.0, "ours, mixed": 4.0},
        "matrix_rate": [6e11, 6e11, 1e11],
    }
    kmeans = {**phase, "unit": "rows", "seconds": {"ours": [1.0], "scikit-learn": [9.0]}}
    load = dataclasses.asdict(bench_phases.Load(4, 1, 1, 8, 4, 8, 1))
    found = {
        "model": "m", "data": "d", "device": "cpu", "torch": "t", "jax": "j", "threads": 2,
        "load": load, "lanes": 8, "slots": 4,
        "products": {f"{side}, {kind}": 5e11 for side in ("ours", "torch") for kind in ("float32", "bfloat16")},
        "flops_a_token": 1e9, "useful_share": {"embed": 0.9, "train": 0.8, "read": 0.7},
        "phases": {
            "embed": phase, "K-Means": kmeans, "train a round": phase, "read prompts": phase,
            "routed generation": phase,
        },
    }  # fmt: skip
    text = bench.markdown(json.loads(json.dumps(found)))
    assert "| train a round (tokens) | 300 | 5.0 | 86 | **3.50** | 200 | **1.50** |  |  |" in text
    assert (
        "| train a round, mixed (tokens) | 300 | 4.0 | 86 | **3.50** | 200 | **1.50** |  |  |" in text
    )  # half of the work
    assert "| **9.00** |" in text
    assert (
        "| all of it, 6 rounds (seconds) | 17 |  | 65 | **3.82** | 33 | **1.94** |  |  |" in text
    )  # 8 x 2 + 1, 8 x 7 + 9 ...
    # Turn by turn: 300, 600 and 150 GFLOP/s are 50, 100 and 150 % of that turn's matrix rate.
    assert "reaches 300 GFLOP/s" in text and "100 % of a large matrix product's 600, measured in the same turns" in text
    assert "500 GFLOP/s here in float32 and 500 in bfloat16, in PyTorch 500 and 500." in text
    assert "(2 a parameter) reach 50 and 50 % of theirs" in text
    bench.figure(found).savefig(tmp_path / "bench.png")


def test_sides_are_compared_by_their_first_call_and_then_take_turns(monkeypatch):
    calls, kinds = [], []
    monkeypatch.setattr(bench_measure, "matrix_rate", lambda dtype: kinds.append(dtype) or 1e9)

    def side(name, value):
        return lambda: calls.append(name) or value

    sides = {"ours": side("ours", [1.0, 2.0]), "published": side("published", [1.0, 2.005])}

    def useful(found):
        bench_phases.same("losses", found, bench_phases.ALIKE["float32"]["losses"])
        return {"": 7}

    found = bench_measure.timed("train", bench_phases.Phase(sides, useful), 2, "float32", Console(quiet=True))
    assert calls == ["ours", "published"] * 3
    assert found["useful"] == {"": 7} and found["matrix_rate"] == [1e9] * 2 and kinds == ["float32"] * 2
    assert [len(spent) for spent in found["seconds"].values()] == [2, 2] and set(found["first"]) == set(sides)

    for wrong, gap in ((2.1, "9.5e-02"), (np.nan, "nan")):
        calls.clear()
        sides["ours"] = side("ours", [1.0, wrong])
        with pytest.raises(UserError, match=f"losses: 'ours' and 'published' differ by {gap}, more than 1.0e-02"):
            bench_measure.timed("train", bench_phases.Phase(sides, useful), 2, "float32", Console(quiet=True))
        assert calls == ["ours", "published"]  # nothing is timed


def test_the_flow_trains_as_we_do(sides):
    """A lane's steps, clipped, from an adapter: that of the flow and ours end at the same adapter and losses."""
    decoder, params, adapters, model, bank, rows = sides
    local = client.LocalConfig(steps=4, batch=3)
    steps = [rows[start : start + 3] for start in (0, 3, 6, 9)]
    time, predicted = packing.shape([[row for step in steps for row in step]], 3, 1)
    batch = schedule.stack([packing.batch([step], 3, time, predicted) for step in steps])
    update = client.make_client_update(decoder, CONFIG, local)
    start = {"main": jax.tree.map(lambda leaf: leaf[None], adapters[0])}
    keys, phases = jax.random.split(jax.random.key(0), 1), (Phase(train=True, weights={"main": 1.0}),)
    found, losses = jax.jit(partial(update, phases=phases))(params, start, batch, 5e-2, keys)
    expected = bench_phases.in_torch(jax.tree.map(lambda leaf: leaf[0], found["main"]), "cpu")
    for each in FLOWS:
        trained, seen = flow.train_client(model, bank[0], steps, 5e-2, PAD, each)
        np.testing.assert_allclose(seen, np.asarray(losses)[0], rtol=1e-4)
        for name, leaf in expected.items():
            torch.testing.assert_close(trained[name], leaf, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("each", FLOWS)
def test_batches_of_the_tuned_flow_hold_rows_of_like_length(each):
    lengths = [5, 1, 4, 2, 3]
    expected = [[1, 3], [4, 2], [0]] if each is flow.BEST_EFFORT else [[0, 1], [2, 3], [4]]
    assert list(flow.batches(lengths, each, 2)) == expected


def test_the_tuned_flow_computes_the_head_for_answers_only(sides, monkeypatch):
    model, rows = sides[3], sides[5][:3]
    kept, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **given: kept.append(given.get("logits_to_keep")) or forward(**given))
    for each in FLOWS:
        flow.loss_of(model, rows, PAD, each)
    assert kept == [None, max(len(row.response) for row in rows) + 1]


def test_useful_tokens_are_those_of_the_rows_without_padding(monkeypatch):
    """Of each phase, from the rows themselves; and sides that answer otherwise are refused."""
    prepared = experiment.prepare(smoke())
    load = bench_phases.Load(texts=6, steps=2, batch=2, prompts=5, new=4, clients=3, rounds=1)
    size = prepared.model.config.width
    same, tokenizer = {"published": np.ones((6, size)), "ours": np.ones((6, size))}, prepared.model.tokenizer
    texts = tokens.encode_texts(tokenizer, bench_phases.texts_of(prepared, load), prepared.config.data.max_length)
    assert bench_phases.embedding({"ours": prepared}, [], load).useful(same) == {"": sum(map(len, texts))}
    with pytest.raises(UserError, match="embeddings: 'ours' and 'published' differ"):
        bench_phases.embedding({"ours": prepared}, [], load).useful(same | {"ours": np.full((6, size), 1.01)})

    here = bench_phases.Peer("published", flow.PUBLISHED, type("Here", (), {"device": "cpu"}))
    adapters = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), bench_phases.fresh(prepared))
    phase = bench_phases.generation({"ours": prepared}, adapters, [here], load, 4)
    read = sum(len(prepared.test[row].prompt) for row in bench_phases.asked(prepared, load))
    answers = [[1, 2], [3], [], [4, 5, 6], [7]]
    found = {"ours": answers, "published": answers, "best effort": [*answers[:4], [1, 2, 3, 4]]}
    assert phase.useful(found) == {
        "ours": read + 12,
        "published": read + 12,
        "best effort": read + 14,
    }  # cut before their end
    few = {side: [*answers[:count], *[[9]] * (5 - count)] for side, count in (("enough", 2), ("few", 1))}
    phase.useful(found | {"ours, mixed": few["enough"], "best effort, bf16": few["enough"]})
    for side, other, share in (("ours", "enough", 40), ("best effort", "enough", 40), ("ours, mixed", "few", 20)):
        with pytest.raises(UserError, match=f"'{side}' and 'published' agree in only {share}% of the answers"):
            phase.useful(found | {side: few[other]})

    kmeans = bench_phases.clustering(load)
    assert kmeans.useful({"ours": np.ones(3), "scikit-learn": np.full(3, 1.005)}) == {"": 3 * bench_phases.POINTS}
    with pytest.raises(UserError, match="different inertias"):
        kmeans.useful({"ours": np.ones(3), "scikit-learn": np.full(3, 1.1)})


def test_both_sides_train_on_the_same_tokens(monkeypatch):
    """Those that are useful are those of our packs, as the flow's rows have them."""
    config = smoke()
    prepared = experiment.prepare(dataclasses.replace(config, data=dataclasses.replace(config.data, clients=8)))
    packed, round_inputs = [], experiment.round_inputs
    monkeypatch.setattr(experiment, "round_inputs", lambda *given: packed.append(round_inputs(*given)) or packed[0])
    monkeypatch.setattr(flow, "get_peft_model_state_dict", lambda model: {})
    phase = bench_phases.training({"ours": prepared}, [bench_phases.Peer("published", flow.PUBLISHED, None)])
    losses = np.ones((8, 2))
    assert phase.useful({"ours": losses, "published": losses}) == {"": (packed[0][1].rows.packs.segments > 0).sum()}
    with pytest.raises(UserError, match="losses: 'ours' and 'published' differ"):
        phase.useful({"ours": losses, "published": losses + 0.011})
