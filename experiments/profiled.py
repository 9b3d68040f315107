"""What the time of a compiled program goes into, by JAX's profiler: seconds by kind of work.

A kernel is known by what JAX calls the instruction it runs, with the scopes of our code (`jax.named_scope`), and where
that is not on record (library calls in a CUDA graph) by its own name. What the compiler fused counts as its last
instruction.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from experiments import hlo

# The first that fits. Kernels of libraries are sdpa and fmha (cuDNN), nvjet, xmma and cutlass (cuBLAS).
KINDS = {
    "attention": r"attention|sdpa|fmha",
    "adapters": r"adapter",
    "head and loss": r"loss",
    "norms": r"norm/|norm\)",
    "optimiser": r"optimiser",
    "frozen matrices": r"_proj|nvjet|xmma|cutlass|gemm",
    "copies": r"[Mm]em(cpy|set)|copy|slice|concatenate",
}
REST = "SwiGLU, residuals and the rest"


def profiled(program: jax.stages.Compiled, *arguments) -> dict[str, float]:
    """Seconds by kind of work in one call of a program that ran before; added up over what ran at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(program(*arguments))
        traced = jax.profiler.ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    names = hlo.names(program.as_text())
    seconds: dict[str, float] = {}
    for name, nanoseconds in events(traced):
        kind = kind_of(names.get(name) or names.get(re.sub(r"_(\d+)$", r".\1", name)) or name)
        seconds[kind] = seconds.get(kind, 0) + nanoseconds / 1e9
    return dict(sorted(seconds.items(), key=lambda pair: -pair[1]))


def kind_of(name: str) -> str:
    """The kind of work by the name of an instruction or kernel."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), REST)


def events(traced: jax.profiler.ProfileData) -> Iterator[tuple[str, float]]:
    """The kernels of all GPUs, or what a CPU's threads computed: names and nanoseconds."""
    for plane in traced.planes:
        gpu = plane.name.startswith("/device:GPU")
        for line in plane.lines:
            for event in line.events:
                if gpu and line.name.startswith("Stream"):
                    yield event.name, event.duration_ns
                elif not gpu and "hlo_op" in dict(event.stats):
                    yield event.name, event.duration_ns
