"""Sums of products of adapters, and shifts of the frozen weights by them: {module: [layer, in, out]}."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from fedrouter_jax.bank import expand
from fedrouter_jax.types import Adapters, Array, FederationState, LoRA, PyTree, Work

# What is kept may be a small difference of products: rounded operands, an accelerator's default, would leave little.
exact = partial(jnp.einsum, precision="highest")


def none(lora: LoRA) -> dict[str, Array]:
    """The shift of weights that are as they came."""
    return {m: jnp.zeros((*lora.a[m].shape[:-1], lora.b[m].shape[-1])) for m in lora.a}


def added(shift: dict[str, Array], share: Array, lora: LoRA) -> dict[str, Array]:
    """The shift and the products A B of some lanes (leaves `[lane, ...]`), each by its share [lane]."""
    return {
        m: total + exact("kldr,klro->ldo", lora.a[m] * expand(share, lora.a[m]), lora.b[m])
        for m, total in shift.items()
    }


def collect(state: FederationState, work: Work) -> tuple[PyTree, Callable]:
    """What `Strategy.collect` of methods with one shared slot sums up: the share of the lanes that came back, and their
    products."""

    def add(sums: PyTree, lanes: Work, adapters: Adapters) -> PyTree:
        share = lanes.weight / jnp.maximum(jnp.sum(work.weight), 1e-12)
        return sums[0] + jnp.sum(share), added(sums[1], share, adapters["main"])

    return (jnp.zeros(()), none(jax.tree.map(lambda leaf: leaf[0], state.bank["main"]))), add


def traffic(state: FederationState, lanes: int, size: int) -> tuple[int, int]:
    """A client sends its adapter, and adds up those of all lanes by itself."""
    return size, lanes * size


def base(scale: float) -> Callable[[FederationState, PyTree], PyTree]:
    """`Strategy.base` of methods whose memory is a shift: W0, and beside it `scale` times that."""

    def shifted(state, params):
        blocks = dict(params["blocks"])
        for module, delta in state.memory.items():
            blocks[module] = {**blocks[module], "shift": scale * delta}
        return {**params, "blocks": blocks}

    return shifted
