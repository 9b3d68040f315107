"""How much goes through a device at once: groups of lanes, packs of texts, rows that generate; by its kind and memory.

Each can be set in the config's `compute`. None changes a result beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import numpy as np

from fedrouter_jax import memory
from fedrouter_jax import method as method_lib
from fedrouter_jax.config import Config
from fedrouter_jax.data import packing, schedule
from fedrouter_jax.models import DecoderConfig, Model
from fedrouter_jax.types import Strategy

PACKS = 64  # that train together on an accelerator, of all groups of lanes, at most; a step of one has some twenty


def groups_of_lanes(config: Config, strategy: Strategy, held: int | None) -> tuple[int, int]:
    """How many groups of a round are on a row of devices, and of how many lanes, which share packs.

    Clients hold `held` clusters (None: as many as may be found).
    """
    lanes = method_lib.lanes_of_a_round(config, strategy, held or config.cluster.max_clusters)
    rows_of_devices = jax.device_count() // config.compute.model_parallel
    groups, together = schedule.groups_of(lanes, config.compute.lanes_together, rows_of_devices)
    return groups // rows_of_devices, together


def training(
    config: Config,
    decoder: DecoderConfig,
    strategy: Strategy,
    slots: int | None,
    shared: tuple[int, int],
    pack: tuple[int, int],
    counts: Sequence[int],
) -> tuple[int, int]:
    """How many packs of a group train together, and how many groups: one of each on a CPU, which gains nothing by more.

    Elsewhere as many groups as fit in memory, and packs as suit steps that have so many of them (`counts`).
    `slots` are those of cluster-owned adapters (None: as many as may be found), `shared` are `groups_of_lanes`, `pack`
    its tokens and responses.
    """
    groups, together = shared
    several = jax.device_count() > config.compute.model_parallel
    packs = config.compute.packs_at_once or packs_of_a_group(counts, groups)
    if jax.default_backend() == "cpu":
        return packs, config.compute.groups_at_once or 1
    limit = memory_limit()
    if limit is None:
        return packs, config.compute.groups_at_once or groups
    federation = memory.federation(decoder, config, strategy, slots or config.cluster.max_clusters)
    shape = memory.Pack(*pack, rows=together * config.local.batch, lanes=together, at_once=packs)
    limit = 0.85 * limit  # the rest is for what nobody plans
    if not config.compute.packs_at_once:
        shape = memory.packs_that_fit(federation, shape, groups, limit, several)
    fitting = memory.groups_that_fit(federation, shape, groups, limit, several)
    return shape.at_once, config.compute.groups_at_once or fitting


def packs_of_a_group(counts: Sequence[int], groups: int) -> int:
    """Packs that a group of lanes trains on together, one of `groups`, where its steps have `counts` packs."""
    return 1 if jax.default_backend() == "cpu" else packing.packs_of_a_turn(counts, PACKS // groups)


def packs(config: Config) -> int:
    """Packs of texts that go through the model together: on a CPU two are faster than one, and four no faster."""
    return config.compute.packs_at_once or (2 if jax.default_backend() == "cpu" else 16)


def packs_with_head(config: Config) -> int:
    """The same where losses are asked for, whose output head is as much work again."""
    return config.compute.packs_at_once or (1 if jax.default_backend() == "cpu" else 8)


def rows(config: Config, model: Model, prompts: Iterable[Sequence[int]]) -> int:
    """Rows that generate together: 64 on a CPU, up to 512 on an accelerator.

    As many as have their keys and values in a quarter of its memory, for prompts like these.
    """
    limit, decoder = memory_limit(), model.config
    if config.compute.rows_at_once or jax.default_backend() == "cpu" or limit is None:
        return config.compute.rows_at_once or 64
    token = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * model.params["embedding"].dtype.itemsize
    longest = sorted(map(len, prompts))[-512:]
    row = (np.mean(longest) + config.data.max_response) * token
    return next((count for count in (512, 256, 128) if count * row <= 0.25 * limit), 64)


def memory_limit() -> int | None:
    """Bytes that JAX may use on a device; None where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
