"""Generation: a mixed batch under gates answers as each adapter would alone, and as a loop over full forwards does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import LORA

from fedrouter_jax import embed as embedding
from fedrouter_jax import generate as generation
from fedrouter_jax import lora
from fedrouter_jax.data import synthetic, tokens
from fedrouter_jax.embed import embed
from fedrouter_jax.generate import best_token, generate
from fedrouter_jax.models import hidden_states, logits

NEW = 10
LONGEST = 210  # tokens of a prompt and its answer


@pytest.fixture(scope="module")
def bank(tiny):
    """Three adapters that each change the answers."""
    one = [lora.init(jax.random.key(i), tiny.config, LORA) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one)
    return stacked._replace(b={m: jax.random.normal(jax.random.key(9), b.shape) for m, b in stacked.b.items()})


@pytest.fixture(scope="module")
def prompts(tiny):
    rows = synthetic.make(train_per_task=3, test_per_task=1).train
    return [row.prompt for row in tokens.encode(tiny.tokenizer, rows, "short", 320, 24)]


def by_full_forwards(model, prompt, adapter, stop):
    """Greedy decoding without cache, padding, batch or composition."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW:
        row = jnp.asarray([ids + [0] * (LONGEST - len(ids))])  # one shape, so it compiles once
        gates = None if adapter is None else jnp.full((1, LORA.rank), LORA.scale)
        hidden = forward(model.config, model.params, row, adapter, gates)
        best = int(logits(model.config, model.params, hidden[0, len(ids) - 1]).argmax())
        if best == stop:
            break
        ids.append(best)
    return ids[len(prompt) :]


@jax.jit(static_argnums=0)
def forward(config, params, row, adapter, gates):
    return hidden_states(config, params, row, jnp.arange(row.shape[1])[None], lora=adapter, gates=gates)


@pytest.mark.parametrize("tokens", [7, 128, 1000])
def test_the_best_token_is_the_first_of_the_highest(tokens):
    scores = np.random.default_rng(0).integers(-5, 5, (40, tokens)).astype(np.float32)  # many are equal
    scores[0], scores[1, 3] = -np.inf, np.inf
    np.testing.assert_array_equal(best_token(jnp.asarray(scores)), scores.argmax(axis=1))


def test_a_mixed_batch_answers_as_each_adapter_alone(tiny, bank, prompts):
    prompts = prompts[:5]
    slots = [0, 1, 2, None, 1]
    weights = np.array([np.eye(3)[slot] if slot is not None else np.zeros(3) for slot in slots])
    gates = np.asarray(lora.gates(jnp.asarray(weights, jnp.float32), LORA))
    # The most frequent token that the plain model says serves as the stop token, so that some rows do stop.
    stop = by_full_forwards(tiny, prompts[3], None, -1)[4]
    found = generate(
        tiny.config, tiny.params, prompts, lora.concatenate(bank), gates, stop=stop, new_tokens=NEW,
        rows_at_once=3, packs_at_once=2,
    )  # fmt: skip
    alone = [None if slot is None else jax.tree.map(lambda leaf, s=slot: leaf[s], bank) for slot in slots]
    expected = [by_full_forwards(tiny, *pair, stop) for pair in zip(prompts, alone, strict=True)]
    assert found == expected
    assert len({tuple(answer) for answer in expected}) > 2 and any(len(answer) < NEW for answer in expected)


def test_no_more_packs_go_together_than_there_are(tiny, monkeypatch):
    read, pooled = [], []

    def reads(config, base, packs, *rest, read_as=generation.prefill, **named):
        read.append(packs.tokens.shape)
        return read_as(config, base, packs, *rest, **named)

    def pools(config, base, packs, *rest, pooled_as=embedding.pooled):
        pooled.append(packs.tokens.shape)
        return pooled_as(config, base, packs, *rest)

    monkeypatch.setattr(generation, "prefill", reads)
    monkeypatch.setattr(embedding, "pooled", pools)
    same = [[1] * 100] * 12  # two to a pack of 256
    generate(tiny.config, tiny.params, same, None, None, stop=7, new_tokens=1, rows_at_once=8, packs_at_once=16)
    assert [shape[1:] for shape in read] == [(4, 256)] * len(read) and len(read) > 1
    embed(tiny.config, tiny.params, same, 0.5, packs_at_once=16)
    embed(tiny.config, tiny.params, same, 0.5, packs_at_once=5)  # longer packs, of which four hold all
    assert pooled == [(6, 256), (4, 320)]


def test_rows_that_finish_take_the_next_prompts(tiny, bank, prompts, monkeypatch):
    """Forty prompts of 5 to 200 tokens in 8, 32 and 64 rows: rows are refilled, the cache loses rows and pages."""
    stop = 7
    loud = {  # or every answer is one token repeated, and none stops
        "blocks": jax.tree.map(lambda leaf: 20 * leaf, tiny.params["blocks"]),
        "embedding": tiny.params["embedding"].at[stop].mul(2.5),
    }
    tiny = tiny._replace(params={**tiny.params, **loud})
    prompts = [(prompts[i % len(prompts)] * 4)[: 5 * (i + 1)] for i in range(40)]
    slots = [i % 3 for i in range(40)]
    gates = np.asarray(lora.gates(jax.nn.one_hot(jnp.asarray(slots), 3), LORA))
    adapters = [jax.tree.map(lambda leaf, s=slot: leaf[s], bank) for slot in range(3)]
    pairs = zip(prompts, slots, strict=True)
    expected = [by_full_forwards(tiny, prompt, adapters[slot], stop) for prompt, slot in pairs]
    lengths = [len(answer) for answer in expected]
    assert len(set(lengths)) > 6 and max(map(lengths.count, lengths)) < 20, lengths
    done, shapes = [], set()

    def write(config, base, few, state, *rest, write=generation.decode, **named):
        shapes.add((len(state.latest), len(state.cache.owner)))
        return write(config, base, few, state, *rest, **named)

    monkeypatch.setattr(generation, "decode", write)
    for rows in (8, 32, 64):
        found = generate(
            tiny.config, tiny.params, prompts, lora.concatenate(bank), gates, stop=stop, new_tokens=NEW,
            rows_at_once=rows, advance=done.append,
        )  # fmt: skip
        assert found == expected
    assert sum(done) == 120 and len(done) > 9
    assert shapes == {(8, 32), (32, 96), (16, 64), (40, 96), (20, 64)}, shapes
    shapes.clear()
    found = generate(
        tiny.config, tiny.params, prompts, lora.concatenate(bank), gates, stop=stop, new_tokens=NEW, rows_at_once=16,
        shrinks=False,
    )  # fmt: skip
    assert found == expected and shapes == {(16, 64)}, shapes
    once = generate(tiny.config, tiny.params, prompts, None, None, stop=stop, new_tokens=1, rows_at_once=8)
    assert once == [by_full_forwards(tiny, prompt, None, stop)[:1] for prompt in prompts]


def test_last_states_under_gates_are_those_of_single_texts(tiny, bank, prompts):
    prompts, slots = prompts[:5], [0, 1, 2, 0, 1]
    gates = np.asarray(lora.gates(jax.nn.one_hot(jnp.asarray(slots), 3), LORA))
    found = embed(tiny.config, tiny.params, prompts, None, lora=lora.concatenate(bank), gates=gates, last=True)
    for prompt, slot, state in zip(prompts, slots, found, strict=True):
        adapter = jax.tree.map(lambda leaf, s=slot: leaf[s], bank)
        hidden = forward(tiny.config, tiny.params, jnp.asarray([prompt]), adapter, jnp.full((1, LORA.rank), LORA.scale))
        np.testing.assert_allclose(state, hidden[0, -1], rtol=1e-3, atol=1e-4)


def test_soft_gates_mix_adapters(tiny, bank):
    """Gates of one half each are the mean of the two adapters' updates."""
    x = jax.random.normal(jax.random.key(0), (tiny.config.width,))
    both = lora.concatenate(bank)
    gate = lora.gates(jnp.array([[0.5, 0.5, 0.0]]), LORA)[0]
    mixed = ((x @ both.a["q_proj"][0]) * gate) @ both.b["q_proj"][0]
    each = [LORA.scale * (x @ bank.a["q_proj"][s, 0]) @ bank.b["q_proj"][s, 0] for s in range(2)]
    np.testing.assert_allclose(mixed, (each[0] + each[1]) / 2, rtol=1e-4, atol=1e-4)
