"""What a device holds in a round, from shapes alone: nothing is loaded, nothing is compiled.

The activations that gradients keep are not a formula of ours: JAX is asked, by tracing the loss of one pack on abstract
arrays (`jax.eval_shape` of `jax.vjp`), so they follow every change of the model and of a strategy by themselves. What
else a device holds at its fullest was read off what XLA says of a GPU's buffers; for TPUs some of it is fitted to
compiled rounds. `tests/test_plan.py` holds the sum against rounds compiled for a CPU, and against those that
`experiments/ahead.py` compiled for others.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedrouter_jax import client, lora, mesh
from fedrouter_jax import method as method_lib
from fedrouter_jax import server as server_lib
from fedrouter_jax.config import Config
from fedrouter_jax.data.packing import Packs, Rows
from fedrouter_jax.federation import even_chunk
from fedrouter_jax.keys import key_of
from fedrouter_jax.models import DecoderConfig
from fedrouter_jax.models.matrices import computation
from fedrouter_jax.models.parameters import param_shapes
from fedrouter_jax.models.quantise import stored_shapes
from fedrouter_jax.routing import Enrolment, Router
from fedrouter_jax.types import Adapters, FederationState, LoRA, PyTree, Strategy, Work

TILE = 128  # a TPU stores the last dimension in whole tiles of so many; a small one is laid elsewhere


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
    platform: str  # of the devices: "cpu", "gpu" or "tpu"


class Memory(NamedTuple):
    """Bytes on one device."""

    base: int  # frozen weights
    bank: int  # every adapter and what the method remembers, the sums of a round, the server's moments
    batches: int  # tokens of a round
    lanes: int  # adapters in training, summed gradients, optimiser states: of the groups that run at once
    activations: int  # what the blocks keep of the packs of a turn for the way back, of the groups that run at once
    working: int  # the largest results beside those: at the output head, or on the way back

    @property
    def total(self) -> int:
        """All of it, bytes."""
        return sum(self)


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def adapter_shapes(decoder: DecoderConfig, config: lora.LoRAConfig) -> LoRA:
    """One adapter, abstract."""
    return jax.eval_shape(lambda: lora.init(key_of(0), decoder, config))


def pack_rows(pack: Pack, packs: int) -> Rows:
    """So many packs, abstract."""

    def ints(size):
        return jax.ShapeDtypeStruct((packs, size), jnp.int32)

    time = ints(pack.tokens)
    return Rows(Packs(time, time, time), time, time, ints(pack.predicted), ints(pack.predicted))


def kept(federation: Federation, base: PyTree, adapters: Adapters, pack: Pack) -> int:
    """Bytes that the blocks keep of the packs of a turn for their gradient, on one device.

    `adapters` has leaves `[lane, ...]`, abstract.
    """
    decoder, config = federation.decoder, federation.config

    def residuals(adapters, base, rows, keys):
        phases = federation.strategy.phases(1, config.rounds.rounds)
        weights = dict.fromkeys(max((phase.weights for phase in phases), key=len), 1.0)

        def loss(adapters):
            return client.response_losses(
                decoder, config.lora, base, adapters, weights, rows, keys, config.compute.blocks
            ).sum()

        return jax.vjp(loss, adapters)[1]

    keys = jax.eval_shape(lambda: jax.random.split(key_of(0), pack.lanes))
    found = jax.tree.leaves(jax.eval_shape(residuals, adapters, base, pack_rows(pack, pack.at_once), keys))
    # Weights that the backward pass reads are among them, but are not kept twice: nor the adapters in another order.
    given = Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((base, adapters)))
    ordered = {(leaf.size, leaf.dtype) for leaf in jax.tree.leaves(adapters)}
    total = 0
    for (shape, dtype), count in (Counter((leaf.shape, leaf.dtype) for leaf in found) - given).items():
        *rows, last = shape or (1,)
        if last == decoder.vocab_size or (math.prod(shape), dtype) in ordered:  # scores are `working`
            continue
        # What is as wide as the model lies on all devices that share a base; heads and hidden units are divided.
        over = 1 if last == decoder.width else config.compute.model_parallel
        if federation.platform == "tpu" and last > TILE // 4:
            last = -(-last // TILE) * TILE
        total += math.prod(rows) * last * dtype.itemsize * count // over
    return total


def on_a_device(adapters: Adapters, model_parallel: int) -> int:
    """Bytes of adapters where so many devices share a base: what meets its divided sides is divided alike."""
    halves = [of for of in adapters.values() if isinstance(of, LoRA)]
    sizes = [
        nbytes(leaf) // (model_parallel if (module in mesh.INTO) == (part == "b") else 1)
        for adapter in halves
        for part in ("a", "b")
        for module, leaf in getattr(adapter, part).items()
    ]
    rest = [of.gate if isinstance(of, LoRA) else of for of in adapters.values()]  # what lanes are told need not be one
    return sum(sizes) + nbytes(rest)


def federation(
    decoder: DecoderConfig, config: Config, strategy: Strategy, clusters: int, platform: str | None = None
) -> Federation:
    """A federation of the config's clients before its first round; by default for the kind of device here."""
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
    return Federation(decoder, config, strategy, state._replace(server=own), platform or jax.default_backend())


def asked(federation: Federation, lanes: int) -> Adapters:
    """The adapters of so many lanes, leaves `[lane, ...]`, abstract."""
    return jax.eval_shape(federation.strategy.ask, federation.state, _work(lanes))


def _work(lanes: int) -> Work:
    ints = jax.ShapeDtypeStruct((lanes,), jnp.int32)
    return Work(ints, ints, jax.ShapeDtypeStruct((lanes,), jnp.float32))


def needed(federation: Federation, pack: Pack, groups: int, at_once: int, spread: bool = False) -> Memory:
    """What one device needs for `groups` groups of lanes a round, `at_once` of them together; `spread`: of several."""
    decoder, config, parallel = federation.decoder, federation.config, federation.config.compute.model_parallel
    base = stored_shapes(param_shapes(decoder, config.dtype), config.quantise)
    rows = groups * method_lib.steps_of_a_lane(config, federation.strategy) * pack.rows
    adapters = asked(federation, pack.lanes)
    sums = jax.eval_shape(lambda *given: federation.strategy.collect(*given)[0], federation.state, _work(pack.lanes))
    lanes, width = on_a_device(adapters, parallel), computation(config.dtype).itemsize
    tpu = federation.platform == "tpu"
    # Scores of the output head and their gradient, for TPUs once more, in another order; or, when those are gone, a
    # pack's gradient and what an MLP computes.
    head = pack.at_once * pack.predicted * decoder.vocab_size * 4 * (3 if tpu else 2) // parallel
    block = pack.at_once * pack.tokens * decoder.mlp_width * width * 4 // parallel
    # For all groups: beside codes a kernel; and the head's matrix again, for TPUs in another order, for CPUs widened.
    kernel = decoder.width * decoder.mlp_width * width if config.quantise != "none" else 0
    stored = base["embedding"].dtype.itemsize
    again = {"tpu": stored, "cpu": 4 if stored < 4 else 0}.get(federation.platform, 0)
    # Trained, two moments, summed gradients; XLA for TPUs holds more, with the ranks of lanes side by side.
    copies = 8 if tpu else 4
    return Memory(
        base=nbytes(base) // parallel,  # norms apart, which are few
        bank=nbytes((federation.state.bank, federation.state.memory, federation.state.server)) + nbytes(sums),
        batches=4 * rows * (5 * pack.tokens + 2 * pack.predicted),
        # Beside those what was asked for: on a mesh all lanes ask before the first trains.
        lanes=lanes * (copies * at_once + (groups if spread else at_once)),
        activations=kept(federation, base, adapters, pack) * at_once,
        working=max(head, lanes + block) * at_once + kernel + again * decoder.vocab_size * decoder.width // parallel,
    )


def packs_that_fit(federation: Federation, pack: Pack, groups: int, limit: float, spread: bool = False) -> Pack:
    """The pack with `at_once` halved until one of `groups` groups fits in `limit` bytes, or one pack of it is left."""
    while pack.at_once > 1 and needed(federation, pack, groups, 1, spread).total > limit:
        pack = pack._replace(at_once=pack.at_once // 2)
    return pack


def groups_that_fit(federation: Federation, pack: Pack, groups: int, limit: float, spread: bool = False) -> int:
    """How many of `groups` groups of lanes on a device run at once in `limit` bytes, in even chunks; 1 if none fits."""
    one, two = (needed(federation, pack, groups, at_once, spread).total for at_once in (1, 2))
    return even_chunk(groups, int(max(1, 1 + (limit - one) // (two - one))))
