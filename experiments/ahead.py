# ruff: noqa: E402 (what JAX finds when it is imported is settled before that)
"""A federation compiled for accelerators that are not here: whether it compiles, memory beside the plan, traffic.

    python -m experiments.ahead                 minutes on two cores; ahead.json and ahead.md in docs/bench
    python -m experiments.ahead --smoke         a small shape, for one kind of device

JAX compiles for devices it is only told about: for a TPU with libtpu, for an NVIDIA GPU with its CUDA plugin. Both come
from PyPI and are looked for beside the environment, where they do not get in the way of JAX on a CPU:

    pip install --no-deps --target .venv/tpu "libtpu==V"                V as JAX's extra `tpu` asks; `make test` does it
    pip install --target .venv/cuda "jax-cuda13-plugin[with-cuda]==J"   J as JAX (or 12 for 13); 5 GB

What is compiled is what a run would run, from abstract arrays: nothing is loaded and nothing computed. Bytes and
collectives are those of the program. A TPU's compiler writes beside each instruction how many cycles it expects; their
sum says what a round would take if it were right, and no clock has ever said that it is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

for beside in ("tpu", "cuda"):
    sys.path.append(str(Path(sys.prefix) / beside))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# There is no cloud to ask, and no TPU that two processes could want.
for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")

import importlib.util
import json
import time as clock
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from rich.console import Console

from experiments import hlo, programs
from experiments.measurements import show_markdown
from experiments.programs import CLUSTERS, GROUPS, Case
from fedrouter_jax import files, memory, mesh
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import attention
from fedrouter_jax.models.parameters import param_shapes
from fedrouter_jax.terminal import guarded, parse

GIB = 2**30


class Target(NamedTuple):
    """A kind of device that a compiler knows."""

    platform: str
    topology: str  # the smallest there is, or one machine
    memory: float  # GiB of a device
    flops_a_cycle: int | None = None  # of a TPU chip, in bfloat16: peak rate by clock

    def devices(self) -> list:
        """The devices of the topology, which nobody can run anything on."""
        if self.platform == "cuda":
            options = {"platform": "cuda", "topology": self.topology, "target_config": H100}
            return topologies.get_topology_desc(**options).devices
        return topologies.get_topology_desc(self.topology, self.platform).devices


# What CUDA reports of the device (NVIDIA's data sheet and programming guide, compute capability 9.0).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

TARGETS = {
    "TPU v5e": Target("tpu", "v5e:2x2", 16, 4 * 2 * 128**2),  # 197 TFLOP/s at 1.5 GHz
    "TPU v6e": Target("tpu", "v6e:2x2", 32, 2 * 4 * 256**2),  # 918 at 1.75
    "H100": Target("cuda", "1x1x8", 80),
}


CASES = [
    Case("TPU v5e", "smollm2-135m", dtype="float32"),
    Case("TPU v5e", "smollm2-135m", dtype="mixed"),
    Case("TPU v5e", "smollm2-135m"),
    Case("TPU v5e", "smollm2-135m", 4),
    Case("TPU v5e", "llama-3.2-1b", 4),
    Case("TPU v5e", "llama-3.2-1b", 4, remat=True),
    Case("TPU v5e", "llama-3.1-8b", 4, quantise="nf4", remat=True),
    Case("TPU v5e", "llama-3.1-8b", 4, 4, remat=True),
    Case("TPU v6e", "llama-3.1-8b", 4, 2, remat=True),
    Case("TPU v6e", "llama-3.2-1b", 4, 2),
    Case("TPU v6e", "llama-3.1-8b", 4, 4),
    Case("H100", "smollm2-135m", dtype="mixed"),
    Case("H100", "smollm2-135m"),
    Case("H100", "llama-3.2-1b"),
    Case("H100", "llama-3.2-3b"),
    Case("H100", "llama-3.1-8b"),
    Case("H100", "llama-3.1-8b", 2, 2),
    Case("H100", "llama-3.1-8b", quantise="nf4"),
    Case("H100", "llama-3.1-8b", quantise="nf4", remat=True),
    Case("H100", "llama-3.1-70b", 8, 8, remat=True),
]


@dataclass(frozen=True)
class Ahead:
    """Rounds, embedding and answering, compiled for accelerators that are not here."""

    targets: tuple[str, ...] = tuple(TARGETS)
    """Kinds of devices to compile for."""
    smoke: bool = False
    """A small shape on one TPU, and on four."""
    out: Path | None = None
    """Folder for ahead.json and ahead.md; by default docs/bench, or runs/bench with --smoke."""


def main(options: Ahead) -> None:
    """Compile, write, show."""
    jax.config.update("jax_enable_compilation_cache", False)  # programs for other devices cannot be read back here
    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown:
        raise UserError(f"no target is called {unknown[0]!r}; choose among {', '.join(TARGETS)}")
    cases = [Case("TPU v5e", "small"), Case("TPU v5e", "small", 4, 2)] if options.smoke else CASES
    cases = [case for case in cases if case.target in options.targets]
    compilers = {"tpu": ("libtpu",), "cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin")}
    for platform in sorted({TARGETS[case.target].platform for case in cases}):
        if not any(map(importlib.util.find_spec, compilers[platform])):
            raise UserError(
                f"the compiler for {platform} is missing ({compilers[platform][0]}); the top of experiments/ahead.py "
                "says how to install it, and --targets leaves devices out"
            )
    out = options.out or Path("runs/bench" if options.smoke else "docs/bench")
    console, rows = Console(stderr=True), []
    for case in cases:
        # Whose attention it is and how norms add up depend on the device here when a program is traced.
        gpu = TARGETS[case.target].platform == "cuda"
        with (
            mock.patch.object(attention, "compute_capability", lambda gpu=gpu: "9.0" if gpu else ""),
            mock.patch.object(jax, "default_backend", lambda gpu=gpu: "gpu" if gpu else "tpu"),
        ):
            rows.append({**case._asdict(), "base": case.base, "jax": jax.__version__, **compiled(case)})
        console.print(rows[-1])
        jax.clear_caches()
        found = {"rows": rows}
        files.write(out / "ahead.json", json.dumps(found, indent=1) + "\n")
        files.write(out / "ahead.md", markdown(found))
    show_markdown(out / "ahead.md")


def compiled(case: Case) -> dict:
    """What the compiler says of a round, of embedding and of answering, and what was planned."""
    target = TARGETS[case.target]
    on = mesh.make(case.model_parallel, target.devices()[: case.devices])
    federation, pack, rows = programs.laid_out(case)
    decoder, config = federation.decoder, federation.config
    at_once = memory.groups_that_fit(federation, pack, GROUPS, 0.85 * target.memory * GIB, rows > 1)
    planned = memory.needed(federation, pack, GROUPS, at_once, rows > 1)

    before = clock.perf_counter()
    program = programs.round_of(federation, pack, rows * GROUPS, at_once, on).compile()
    seconds = clock.perf_counter() - before
    text, steps = program.as_text(), config.local.steps
    found = {
        "groups_at_once": at_once,
        "planned": planned.total,
        "round": programs.held(program),
        "seconds_to_compile": round(seconds, 1),
        "loops_of_steps": sum(" while(" in line and loops[-1] == steps for line, loops in hlo.instructions(text)),
        "sent": hlo.traffic(text),
        "bank": memory.nbytes(federation.state.bank),
    }
    if target.flops_a_cycle:
        packs = steps * -(-GROUPS // at_once) * at_once  # one of every group in a step
        blocks = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(decoder)["blocks"])) / case.model_parallel
        found["cycles_a_pack"] = round(hlo.cycles(text) / packs)
        found["share_of_peak"] = 4 * blocks * pack.tokens / (found["cycles_a_pack"] * target.flops_a_cycle)
    row = Mesh(on.devices[:1], on.axis_names)  # each embeds and answers by itself
    others = programs.phases(federation, pack.tokens, CLUSTERS, row)
    return found | {name: programs.held(lowered.compile()) for name, lowered in others.items()}


def markdown(found: dict) -> str:
    """A row a case."""
    versions = sorted({f"jax {row['jax']} ({row['target']})" for row in found["rows"]})
    lines = [
        "# Compiled ahead for accelerators",
        "",
        f"{', '.join(versions)}; compiled on a CPU by the compilers of the devices, which have not run any of it. "
        f"{GROUPS} groups of 8 lanes on each row of devices, as many at once as the plan says fit, ten steps of 16 "
        "rows in packs of 512 tokens. GiB of one device. *Sent* is what a device gives in a round, as a share of the "
        "bank's bytes, and MB in the loops, each taken once. *Of peak* is what the compiler of a TPU expects: four "
        "operations a parameter of the blocks and token, over what the chip could do in the cycles it counts; not a "
        "measurement.",
        "",
        "| device | shape | base | devices | of them share a base | groups at once | planned | compiled | ratio "
        "| embedding | reading prompts | writing | sent | in loops | of peak |",
        "|---" * 15 + "|",
    ]
    for row in found["rows"]:
        sizes = [f"{row[name] / GIB:.2f}" for name in ("planned", "round")]
        others = [f"{row[name] / GIB:.2f}" for name in ("embedding", "reading", "writing")]
        inside = sum(size for name, size in row["sent"].items() if name.endswith("in loops"))
        sent = sum(row["sent"].values()) - inside
        peak = f"{100 * row['share_of_peak']:.0f} %" if "share_of_peak" in row else ""
        cells = [
            row["target"], row["shape"], row["base"], row["devices"], row["model_parallel"], row["groups_at_once"],
            *sizes, f"**{row['planned'] / row['round']:.2f}**", *others,
            f"{sent / row['bank']:.2f}" if sent else "", f"{inside / 1e6:.0f}" if inside else "", peak,
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    arguments = parse(Ahead, prog="python -m experiments.ahead")
    sys.exit(guarded(lambda: main(arguments)))
