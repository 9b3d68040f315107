"""Local training: some optimiser steps on one lane. Knows one adapter and its rows, and nothing of other lanes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax

from fedrouter_jax import lora as lora_lib
from fedrouter_jax.data.packing import Rows
from fedrouter_jax.models import DecoderConfig, hidden_states, logits
from fedrouter_jax.types import Adapters, Array, ClientUpdate, Losses, PyTree


@dataclass(frozen=True)
class LocalConfig:
    """AdamW on one lane, fresh every round."""

    steps: int = 10
    """Optimiser steps of a lane in a round."""
    batch: int = 16
    """Rows of one optimiser step."""
    learning_rate: float = 5e-4
    """Learning rate of the first round; cosine over rounds, constant inside one."""
    min_learning_rate: float = 1e-5
    """Learning rate that the cosine ends at."""
    clip: float = 1.0
    """Gradients are clipped to this global norm."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""


def learning_rate(config: LocalConfig, rounds: int, t: Array) -> Array:
    """lr(t) = min + (max - min) * (1 + cos(pi t / T)) / 2 for t = 1..T (FedRouter's released launcher)."""
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + 0.5 * span * (1 + jnp.cos(jnp.pi * t / rounds))


def response_loss(
    decoder: DecoderConfig, lora: lora_lib.LoRAConfig, base: PyTree, adapters: Adapters, pack: Rows, key: Array
) -> Array:
    """Summed cross-entropy of the response tokens in one pack (float32 []).

    `pack` is one pack of `Rows`, without the pack axis. Only positions that predict a response token
    reach the head: with short answers that saves most of the head's work, a fifth of a small model's.
    """
    slots = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters.values())
    tokens, positions, segments = (field[None] for field in pack.packs)
    hidden = hidden_states(
        decoder,
        base,
        tokens,
        positions,
        segments,
        lora_lib.concatenate(slots),
        lora_lib.gates(jnp.ones((1, len(adapters))), lora),
        dropout=lora.dropout,
        key=key,
    )[0]
    scores = logits(decoder, base, hidden[pack.where])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(scores, jnp.maximum(pack.labels, 0))
    return jnp.sum(losses * (pack.labels >= 0))


def make_client_update(decoder: DecoderConfig, lora: lora_lib.LoRAConfig, local: LocalConfig) -> ClientUpdate:
    """The function `(base, adapters, batch [step], lr, key) -> (adapters, losses)` that trains one lane.

    The loss of a step is the mean over all its response tokens. A step's packs are visited by a loop that stops
    after the last one with rows, so lanes run one by one pay for their own rows only. A step without rows has a
    gradient of zero.
    """
    gradient = jax.value_and_grad(partial(response_loss, decoder, lora), argnums=1)

    def update(base, adapters, batch, lr, key):
        optimiser = optax.chain(optax.clip_by_global_norm(local.clip), optax.adamw(lr, weight_decay=local.weight_decay))

        def step(carry, inputs):
            adapters, optimiser_state = carry
            number, (rows, count) = inputs
            step_key = jax.random.fold_in(key, number)

            def visit(index, total):
                pack = jax.tree.map(lambda field: field[index], rows)
                here = gradient(base, adapters, pack, jax.random.fold_in(step_key, index))
                return jax.tree.map(jnp.add, total, here)

            nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, adapters))
            total = jax.lax.fori_loop(0, count, visit, nothing)
            responses = jnp.maximum(jnp.sum(rows.labels >= 0), 1)
            loss, gradients = jax.tree.map(lambda leaf: leaf / responses, total)
            updates, optimiser_state = optimiser.update(gradients, optimiser_state, adapters)
            return (optax.apply_updates(adapters, updates), optimiser_state), loss

        steps = jnp.arange(batch.count.shape[0])
        (adapters, _), loss = jax.lax.scan(step, (adapters, optimiser.init(adapters)), (steps, batch))
        return adapters, Losses(loss)

    return update
