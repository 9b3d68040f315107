"""Local training: some optimiser steps on a group of lanes, each with its own adapter, rows and optimiser.

The lanes of a group share packs, not parameters. Their adapters are one adapter of concatenated rank, and the gates of
a token open the ranks of its own lane, the same way a mixed batch is answered: a group costs what its tokens cost,
with no padding per lane. A group of one lane is plain training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedrouter_jax import bank, likelihood
from fedrouter_jax import lora as lora_lib
from fedrouter_jax.data.packing import Rows
from fedrouter_jax.keys import key_of
from fedrouter_jax.models import LOOP, Blocks, DecoderConfig
from fedrouter_jax.types import Adapters, Array, ClientLoss, ClientUpdate, PyTree


@dataclass(frozen=True)
class LocalConfig:
    """AdamW on one lane, fresh every round."""

    steps: int = 10
    """Optimiser steps of a lane in a round."""
    batch: int = 16
    """Rows of one optimiser step."""
    learning_rate: float = 5e-4
    """Peak of the cosine over rounds 1 to T, constant inside one: the first round is already below it, the more so the
    fewer there are, the last at the minimum (with one round, the only one)."""
    min_learning_rate: float = 1e-5
    """Learning rate of the last round."""
    clip: float = 1.0
    """Gradients are clipped to this global norm."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    proximal: float = 0.0
    """FedProx's mu (Li et al., MLSys 2020, arXiv 1812.06127): pulls an adapter towards the one it started from."""


def learning_rate(config: LocalConfig, rounds: int, t: Array) -> Array:
    """lr(t) = min + (max - min) * (1 + cos(pi t / T)) / 2 for t = 1..T (FedRouter's released launcher)."""
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + 0.5 * span * (1 + jnp.cos(jnp.pi * t / rounds))


def response_losses(
    decoder: DecoderConfig,
    lora: lora_lib.LoRAConfig,
    base: PyTree,
    adapters: Adapters,
    weights: dict[str, Any],
    rows: Rows,
    keys: Array,
    blocks: Blocks = LOOP,
) -> Array:
    """Summed cross-entropy of each lane's response tokens in some packs (float32 [lane]).

    `adapters` has leaves `[lane, ...]`, and `weights` says how much each of them counts; `keys` [lane] are for dropout.
    """
    lanes = keys.shape[0]
    slots = lora_lib.stack(adapters[name] for name in weights)
    lane = jax.nn.one_hot(rows.lane, lanes)
    own = jnp.concatenate([lane * weight for weight in weights.values()], axis=-1)
    losses = likelihood.of_packs(
        decoder,
        base,
        rows,
        lora_lib.concatenate(slots),
        lora_lib.gates(own, lora),
        dropout=lora.dropout,
        keys=token_keys(keys, rows) if lora.dropout > 0 else None,
        blocks=blocks,
    )
    return jax.ops.segment_sum(losses.ravel(), _lanes(rows), lanes)


def responses(rows: Rows, lanes: int) -> Array:
    """Response tokens of each lane in the packs of a step (float32 [lane])."""
    return jax.ops.segment_sum((rows.labels >= 0).ravel() * 1.0, _lanes(rows), lanes)


def _lanes(rows: Rows) -> Array:
    """The lane of each response token (int32 [pack * predicted])."""
    return jnp.take_along_axis(rows.lane, rows.where, axis=-1).ravel()


def token_keys(keys: Array, rows: Rows) -> Array:
    """A key for every token [pack, time], from its lane's, its row and its place there: the same in any packing."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in))
    return fold(fold(keys[rows.lane], rows.row), rows.packs.positions)


def make_client_update(
    decoder: DecoderConfig,
    lora: lora_lib.LoRAConfig,
    local: LocalConfig,
    blocks: Blocks = LOOP,
    packs_at_once: int = 1,
    optimiser: Callable[..., optax.GradientTransformation] | None = None,
) -> ClientUpdate:
    """The function `(base, adapters [lane, ...], batch [step], lr, keys [lane], phases) -> (adapters, loss)`.

    The phases share the steps evenly, the last takes what is left over; each starts a fresh optimiser. The loss
    [lane, step] of a lane in a step is the mean over all its response tokens there. A step's packs are visited by a
    loop, `packs_at_once` in a turn, that stops after the last one with rows. A lane without rows has a gradient of
    zero. `optimiser` is a strategy's; the steps it is told are those of its phase.
    """

    def update(base, adapters, batch, lr, keys, phases):
        count = batch.count.shape[0]
        each = count // len(phases)
        received, losses = adapters, []
        for number, phase in enumerate(phases):
            first, last = number * each, count if number == len(phases) - 1 else (number + 1) * each
            part = jax.tree.map(lambda leaf, first=first, last=last: leaf[first:last], batch)
            adapters, loss = train(base, adapters, received, part, lr, keys, phase, jnp.arange(first, last))
            losses.append(loss)
        return adapters, jnp.concatenate(losses).T

    def train(base, adapters, received, batch, lr, keys, phase, steps):
        lanes = keys.shape[0]
        moves = jax.tree.map(jnp.asarray, bank.spread(phase.train, adapters))

        def moving(tree):
            return jax.tree.map(lambda move, leaf: jnp.where(move, leaf, 0), moves, tree)

        usual = optax.chain(optax.clip_by_global_norm(local.clip), optax.adamw(lr, weight_decay=local.weight_decay))
        if optimiser is not None:
            here = dataclasses.replace(local, steps=len(steps))
            usual = optimiser(optax.chain(optax.stateless(lambda gradients, _: moving(gradients)), usual), lr, here)
        own = optax.with_extra_args_support(usual)

        def updates_of(gradients, state, adapters, received):
            return own.update(gradients, state, adapters, received=received)

        def summed(adapters, packs, counts, step_keys):
            losses = response_losses(decoder, lora, base, adapters, phase.weights, packs, step_keys, blocks) / counts
            return jnp.sum(losses), losses  # a lane's loss depends on its own adapters only

        gradient = jax.grad(summed, has_aux=True)

        def step(carry, inputs):
            adapters, optimiser_state = carry
            number, (rows, count) = inputs
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            counts = jnp.maximum(responses(rows, lanes), 1)

            def visit(total, packs):
                return jax.tree.map(jnp.add, total, gradient(adapters, packs, counts, step_keys))

            nothing = (jax.tree.map(jnp.zeros_like, adapters), jnp.zeros(lanes))
            gradients, loss = likelihood.fold(rows, count, packs_at_once, visit, nothing)
            if local.proximal:

                def pulled(gradient, leaf, start):
                    return gradient + local.proximal * (leaf - start)

                here = [{name: tree[name] for name in phase.weights} for tree in (gradients, adapters, received)]
                gradients = gradients | jax.tree.map(pulled, *here)
            with jax.named_scope("optimiser"):
                # What does not move must not count in the norm that clips the rest.
                given = (moving(gradients), optimiser_state, adapters, received)
                updates, optimiser_state = jax.vmap(updates_of)(*given)
            return (optax.apply_updates(adapters, moving(updates)), optimiser_state), loss

        (adapters, _), loss = jax.lax.scan(step, (adapters, jax.vmap(own.init)(adapters)), (steps, batch))
        return adapters, loss

    return update


def make_client_loss(decoder: DecoderConfig, lora: lora_lib.LoRAConfig, packs_at_once: int = 1) -> ClientLoss:
    """The function `(base, adapters [lane, ...], batch [step]) -> loss [lane]`: all rows of a round, nothing trained.

    A lane's loss is the mean over its response tokens, without dropout; its named adapters count fully.
    """
    plain = dataclasses.replace(lora, dropout=0.0)

    def loss(base, adapters, batch):
        lanes = jax.tree.leaves(adapters)[0].shape[0]
        keys, weights = jax.random.split(key_of(0), lanes), dict.fromkeys(adapters, 1.0)

        def step(_, inputs):
            rows, count = inputs

            def visit(total, packs):
                return total + response_losses(decoder, plain, base, adapters, weights, packs, keys)

            return _, (likelihood.fold(rows, count, packs_at_once, visit, jnp.zeros(lanes)), responses(rows, lanes))

        _, (losses, counts) = jax.lax.scan(step, None, batch)
        return losses.sum(0) / jnp.maximum(counts.sum(0), 1)

    return loss
