"""Low-rank adapters: initialisation, and composition by rank concatenation.

K adapters of rank r are one adapter of rank K * r with a gate per rank: one-hot gates route, soft gates mix, all
ones is plain LoRA. So the model only ever sees one LoRA and one gate array.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fedrouter_jax.models.config import DecoderConfig, module_shapes
from fedrouter_jax.types import Array, LoRA


@dataclass(frozen=True)
class LoRAConfig:
    """The shape of one adapter."""

    rank: int = 8
    """Rank r of each adapter."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.05
    """Dropout on the adapter's input while training."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Modules of a block that carry an adapter: any of q_proj k_proj v_proj o_proj gate_proj up_proj down_proj."""

    @property
    def scale(self) -> float:
        """alpha / rank, carried by the gates."""
        return self.alpha / self.rank


def draw(key: Array, shape: tuple[int, ...]) -> Array:
    """A fresh A [..., in, rank]: Kaiming-uniform with a = sqrt(5), so bounded by 1 / sqrt(in) as in PEFT (float32)."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def init(key: Array, decoder: DecoderConfig, config: LoRAConfig) -> LoRA:
    """A fresh adapter: A drawn, B zero (float32).

    It changes nothing until it is trained.
    """
    shapes = {module: module_shapes(decoder)[module] for module in sorted(config.targets)}
    a = {
        module: draw(jax.random.fold_in(key, number), (decoder.layers, width_in, config.rank))
        for number, (module, (width_in, _)) in enumerate(shapes.items())
    }
    b = {module: jnp.zeros((decoder.layers, config.rank, width_out)) for module, (_, width_out) in shapes.items()}
    return LoRA(a, b)


def stack(adapters: Iterable[LoRA]) -> LoRA:
    """Adapters with leaves `[slot, ...]` one after the other; those with fewer seats than others get empty ones."""
    adapters = list(adapters)
    seats = max((gate.shape[-1] for adapter in adapters for gate in adapter.gate.values()), default=0)

    def seated(adapter: LoRA) -> LoRA:
        room = {m: [(0, 0)] * (g.ndim - 1) + [(0, seats - g.shape[-1])] for m, g in adapter.gate.items()}
        return adapter._replace(gate={m: jnp.pad(g, room[m]) for m, g in adapter.gate.items()})

    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *map(seated, adapters))


def concatenate(slots: LoRA) -> LoRA:
    """Adapters stacked on a leading slot axis, as one adapter of rank slot * rank (slot-major)."""
    return LoRA(
        a={m: jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], -1) for m, a in slots.a.items()},
        b={m: jnp.moveaxis(b, 0, -3).reshape(b.shape[1], -1, b.shape[-1]) for m, b in slots.b.items()},
        gate={m: jnp.moveaxis(gate, 0, -2) for m, gate in slots.gate.items()},
    )


def gates(weights: Array, config: LoRAConfig) -> Array:
    """Gates `[row, slot * rank]` of a concatenated adapter from weights over slots `[row, slot]`."""
    return jnp.repeat(weights * config.scale, config.rank, axis=-1)
