"""How near the machine's limit local training comes, by the model's shape: random weights, rows as long as flan4's.

    python -m experiments.limit                                         minutes on two cores
    python -m experiments.limit --shapes llama-3.2-1b llama-3.1-8b --dtypes bfloat16 --groups 4 --batch 8
    python -m experiments.limit --profile                               what the time goes into, too
    JAX_NUM_CPU_DEVICES=2 python -m experiments.limit --groups 2        each core a device, for a group of its own
    python -m experiments.limit --smoke                                 a small shape, to see that it works

Counted are useful tokens (no padding) and four floating-point operations a parameter of the blocks, which is what LoRA
needs: two forward, two back to the inputs, none for the frozen weights' gradients. The limit is the rate of a large
product of matrices of the type that the model's are multiplied in, measured in the same turns.
"""

from __future__ import annotations

import sys
import time as clock
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from rich.console import Console

from experiments.measurements import keep
from experiments.profiled import KINDS, REST, profiled
from experiments.rates import matrix_rate
from experiments.sweep import at_least_one
from fedrouter_jax import client, lora, mesh
from fedrouter_jax.at_once import packs_of_a_group
from fedrouter_jax.data import packing, schedule
from fedrouter_jax.data.tokens import Tokens
from fedrouter_jax.errors import UserError
from fedrouter_jax.federation import all_groups, over_clients
from fedrouter_jax.memory import nbytes
from fedrouter_jax.models import Blocks, DecoderConfig, on_device
from fedrouter_jax.models.matrices import MATRICES, as_bits
from fedrouter_jax.models.parameters import param_shapes
from fedrouter_jax.models.quantise import Quantise, quantise
from fedrouter_jax.plan import SHAPES
from fedrouter_jax.terminal import guarded, parse
from fedrouter_jax.types import Array, Phase, PyTree

SMALL = DecoderConfig(512, 64, 2, 4, 2, 16, 128)  # for --smoke
MEAN, LONGEST, ANSWER = 80, 320, 20  # tokens of flan4's rows: on average and at most, and of an answer


@dataclass(frozen=True)
class Limit:
    """Training beside the rate of a large product of matrices."""

    shapes: tuple[str, ...] = ("smollm2-135m", "smollm2-360m", "llama-3.2-1b")
    """Shapes of models, of those that `fedrouter plan` knows by name; weights are drawn."""
    dtypes: tuple[Literal["float32", "mixed", "bfloat16"], ...] = ("float32", "mixed")
    """Types of the base and of what is computed."""
    quantise: Quantise = "none"
    """How the frozen matrices are stored."""
    unroll: bool = False
    """Blocks are compiled one by one, not as turns of a loop."""
    packs: int | None = None
    """Packs that train together; by default as in a run."""
    lanes: int = 8
    """Lanes of a group, which share packs."""
    groups: int = 1
    """Groups that run at once, as many on each device."""
    batch: int = 2
    """Rows of a lane's optimiser step."""
    steps: int = 2
    """Optimiser steps of a turn."""
    turns: int = 3
    """How often each is timed, after a run that compiles."""
    profile: bool = False
    """One more turn, under JAX's profiler: what its time goes into."""
    smoke: bool = False
    """A small shape and one turn; the figures mean nothing."""
    out: Path | None = None
    """Folder for limit.json and limit.md; by default docs/bench, or runs/bench with --smoke."""


def main(options: Limit) -> None:
    """Measure, write, show."""
    at_least_one(lanes=options.lanes, groups=options.groups, batch=options.batch, steps=options.steps)
    at_least_one(turns=options.turns)
    devices = jax.device_count()
    if options.groups % devices:
        raise UserError(f"--groups is {options.groups}, but there are {devices} devices; give a multiple of that")
    if options.profile:  # a program kept from earlier may go by the names of earlier code
        jax.config.update("jax_compilation_cache_dir", None)
    if options.smoke:
        options = replace(options, turns=1)
    shapes = {"small": SMALL} if options.smoke else {name: SHAPES.get(name) for name in options.shapes}
    unknown = [name for name, shape in shapes.items() if shape is None]
    if unknown:
        raise UserError(f"no shape is called {unknown[0]!r}; choose among {', '.join(SHAPES)}")
    console, rows = Console(stderr=True), []
    for name, decoder in shapes.items():
        for dtype in options.dtypes:
            rows.append({"shape": name, "dtype": dtype, **measure(decoder, dtype, options)})
            console.print(rows[-1])
    found = {
        "device": jax.devices()[0].device_kind,
        "devices": devices,
        "jax": jax.__version__,
        "load": {name: getattr(options, name) for name in ("quantise", "lanes", "groups", "batch", "steps", "turns")},
        "rows": rows,
    }
    keep("limit", found, markdown(found), options.out, options.smoke)


def measure(decoder: DecoderConfig, dtype: str, options: Limit) -> dict:
    """Medians over turns of useful tokens a second, the share of the matrix rate, and that rate."""
    config = lora.LoRAConfig()
    base = quantise(drawn(decoder, dtype), options.quantise)
    base = on_device(as_bits(base) if jax.default_backend() == "cpu" else base)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(decoder)["blocks"]))
    lanes = options.groups * options.lanes
    batch, useful = rows_of_a_turn(decoder, options)
    fresh = lora.init(jax.random.key(1), decoder, config)
    adapters = {"main": jax.tree.map(lambda leaf: jnp.repeat(leaf[None], lanes, axis=0), fresh)}
    local, counts = client.LocalConfig(options.steps, options.batch), np.asarray(batch.count).ravel()
    here = options.groups // jax.device_count()
    packs = options.packs or packs_of_a_group(counts, here)
    update = client.make_client_update(decoder, config, local, Blocks(unroll=options.unroll), packs)
    phases = (Phase(train=True, weights={"main": 1.0}),)

    def group(base: PyTree, held: tuple[PyTree, Array], batch: packing.Batch) -> PyTree:
        return update(base, held[0], batch, 1e-3, held[1], phases)

    on = mesh.make() if jax.device_count() > 1 else None
    if on is not None:
        base, batch = mesh.place_base(on, base), mesh.place_batches(on, batch)

    @jax.jit
    def train(base, adapters, batch):
        keys = jax.random.split(jax.random.key(2), lanes)
        by_row = over_clients(on, partial(all_groups, group), PartitionSpec(mesh.CLIENTS))
        return by_row(base, (adapters, keys), batch)

    compiled = train.lower(base, adapters, batch).compile()
    jax.block_until_ready(compiled(base, adapters, batch))
    seconds, matrix = [], []
    for _ in range(options.turns):
        matrix.append(matrix_rate("float32" if dtype == "float32" else "bfloat16"))
        before = clock.perf_counter()
        jax.block_until_ready(compiled(base, adapters, batch))
        seconds.append(clock.perf_counter() - before)
    reached = 4 * parameters * useful / np.array(seconds)
    computed = (-(-counts // packs) * packs).sum() * batch.rows.lane.shape[-1]
    return {
        "blocks": "unrolled" if options.unroll else "loop",
        "packs": packs,
        "block_parameters": parameters,
        "base_bytes": nbytes(base),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "useful_tokens": useful,
        "useful_share": float(useful / computed),
        "seconds": seconds,
        "tokens_a_second": float(useful / np.median(seconds)),
        "flops": float(np.median(reached)),
        "matrix_rate": float(np.median(matrix)),
        "share": float(np.median(reached / np.array(matrix))),
        **({"profile": profiled(compiled, base, adapters, batch)} if options.profile else {}),
    }


def drawn(decoder: DecoderConfig, dtype: str) -> PyTree:
    """Random weights of the base, leaf by leaf: a draw of all at once needs several times their memory."""
    seeds = count()

    def leaf(path, shape):
        if path[-1].key not in MATRICES:
            return jnp.ones(shape.shape, shape.dtype)
        return 0.02 * jax.random.normal(jax.random.key(next(seeds)), shape.shape, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, param_shapes(decoder, dtype))


def rows_of_a_turn(decoder: DecoderConfig, options: Limit) -> tuple[packing.Batch, int]:
    """Random rows in packs, leaves `[group, step, ...]`, and their tokens: lengths are log-normal about `MEAN`."""
    rng = np.random.default_rng(0)

    def row() -> Tokens:
        length = int(np.clip(rng.lognormal(np.log(MEAN) - 0.18, 0.6), 2 * ANSWER, LONGEST))
        ids = rng.integers(0, decoder.vocab_size, length).tolist()
        return Tokens(ids[:-ANSWER], ids[-ANSWER:], False)

    drawn = [
        [[[row() for _ in range(options.batch)] for _ in range(options.lanes)] for _ in range(options.steps)]
        for _ in range(options.groups)
    ]
    clients = [rows for steps in drawn for step in steps for rows in step]
    time, predicted = packing.shape(clients, options.batch, options.lanes)
    packs = options.lanes * options.batch
    batch = schedule.stack(
        [schedule.stack([packing.batch(step, packs, time, predicted) for step in steps]) for steps in drawn]
    )
    return batch, sum(row.length for rows in clients for row in rows)


def markdown(found: dict) -> str:
    """A row a shape and type."""
    load = found["load"]
    stored = "" if load["quantise"] == "none" else f", matrices in {load['quantise']}"
    devices = "device" if found.get("devices", 1) == 1 else f"{found['devices']} devices"
    lines = [
        "# Training beside the limit",
        "",
        f"Random weights{stored}; {load['groups']} group(s) of {load['lanes']} lanes, {load['steps']} steps of "
        f"{load['batch']} random rows, as long as flan4's; {devices} {found['device']}, jax {found['jax']}. Median of "
        f"{load['turns']} turns. Useful tokens, four operations a parameter of the blocks and token; the matrix rate "
        "is that of a large product, in float32 or bfloat16, in the same turns.",
        "",
        "| shape | base | blocks | packs together | useful tokens a second | GFLOP/s | matrix rate | share | useful, "
        "of those computed |",
        "|---" * 9 + "|",
    ]
    for row in found["rows"]:
        rates = f"{row['tokens_a_second']:,.0f} | {row['flops'] / 1e9:,.0f} | {row['matrix_rate'] / 1e9:,.0f}"
        shares = f"**{100 * row['share']:.0f} %** | {100 * row['useful_share']:.0f} %"
        how = f"{row.get('blocks', 'loop')} | {row.get('packs', 1)}"
        lines.append(f"| {row['shape']} | {row['dtype']} | {how} | {rates} | {shares} |")
    traced = [row for row in found["rows"] if "profile" in row]
    if traced:
        kinds = [kind for kind in (*KINDS, REST) if any(kind in row["profile"] for row in traced)]
        lines += [
            "",
            "What one more turn spent its time on, by JAX's profiler, in per cent (`experiments/profiled.py`):",
            "",
            f"| shape | base | blocks | {' | '.join(kinds)} |",
            "|---" * (3 + len(kinds)) + "|",
        ]
    for row in traced:
        total = sum(row["profile"].values())
        shares = " | ".join(f"{100 * row['profile'].get(kind, 0) / total:.0f}" for kind in kinds)
        lines.append(f"| {row['shape']} | {row['dtype']} | {row['blocks']} | {shares} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    arguments = parse(Limit, prog="python -m experiments.limit")
    sys.exit(guarded(lambda: main(arguments)))
