"""How long until something trains: from starting a process to the end of its first optimiser step.

    python -m experiments.startup              a minute or two on two cores; startup.json and startup.md in docs/bench
    python -m experiments.startup --smoke      the tiny model, to see that it works

The first process finds an empty cache folder, as on a clean checkout; those after it find its compiled programs
(JAX's persistent compilation cache) and the tokenizer. Importing, loading the model and packing rows are part of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time as clock
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from experiments.measurements import keep
from experiments.sweep import at_least_one
from fedrouter_jax import experiment
from fedrouter_jax.models.load import smollm2_path
from fedrouter_jax.presets import PRESETS
from fedrouter_jax.terminal import guarded, keep_programs, parse


@dataclass(frozen=True)
class Startup:
    """Seconds to the first optimiser step, with and without programs of an earlier process."""

    times: int = 3
    """How many processes are timed after the first."""
    smoke: bool = False
    """The tiny model; the figures mean nothing."""
    out: Path | None = None
    """Folder for startup.json and startup.md; by default docs/bench, or runs/bench with --smoke."""


def main(options: Startup) -> None:
    """Measure, write, show."""
    at_least_one(times=options.times)
    preset = "smoke" if options.smoke else "demo"
    if not options.smoke:
        smollm2_path()  # says in one line where there is none
    with tempfile.TemporaryDirectory() as empty:
        seconds = [process(preset, empty) for _ in range(1 + options.times)]
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    found = {**device, "preset": preset, "first": seconds[0], "later": seconds[1:]}
    keep("startup", found, markdown(found), options.out, options.smoke)


def process(preset: str, cache: str) -> float:
    """Seconds of a fresh process that keeps what it can in `cache`."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    code = f"from experiments import startup; startup.first_step({preset!r})"
    before = clock.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment | {"FEDROUTER_CACHE": cache}, check=True)
    return clock.perf_counter() - before


def first_step(preset: str) -> None:
    """One optimiser step of all clients, each on the adapter of one of its tasks."""
    keep_programs()
    config = PRESETS[preset]()
    config = replace(config, strategy="oracle", local=replace(config.local, steps=1))
    prepared = experiment.prepare(config)
    enrolment = experiment.enroll(prepared, None)
    inputs = experiment.round_inputs(prepared, experiment.members(prepared, enrolment), 1)
    experiment.train_round(prepared, experiment.start(prepared, enrolment), *inputs)


def markdown(found: dict) -> str:
    """A table of two rows."""
    later = f"median of {len(found['later'])} | {np.median(found['later']):.1f}"
    return "\n".join(
        [
            "# Start-up",
            "",
            f"Device {found['device']}, jax {found['jax']}; preset `{found['preset']}` with known tasks, one optimiser "
            "step.",
            "",
            "| from starting a process to the end of its first optimiser step | seconds |",
            "|---|---|",
            f"| nothing kept from earlier | {found['first']:.1f} |",
            f"| compiled programs and tokenizer kept, {later} |",
            "",
        ]
    )


if __name__ == "__main__":
    arguments = parse(Startup, prog="python -m experiments.startup")
    sys.exit(guarded(lambda: main(arguments)))
