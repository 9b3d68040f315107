"""What a federation will take, from shapes alone: nothing is loaded, nothing is compiled.

Memory is what one device needs for its share of the lanes. The activations that gradients keep are not a formula of
ours: JAX is asked, by tracing the loss of one pack on abstract arrays (`jax.eval_shape` of `jax.vjp`), so the plan
follows every change of the model and of a strategy by itself. `tests/test_plan.py` holds the sum against the memory of
compiled rounds.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from fedrouter_jax import bank, client, lora
from fedrouter_jax import config as config_lib
from fedrouter_jax import server as server_lib
from fedrouter_jax.config import Config
from fedrouter_jax.data import schedule
from fedrouter_jax.data.packing import Packs, Rows
from fedrouter_jax.errors import UserError
from fedrouter_jax.federation import even_chunk
from fedrouter_jax.models import DecoderConfig, model_config
from fedrouter_jax.models.decoder import param_shapes
from fedrouter_jax.models.matrices import computation
from fedrouter_jax.models.quantise import stored_shapes
from fedrouter_jax.routing import Enrolment, Router
from fedrouter_jax.types import Adapters, FederationState, LoRA, PyTree, Strategy, Work

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


class Pack(NamedTuple):
    """The static shape of what a group of lanes trains on."""

    tokens: int  # of one pack
    predicted: int  # response tokens of one pack that reach the output head
    rows: int  # a step's, of all lanes of the group: as many packs are reserved
    lanes: int  # that share packs
    at_once: int = 1  # packs that go through the model together


class Federation(NamedTuple):
    """What memory depends on beside the lanes."""

    decoder: DecoderConfig
    config: Config
    strategy: Strategy
    state: FederationState  # before the first round, abstract


class Memory(NamedTuple):
    """Bytes on one device."""

    base: int  # frozen weights
    bank: int  # every adapter and what the method remembers, the same for the sums of a round, the server's moments
    batches: int  # tokens of a round
    lanes: int  # adapters in training, gradients, optimiser states: of the groups that run at once
    activations: int  # what the backward pass keeps of the packs of a turn, of the groups that run at once
    working: int  # the largest intermediate results beside those

    @property
    def total(self) -> int:
        """All of it, bytes."""
        return sum(self)


class Plan(NamedTuple):
    """What a run takes."""

    parameters: int
    adapter_parameters: int  # of one adapter, all its leaves
    slots: int
    lanes: int  # a round
    groups: int  # of lanes that share packs, a round
    groups_at_once: int  # on each device
    memory: Memory
    bytes_up: int  # a round, of all clients
    bytes_down: int
    tokens: int  # trained a round
    flops: float  # a round
    seconds: float | None  # a round, at the rate given


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def adapter_shapes(decoder: DecoderConfig, config: lora.LoRAConfig) -> LoRA:
    """One adapter, abstract."""
    return jax.eval_shape(lambda: lora.init(jax.random.key(0), decoder, config))


def pack_shape(config: Config, row_tokens: int, response_tokens: int) -> Pack:
    """What `packing.shape` comes to for rows of so many tokens on average, the longest as long as the config allows."""
    time = max(512, -(-min(config.data.max_length, 4 * row_tokens) // 64) * 64)
    share = 1.5 * response_tokens / row_tokens
    predicted = max(min(config.data.max_response, time), -(-int(share * time) // 16) * 16)
    lanes = config.compute.lanes_together
    return Pack(time, predicted, lanes * config.local.batch, lanes)


def pack_rows(pack: Pack, packs: int) -> Rows:
    """So many packs, abstract."""

    def ints(size):
        return jax.ShapeDtypeStruct((packs, size), jnp.int32)

    time = ints(pack.tokens)
    return Rows(Packs(time, time, time), time, time, ints(pack.predicted), ints(pack.predicted))


def kept(federation: Federation, base: PyTree, adapters: Adapters, pack: Pack) -> int:
    """Bytes that the gradient of the packs of a turn keeps; `adapters` has leaves `[lane, ...]`, abstract."""
    decoder, config = federation.decoder, federation.config

    def residuals(adapters, base, rows, keys):
        weights = dict.fromkeys(adapters, 1.0)

        def loss(adapters):
            return client.response_losses(
                decoder, config.lora, base, adapters, weights, rows, keys, config.compute.blocks
            ).sum()

        return jax.vjp(loss, adapters)[1]

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), pack.lanes))
    found = jax.tree.leaves(jax.eval_shape(residuals, adapters, base, pack_rows(pack, pack.at_once), keys))
    # Weights that the backward pass reads are among them, but are not kept twice.
    given = Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((base, adapters)))
    extra = Counter((leaf.shape, leaf.dtype) for leaf in found) - given
    return sum(math.prod(shape) * dtype.itemsize * count for (shape, dtype), count in extra.items())


def federation(decoder: DecoderConfig, config: Config, strategy: Strategy, clusters: int) -> Federation:
    """A federation of the config's clients before its first round."""
    width = decoder.width

    def start(adapter, table, router):
        enrolment = Enrolment(table, clusters, router if strategy.enrolling == "clustering" else (), (), {})
        return strategy.init(dict.fromkeys(strategy.owners, adapter), enrolment)

    def floats(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    router = Router(floats(clusters, width), floats(width), floats(width), jax.ShapeDtypeStruct((), bool))
    columns = clusters if strategy.enrolling == "clustering" else 1
    table = jax.ShapeDtypeStruct((config.data.clients, columns), jnp.int32)
    state = jax.eval_shape(start, adapter_shapes(decoder, config.lora), table, router)
    server = server_lib.optimiser(config.rounds.server, config.rounds.server_rate)
    own = jax.eval_shape(lambda bank: server_lib.init(server, strategy.owners, bank), state.bank)
    return Federation(decoder, config, strategy, state._replace(server=own))


def steps(config: Config, strategy: Strategy) -> int:
    """Optimiser steps of a lane: those of all clients that take part where their rows are pooled."""
    clients = schedule.taking_part(config.data.clients - config.data.newcomers, config.rounds.participation)
    return config.local.steps * (clients if strategy.pooled else 1)


def lanes_of_a_round(config: Config, strategy: Strategy, held: int) -> int:
    """Lanes of a round where clients hold so many clusters; one where their rows are pooled."""
    clients = schedule.taking_part(config.data.clients - config.data.newcomers, config.rounds.participation)
    each = min(config.rounds.clusters_per_round or held, held) if strategy.enrolling in ("clustering", "tasks") else 1
    return 1 if strategy.pooled else clients * each


def asked(federation: Federation, lanes: int) -> Adapters:
    """The adapters of so many lanes, leaves `[lane, ...]`, abstract."""
    ints = jax.ShapeDtypeStruct((lanes,), jnp.int32)
    work = Work(ints, ints, jax.ShapeDtypeStruct((lanes,), jnp.float32))
    return jax.eval_shape(federation.strategy.ask, federation.state, work)


def memory(federation: Federation, pack: Pack, groups: int, at_once: int, spread: bool = False) -> Memory:
    """What one device needs for `groups` groups of lanes a round, `at_once` of them together; `spread`: of several."""
    decoder, config = federation.decoder, federation.config
    base = stored_shapes(param_shapes(decoder, config.dtype), config.quantise)
    lanes = asked(federation, pack.lanes)
    width = computation(config.dtype).itemsize
    # Scores of the output head and their gradient, or an MLP's intermediates; beside codes a kernel,
    # which all groups share.
    head = pack.at_once * pack.predicted * decoder.vocab_size * 4 * 2
    block = pack.at_once * pack.tokens * decoder.mlp_width * width * 4
    kernel = decoder.width * decoder.mlp_width * width if config.quantise != "none" else 0
    return Memory(
        base=nbytes(base) // config.compute.model_parallel,  # norms apart, which are few
        bank=2 * nbytes((federation.state.bank, federation.state.memory)) + nbytes(federation.state.server),
        batches=4 * groups * steps(config, federation.strategy) * pack.rows * (5 * pack.tokens + 2 * pack.predicted),
        # Asked for and sent back; received, trained, two gradients (a pack's, their sum), two moments. On a mesh all
        # lanes ask before the first trains.
        lanes=nbytes(lanes) * (6 * at_once + (groups if spread else at_once)),
        activations=kept(federation, base, lanes, pack) * at_once,
        working=max(head, block) * at_once + kernel,
    )


def packs_that_fit(federation: Federation, pack: Pack, groups: int, limit: float, spread: bool = False) -> Pack:
    """The pack with `at_once` halved until one of `groups` groups fits in `limit` bytes, or one pack of it is left."""
    while pack.at_once > 1 and memory(federation, pack, groups, 1, spread).total > limit:
        pack = pack._replace(at_once=pack.at_once // 2)
    return pack


def groups_that_fit(federation: Federation, pack: Pack, groups: int, limit: float, spread: bool = False) -> int:
    """How many of `groups` groups of lanes on a device run at once in `limit` bytes, in even chunks; 1 if none fits."""
    one, two = (memory(federation, pack, groups, at_once, spread).total for at_once in (1, 2))
    return even_chunk(groups, int(max(1, 1 + (limit - one) // (two - one))))


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
) -> Plan:
    """What one round of `config` takes on `devices` devices of `limit` bytes and `rate` FLOP/s each.

    Nobody has read the data: rows have so many tokens on average, and there are four tasks where the config does not
    say how many clusters. As many groups of lanes run at once as the limit allows (without one: one group). Training
    takes four floating-point operations a parameter and token: forward, and backward through frozen weights.
    """
    config_lib.check(config)
    decoder = known_shape(config.model)
    config_lib.check_length(config, decoder)
    clusters = config.cluster.global_clusters or 4
    strategy = config_lib.strategy(config, clusters)
    config_lib.check_strategy(config, strategy)
    start = federation(decoder, config, strategy, clusters)
    data = config.data
    held = config.cluster.local_clusters or min(clusters, {"single": 1, "dual": 2}.get(data.scenario, clusters))
    parallel = config.compute.model_parallel
    if devices % parallel:
        raise UserError(f"--model-parallel is {parallel}, but there are {devices} devices; choose a divisor of that")
    rows_of_devices = devices // parallel
    lanes = lanes_of_a_round(config, strategy, held)
    groups, together = schedule.groups_of(lanes, config.compute.lanes_together, rows_of_devices)
    pack = pack_shape(config, row_tokens, response_tokens)
    pack = pack._replace(lanes=together, rows=together * config.local.batch)
    here = groups // rows_of_devices
    fullest = min(1.0, here * together / lanes)  # of the work: a lane is never divided, and all wait for the last
    most = config.compute.groups_at_once or (
        groups_that_fit(start, pack, here, limit, rows_of_devices > 1) if limit else 1
    )
    at_once = even_chunk(here, most)
    shapes = param_shapes(decoder)
    blocks = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["blocks"]))
    tokens = lanes * steps(config, strategy) * config.local.batch * row_tokens
    head = decoder.vocab_size * decoder.width * response_tokens / row_tokens
    size = 0 if strategy.pooled else bank.wire_bytes(strategy.owners, start.state.bank)
    # Of the last round, when as many clusters of clients are found as there may be.
    found = np.arange(data.clients)[:, None] % clusters
    up, down = strategy.traffic(start.state._replace(round=config.rounds.rounds, table=found), lanes, size)
    flops = 4.0 * (blocks + head) * tokens
    return Plan(
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)),
        adapter_parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(asked(start, 1))),
        slots=max(leaf.shape[0] for leaf in jax.tree.leaves(start.state.bank)),
        lanes=lanes,
        groups=groups,
        groups_at_once=at_once,
        memory=memory(start, pack, here, at_once, rows_of_devices > 1),
        bytes_up=lanes * up,
        bytes_down=lanes * down,
        tokens=tokens,
        flops=flops,
        seconds=None if rate is None else fullest * flops / (rate * parallel),
    )


def show(found: Plan, console: Console, limit: float | None = None) -> None:
    """A table of a plan."""

    def size(count: float) -> str:
        unit = next((u for u in (("GiB", 2**30), ("MiB", 2**20)) if count >= u[1]), ("kiB", 2**10))
        return f"{count / unit[1]:.1f} {unit[0]}"

    rows = [
        ("parameters", f"{found.parameters / 1e6:,.1f} million, frozen"),
        ("an adapter", f"{found.adapter_parameters / 1e6:,.2f} million; {found.slots} slots"),
        ("a round", f"{found.lanes} lanes; groups that share packs: {found.groups}, {found.groups_at_once} at once"),
        ("sent up, down", f"{size(found.bytes_up)}, {size(found.bytes_down)} a round"),
        ("trained", f"{found.tokens:,} tokens, {found.flops / 1e12:,.1f} TFLOP a round"),
        *((f"memory: {name}", size(count)) for name, count in found.memory._asdict().items()),
        ("memory of a device", size(found.memory.total)),
    ]
    if found.seconds is not None:
        rows.append(("time", f"{found.seconds:,.1f} s a round"))
    if limit is not None and found.memory.total > limit:
        rows.append(("does not fit", f"{size(limit)} given; try --remat, --quantise nf4 or a smaller --lanes-together"))
    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
