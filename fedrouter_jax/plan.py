"""What a federation will take, from shapes alone: nothing is loaded, nothing is compiled.

Memory (`memory.py`) is what one device needs for its share of the lanes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from fedrouter_jax import bank, memory
from fedrouter_jax import config as config_lib
from fedrouter_jax import method as method_lib
from fedrouter_jax.config import Config
from fedrouter_jax.data import schedule
from fedrouter_jax.errors import UserError
from fedrouter_jax.federation import even_chunk
from fedrouter_jax.models import DecoderConfig, model_config, module_shapes
from fedrouter_jax.models.parameters import param_shapes

# Shapes of models that may not be at hand, from their published configurations.
SHAPES = {
    "smollm2-135m": DecoderConfig(49152, 576, 30, 9, 3, 64, 1536, rope_theta=1e5, max_positions=8192),
    "smollm2-360m": DecoderConfig(49152, 960, 32, 15, 5, 64, 2560, rope_theta=1e5, max_positions=8192),
    "smollm2-1.7b": DecoderConfig(49152, 2048, 24, 32, 32, 64, 8192, rope_theta=1.3e5, max_positions=8192),
    "llama-3.2-1b": DecoderConfig(128256, 2048, 16, 32, 8, 64, 8192, rope_theta=5e5, max_positions=131072),
    "llama-3.2-3b": DecoderConfig(128256, 3072, 28, 24, 8, 128, 8192, rope_theta=5e5, max_positions=131072),
    "llama-3.1-8b": DecoderConfig(
        128256, 4096, 32, 32, 8, 128, 14336, rope_theta=5e5, max_positions=131072, tied=False
    ),
    "llama-3.1-70b": DecoderConfig(
        128256, 8192, 80, 64, 8, 128, 28672, rope_theta=5e5, max_positions=131072, tied=False
    ),
}


class Plan(NamedTuple):
    """What a run takes."""

    parameters: int
    adapter_parameters: int  # of one adapter, all its leaves
    slots: int
    lanes: int  # a round
    groups: int  # of lanes that share packs, a round
    groups_at_once: int  # on each device
    memory: memory.Memory
    bytes_up: int  # a round, of all clients
    bytes_down: int
    tokens: int  # trained a round
    flops: float  # a round
    seconds: float | None  # a round, at the rate given


def pack_shape(config: Config, row_tokens: int, response_tokens: int) -> memory.Pack:
    """What `packing.shape` comes to for rows of so many tokens on average, the longest as long as the config allows."""
    time = max(512, -(-min(config.data.max_length, 4 * row_tokens) // 64) * 64)
    share = 1.5 * response_tokens / row_tokens
    predicted = max(min(config.data.max_response, time), -(-int(share * time) // 16) * 16)
    lanes = config.compute.lanes_together
    return memory.Pack(time, predicted, lanes * config.local.batch, lanes)


def known_shape(name: str) -> DecoderConfig:
    """The shape of a model by its name; raises `UserError` for one that is neither known nor at hand."""
    if name in SHAPES:
        return SHAPES[name]
    try:
        return model_config(name)
    except UserError as error:
        raise UserError(f"{error}; shapes known without their files: {', '.join(SHAPES)}") from None


def plan(
    config: Config,
    row_tokens: int,
    response_tokens: int,
    devices: int = 1,
    limit: float | None = None,
    rate: float | None = None,
    platform: str | None = None,
) -> Plan:
    """What one round of `config` takes on `devices` devices of `limit` bytes and `rate` FLOP/s each, of a `platform`.

    Nobody has read the data: rows have so many tokens on average, and there are four tasks where the config does not
    say how many clusters. As many groups of lanes run at once as the limit allows (without one: one group). Training
    takes four floating-point operations a parameter and token: forward, and backward through frozen weights.
    """
    config_lib.check(config)
    decoder = known_shape(config.model)
    config_lib.check_length(config, decoder)
    clusters = config.cluster.global_clusters or 4
    strategy = method_lib.strategy(config, clusters)
    method_lib.check(config, strategy)
    start = memory.federation(decoder, config, strategy, clusters, platform)
    data = config.data
    held = config.cluster.local_clusters or min(clusters, {"single": 1, "dual": 2}.get(data.scenario, clusters))
    parallel = config.compute.model_parallel
    if devices % parallel:
        raise UserError(f"--model-parallel is {parallel}, but there are {devices} devices; choose a divisor of that")
    rows_of_devices = devices // parallel
    lanes = method_lib.lanes_of_a_round(config, strategy, held)
    groups, together = schedule.groups_of(lanes, config.compute.lanes_together, rows_of_devices)
    pack = pack_shape(config, row_tokens, response_tokens)
    pack = pack._replace(lanes=together, rows=together * config.local.batch)
    here = groups // rows_of_devices
    fullest = min(1.0, here * together / lanes)  # of the work: a lane is never divided, and all wait for the last
    most = config.compute.groups_at_once or (
        memory.groups_that_fit(start, pack, here, limit, rows_of_devices > 1) if limit else 1
    )
    at_once = even_chunk(here, most)
    shapes = param_shapes(decoder)
    blocks = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["blocks"]))
    tokens = lanes * method_lib.steps_of_a_lane(config, strategy) * config.local.batch * row_tokens
    head = decoder.vocab_size * decoder.width * response_tokens / row_tokens
    phases = method_lib.phases_by_round(strategy, config.rounds.rounds)
    largest = max(bank.wire_bytes(strategy.owners, start.state.bank, of_round) for of_round in phases)
    size = 0 if strategy.pooled else largest
    # Of the last round, when as many clusters of clients are found as there may be.
    found = np.arange(data.clients)[:, None] % clusters
    up, down = strategy.traffic(start.state._replace(round=config.rounds.rounds, table=found), lanes, size)
    moved = sum(i * o for m, (i, o) in module_shapes(decoder).items() if m in config.lora.targets) * decoder.layers
    moved = moved if strategy.base is not None else 0  # beside a kernel lies what moves it, as large
    flops = 4.0 * (blocks + moved + head) * tokens
    adapters = [memory.asked(start, 1)[name] for name in start.state.bank]
    return Plan(
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)),
        adapter_parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(adapters)),
        slots=bank.slots_of(start.state.bank),
        lanes=lanes,
        groups=groups,
        groups_at_once=at_once,
        memory=memory.needed(start, pack, here, at_once, rows_of_devices > 1),
        bytes_up=lanes * up,
        bytes_down=lanes * down,
        tokens=tokens,
        flops=flops,
        seconds=None if rate is None else fullest * flops / (rate * parallel),
    )


def show(found: Plan, config: Config, console: Console, limit: float | None = None) -> None:
    """A table of the plan of a config. What is sent is in MB of a million bytes, as in reports, memory in GiB."""

    def size(count: float) -> str:
        unit = next((u for u in (("GiB", 2**30), ("MiB", 2**20)) if count >= u[1]), ("kiB", 2**10))
        return f"{count / unit[1]:.1f} {unit[0]}"

    lora, rounds = config.lora, config.rounds.rounds
    stored = config.dtype + ("" if config.quantise == "none" else f", linear layers in {config.quantise}")
    rows = [
        ("run", f"{config.model} ({stored}), rank {lora.rank} on {' '.join(lora.targets)}, {rounds} rounds"),
        ("parameters", f"{found.parameters / 1e6:,.1f} million, frozen"),
        ("an adapter", f"{found.adapter_parameters / 1e6:,.2f} million; {found.slots} slots"),
        ("a round", f"{found.lanes} lanes; groups that share packs: {found.groups}, {found.groups_at_once} at once"),
        ("sent up, down", f"{decimal(found.bytes_up)}, {decimal(found.bytes_down)} a round"),
        ("trained", f"{found.tokens:,} tokens, {found.flops / 1e12:,.1f} TFLOP a round"),
        *((f"memory: {name}", size(count)) for name, count in found.memory._asdict().items()),
        ("memory of a device", size(found.memory.total)),
    ]
    if found.seconds is not None:
        whole = f"{duration(rounds * found.seconds)} in all (without embedding and evaluation)"
        rows.append(("time", f"{found.seconds:,.1f} s a round, {whole}"))
    if limit is not None and found.memory.total > limit:
        rows.append(("does not fit", f"{size(limit)} given; try {smaller(config)}"))
    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def duration(seconds: float) -> str:
    """Seconds in the unit that they are read in."""
    unit, name = next((u for u in ((3600, "h"), (60, "min")) if seconds >= 2 * u[0]), (1, "s"))
    return f"{seconds / unit:,.1f} {name}"


def smaller(config: Config) -> str:
    """What takes less memory than a config does, the cheapest first."""
    steps = {
        "--dtype bfloat16": config.dtype == "float32",
        "--quantise nf4": config.quantise == "none" and config.dtype != "mixed",
        "--remat": not config.compute.remat,
        "a smaller --lanes-together": config.compute.lanes_together > 1,
    }
    return ", ".join(step for step, left in steps.items() if left) or "a smaller model"
