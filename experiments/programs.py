"""The programs of a run from abstract arrays, lowered for the device here or for devices that are only described."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedrouter_jax import embed, experiment, generate, lora, memory, mesh, models, plan, routing
from fedrouter_jax import method as method_lib
from fedrouter_jax.config import Config
from fedrouter_jax.data.packing import Batch, Packs
from fedrouter_jax.models import DecoderConfig
from fedrouter_jax.models.matrices import as_bits
from fedrouter_jax.models.parameters import param_shapes
from fedrouter_jax.models.quantise import stored_shapes
from fedrouter_jax.types import Array, PyTree, Work

_PACKS, _ROWS = 16, 64  # of texts or prompts at once, the default on an accelerator; rows that are answered together
_WHOLE = P()
CLUSTERS = 4
GROUPS = 8  # of lanes, for each row of devices: 64 lanes
ROW, RESPONSE = 80, 20  # tokens of flan4's rows, and of their answers
SMALL = DecoderConfig(512, 128, 2, 8, 4, 16, 256)  # for --smoke


class Case(NamedTuple):
    """A federation on some devices."""

    target: str
    shape: str
    devices: int = 1
    model_parallel: int = 1
    dtype: str = "bfloat16"
    quantise: str = "none"
    remat: bool = False

    @property
    def base(self) -> str:
        """How the base is held, in words."""
        stored = self.dtype if self.quantise == "none" else f"{self.quantise}, {self.dtype}"
        return stored + ", remat" * self.remat


def laid_out(case: Case) -> tuple[memory.Federation, memory.Pack, int]:
    """The federation of a case, its packs, and over how many rows of devices it is spread."""
    rows = case.devices // case.model_parallel
    decoder = SMALL if case.shape == "small" else plan.SHAPES[case.shape]
    config = Config(dtype=case.dtype, quantise=case.quantise)
    config = replace(
        config,
        data=replace(config.data, clients=rows * GROUPS * config.compute.lanes_together),
        compute=replace(config.compute, model_parallel=case.model_parallel, remat=case.remat),
    )
    strategy = method_lib.strategy(config, CLUSTERS)
    platform = "tpu" if case.target.startswith("TPU") else "gpu"
    federation = memory.federation(decoder, config, strategy, CLUSTERS, platform)
    return federation, plan.pack_shape(config, ROW, RESPONSE), rows


def held(program: jax.stages.Compiled) -> int:
    """Bytes of a device that a program needs: arguments, results that are no arguments, temporary room, itself."""
    sizes = program.memory_analysis()
    fresh = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + fresh + sizes.generated_code_size_in_bytes


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    """An abstract array of int32."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def base_of(federation: memory.Federation, on: Mesh | None) -> PyTree:
    """The base's abstract parameters, on a mesh or as they lie on a CPU."""
    base = stored_shapes(param_shapes(federation.decoder, federation.config.dtype), federation.config.quantise)
    return jax.eval_shape(as_bits, base) if on is None else mesh.place_base(on, base)


def round_of(
    federation: memory.Federation, pack: memory.Pack, groups: int, at_once: int, on: Mesh | None = None
) -> jax.stages.Lowered:
    """A round of so many groups of lanes, lowered for the devices of a mesh, by default for the one here."""
    decoder, config, strategy, state, _ = federation
    several = on if on is not None and on.size > 1 else None
    run = experiment.round_program(config, decoder, strategy, pack.at_once, at_once, several)
    lanes, lead = groups * pack.lanes, (groups, config.local.steps)
    rows = jax.tree.map(lambda leaf: ints(*lead, *leaf.shape), memory.pack_rows(pack, pack.rows))
    work, batch = Work(ints(lanes), ints(lanes), jax.ShapeDtypeStruct((lanes,), jnp.float32)), Batch(rows, ints(*lead))
    key = jax.eval_shape(lambda: jax.random.key(0))
    if on is not None:
        state = mesh.place_state(on, strategy, state)
        batch = everywhere(on, batch, P(mesh.CLIENTS))
        work, key = everywhere(on, (work, key))
    return run.lower(state, base_of(federation, on), work, batch, key)


def phases(federation: memory.Federation, time: int, clusters: int, on: Mesh) -> dict[str, jax.stages.Lowered]:
    """Embedding texts, reading prompts and writing answers, lowered: packs of `time` tokens, an adapter a cluster."""
    decoder, config = federation.decoder, federation.config
    recipe = routing.RECIPES[config.cluster.recipe]
    base = base_of(federation, on)
    rows, pages = _ROWS, 2 * _ROWS
    slots = jax.eval_shape(lora.concatenate, memory.asked(federation, clusters)["main"])
    gates = jax.ShapeDtypeStruct((rows, clusters * config.lora.rank), jnp.float32)

    def start() -> generate.Answering:
        dealt, new = np.zeros(pages, np.int32), config.data.max_response
        cache = models.empty_cache(decoder, rows, dealt, dealt, new, base["embedding"].dtype)
        return generate.Answering(cache, jnp.zeros(rows, jnp.int32), jnp.zeros((rows, new), jnp.int32))

    def packs(*lead: int) -> Array:
        return ints(*lead, _PACKS, time)

    state, slots, gates = everywhere(on, (jax.eval_shape(start), slots, gates))
    turns = -(-rows // _PACKS)
    here, turn, owner, lengths, dealt, number = everywhere(
        on, (Packs(*[packs()] * 3), Packs(*[packs(turns)] * 3), packs(turns), ints(rows), (ints(pages),) * 2, ints())
    )
    layers = embed.blocks(decoder, recipe.depth)
    shallow = base | {"blocks": jax.tree.map(lambda leaf: leaf.update(shape=(layers, *leaf.shape[1:])), base["blocks"])}
    first = replace(decoder, layers=layers)
    return {
        "embedding": embed.pooled.lower(first, shallow, here, None, None, recipe.depth is None, False, recipe.skip),
        "reading": generate.prefill.lower(
            decoder, base, turn, owner, number, lengths, dealt, state, slots, gates, stop=0
        ),
        "writing": generate.decode.lower(decoder, base, number, state, slots, gates, stop=0),
    }


def everywhere(on: Mesh, tree: PyTree, spec: P = _WHOLE) -> PyTree:
    """Abstract arrays on a mesh: whole on every device, or as the spec says."""
    return jax.tree.map(lambda leaf: mesh.put(leaf, NamedSharding(on, spec)), tree)
