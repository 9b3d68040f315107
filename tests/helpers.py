"""Constants and functions that several test files share."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fedrouter_jax import bank, client, experiment, lora
from fedrouter_jax.cli import main
from fedrouter_jax.data import schedule, tokens
from fedrouter_jax.data.rows import Row
from fedrouter_jax.federation import make_round
from fedrouter_jax.models import tiny_tokenizer
from fedrouter_jax.presets import smoke
from fedrouter_jax.routing import Enrolment
from fedrouter_jax.strategies import STRATEGIES, find
from fedrouter_jax.types import Adapters, FederationState, LoRA, Strategy, Work

SHARED = Path(__file__).resolve().parents[2] / "shared"  # real rows, where a checkout has them beside it

LORA = lora.LoRAConfig(rank=4, alpha=8.0, dropout=0.1)
KEY = jax.random.key(7)
LOCAL = client.LocalConfig(steps=2, batch=3, learning_rate=1e-2)
CLIENTS, CLUSTERS, SLOTS = 4, 2, 3
# The rounds of these are FedRouter's and FedIT's, function for function: only routes and what they are given differ.
OTHERS = [make() for name, make in STRATEGIES.items() if name not in ("oracle", "centralised", "fedrouter-soft")]
if "METHOD" in os.environ:  # one of somebody's own, MODULE:FUNCTION
    OTHERS.append(find(os.environ["METHOD"])(smoke()))
BY_NAME = {strategy.name: strategy for strategy in OTHERS}
every_strategy = pytest.mark.parametrize("strategy", OTHERS, ids=lambda s: s.name)


class Federation(NamedTuple):
    """A small federation: clients with rows in two local clusters each, and three global clusters."""

    model: object
    update: object
    enrolment: Enrolment
    adapters: Adapters
    members: list


def inputs(federation: Federation, t: int, clusters_per_round: int = 1, participation: float = 1.0, together: int = 1):
    """The work and batches of round t."""
    sizes = np.array([[len(rows) for rows in held] for held in federation.members])
    config = schedule.RoundConfig(clusters_per_round=clusters_per_round, participation=participation)
    work = schedule.lanes(sizes, t, config, 0)
    return work, schedule.batches(work, federation.members, t, LOCAL.steps, LOCAL.batch, 192, 96, 0, together)


def rate(t):
    return client.learning_rate(LOCAL, 5, t)


def nudge(base, adapters, batch, lr, keys, phases):
    """A cheap client update that depends on each lane's key, rows and adapters, and moves all singular values apart."""
    lanes = jnp.arange(len(keys))
    own = jnp.sum((batch.rows.lane == lanes[:, None, None, None]) * batch.rows.packs.tokens, axis=(1, 2, 3))
    step = jax.vmap(jax.random.normal)(keys) * 0.01 + own * 1e-6

    def moved(leaf):
        uneven = 0.5 + 2 * jnp.cos(0.37 * jnp.arange(leaf[0].size) ** 2)
        return leaf * 0.9 + bank.expand(step, leaf) * uneven.reshape(leaf.shape[1:])

    adapters = jax.tree.map(moved, adapters)
    return adapters, jnp.ones(LOCAL.steps) * step[:, None]


def fit(base, adapters, batch):
    """A cheap loss that depends on each lane's rows and adapters."""
    lanes = jnp.arange(jax.tree.leaves(adapters)[0].shape[0])
    own = jnp.sum((batch.rows.lane == lanes[:, None, None, None]) * batch.rows.packs.tokens, axis=(1, 2, 3)) % 7
    return jnp.abs(own * 0.01 - sum(leaf.mean(axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(adapters)))


def begin(federation, strategy):
    """The state before the first round."""
    return strategy.init(dict.fromkeys(strategy.owners, federation.adapters["main"]), federation.enrolment)


def round_of(strategy, update, at_once, kept={}):  # noqa: B006
    """A jitted round, compiled once for all tests that play the same one."""
    key = (id(strategy), id(update), at_once)
    if key not in kept:  # the objects are kept too, so that their ids stay theirs
        kept[key] = (make_round(strategy, update, rate, 5, at_once, loss=fit), strategy, update)
    return kept[key][0]


def play(federation, strategy, update, at_once=None, rounds=2, change=lambda work, batch: (work, batch), **lanes):
    """The state after some of five rounds, and the last info."""
    run = round_of(strategy, update, at_once)
    state = begin(federation, strategy)
    for t in range(1, rounds + 1):
        work, batch = change(*inputs(federation, t, **lanes))
        state, info = run(state, federation.model.params, work, batch, KEY)
    return state, info


def told(strategy: Strategy, state: FederationState, work: Work, adapters: Adapters) -> FederationState:
    """The state after lanes have come back all together."""
    nothing, add = strategy.collect(state, work)
    after = strategy.tell(state, add(nothing, work, adapters))
    return after if strategy.derive is None else strategy.derive(after)


def word_rows(rng: np.random.Generator, count: int) -> list[tokens.Tokens]:
    """Encoded rows of a few words, of uneven lengths."""
    words = "red green blue one two three cat dog sun moon river stone".split()
    texts = [Row(" ".join(rng.choice(words, rng.integers(2, 6))), str(rng.choice(words)), "") for _ in range(count)]
    return tokens.encode(tiny_tokenizer(), texts, "short", 128, 12)


def tiny_llama(folder: Path, seed: int, layers: int = 2):
    """A tiny random Llama of torch, saved in `folder`; torch is imported here, for not every test needs it."""
    import torch
    import transformers

    torch.manual_seed(seed)
    shape = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(shape).float().eval()
    model.save_pretrained(folder)
    return model


def read_adapter(folder: Path) -> LoRA:
    """A PEFT folder's adapter, [layer, in, rank] and [layer, rank, out]."""
    sides: dict[str, dict[str, dict[int, np.ndarray]]] = {"A": {}, "B": {}}
    for name, leaf in load_file(folder / "adapter_model.safetensors").items():
        *_, layer, _, module, side, _ = name.split(".")
        sides[side.removeprefix("lora_")].setdefault(module, {})[int(layer)] = leaf.T
    return LoRA(*({m: np.stack([found[n] for n in sorted(found)]) for m, found in sides[s].items()} for s in "AB"))


def assert_close(one, other, tolerance: float = 1e-5) -> None:
    """Two pytrees of equal structure and nearly equal leaves."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def one_line(capsys, *arguments):
    """The one line that the command prints before it exits with 2."""
    try:
        code = main(list(arguments))
    except SystemExit as stop:  # of options that cannot be parsed
        code = stop.code
    message = capsys.readouterr().err
    lines = message.splitlines()
    assert code == 2 and "Traceback" not in message
    assert sum(line.startswith("fedrouter: ") for line in lines) == 1  # beside progress bars
    assert lines[-1].startswith("fedrouter: ") and len(lines[-1]) < 600
    return lines[-1]


def begun(strategy, **changes):
    """A smoke run before its first round, with these sections of its config changed."""
    config = dataclasses.replace(smoke(), strategy=strategy)
    parts = {name: dataclasses.replace(getattr(config, name), **part) for name, part in changes.items()}
    prepared = experiment.prepare(dataclasses.replace(config, **parts))
    rows = len(experiment.embedded_rows(prepared))
    points = np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32)
    enrolment = experiment.enroll(prepared, points)
    return prepared, enrolment, experiment.start(prepared, enrolment), points
