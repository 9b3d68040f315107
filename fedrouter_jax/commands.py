"""What each command takes, and what its help says."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fedrouter_jax.config import Config

USAGE = """\
usage: fedrouter COMMAND ...

Federated fine-tuning of language models with one LoRA adapter per task.

  run      one experiment                 fedrouter run --preset smoke
  resume   continue a stopped run         fedrouter resume runs/smoke-fedrouter-0
  report   tables and plots of runs       fedrouter report runs/*
  route    which adapter answers a text   fedrouter route runs/smoke-fedrouter-0 "Summarise: ..."
  export   PEFT adapters and the router   fedrouter export runs/smoke-fedrouter-0 --to adapters/
  plan     what a run would take          fedrouter plan --model llama-3.1-8b --dtype bfloat16 --memory 80

fedrouter COMMAND --help shows what a command takes, fedrouter --version which one this is.
"""
EXAMPLES = {
    "run": (
        "--preset smoke",
        "--preset flan4-dual-cpu --data FOLDER --turns staggered",
        "--preset demo --strategy fedit --seed 1",
    ),
    "resume": ("runs/smoke-fedrouter-0", "runs/mine --coordinator auto"),
    "report": ("runs/smoke-fedrouter-0", "runs/*", "runs/mine runs/fedit --to compared"),
    "route": ('runs/mine "Summarise: ..."', "runs/mine --rows questions.jsonl --json", 'runs/mine "a text" --client 2'),
    "export": ("runs/mine", "runs/mine --to adapters/"),
    "plan": (
        "--preset flan4-dual --rate 0.1",
        "--model llama-3.1-8b --dtype bfloat16 --memory 80 --rate 300",
    ),
}
WORDS = {
    "lane": "one client's training of one of its clusters in a round",
    "slot": "what holds an adapter",
    "mix": "test rows of all tasks, asked of every client",
    "pack": "rows laid side by side, which train together",
}
ALSO_CALLED = {"--lr": "--learning-rate"}  # as many know an option

Preset = Annotated[str | None, tyro.conf.arg(metavar="NAME")]
Experiment = Annotated[Config, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]
To = tyro.conf.arg(name="out", aliases=("--to",))  # either: `run` calls so where it writes; aliases are shown first


@dataclass(frozen=True)
class Processes:
    """Several processes that run this together: start the same command on every host (docs/scaling.md)."""

    coordinator: str | None = None
    """HOST:PORT of the first process, or "auto" where JAX finds the others (TPU pods, Slurm, Open MPI)."""
    num_processes: int | None = None
    """How many they are."""
    process_id: int | None = None
    """Which one this is, from 0."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run one experiment. Start from a preset and change any field of it."""

    preset: Preset = None
    """Where the other options have their defaults from; the presets are named above."""
    out: Path | None = None
    """Run directory; by default runs/PRESET-STRATEGY-SEED. Several processes must all see it."""
    config: Experiment
    processes: Annotated[Processes, tyro.conf.OmitArgPrefixes] = Processes()


@dataclass(frozen=True)
class Resume:
    """Continue a stopped run to the same result as if it had never stopped."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    processes: Annotated[Processes, tyro.conf.OmitArgPrefixes] = Processes()


@dataclass(frozen=True)
class Report:
    """Tables (terminal, Markdown, CSV) and plots from run directories alone."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="PATH ...")]
    """Run directories."""
    to: Annotated[Path | None, To] = None
    """Folder for report.md, scores.csv and plots/; by default the run directory, or runs/report for several runs."""


@dataclass(frozen=True)
class Route:
    """Send texts to adapters: the chosen one, the distance to every centroid, and the answer."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[TEXT ...]")] = ()
    """Instructions."""
    rows: Path | None = None
    """A file of instructions, instead of texts: JSONL, JSON, CSV or Parquet, in the columns where the run had its own.
    If it has the right answers, too, they are compared with those given."""
    client: str | None = None
    """Route as this client, a number or the name its rows gave it (natural): among its own clusters only (fedrouter),
    or its own adapter (local)."""
    json: bool = False
    """Print one JSON object a text instead of a table."""


@dataclass(frozen=True)
class Export:
    """Write PEFT adapter folders and the router for other tools."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    to: Annotated[Path, To] = field(default=Path("exported"))
    """Folder to write to."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would take, before anything is loaded: memory on a device, bytes on the wire, time."""

    preset: Preset = None
    """Where the other options have their defaults from: one of those that `fedrouter run --help` names."""
    devices: int = 1
    """Devices that share the lanes of a round."""
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """Their kind; by default what is here."""
    memory: float | None = None
    """Memory of a device, GiB: as many groups of lanes run at once as fit."""
    rate: float | None = None
    """TFLOP/s that training reaches on a device: about 0.1 on two CPU cores, on an H100 in bfloat16 130 (SmolLM2-135M)
    to 390 (1B; --unroll, 16 rows a step)."""
    row_tokens: int = 128
    """Tokens of a row on average, prompt and response."""
    response_tokens: int = 24
    """Those of its response."""
    json: bool = False
    """Print JSON instead of a table."""
    config: Experiment


def about(command: str, options: type, *more: str) -> dict[str, Any]:
    """What `terminal.parse` is told of a command: its name, and for its help what it does, examples, and `more`."""
    examples = [f"  fedrouter {command} {example}" for example in EXAMPLES[command]]
    parts = [filled(options.__doc__), "\n".join(["Examples:", *examples]), *more]
    return {"prog": f"fedrouter {command}", "description": "\n\n".join(parts)}


def listed(heading: str, phrases: Mapping[str, str]) -> str:
    """A heading, and below it names with a phrase each, one a line."""
    longest = max(map(len, phrases))
    lines = [filled(phrase, f"  {name:{longest}}  ", " " * (longest + 4)) for name, phrase in phrases.items()]
    return "\n".join([filled(f"{heading}:"), *lines])


def filled(text: str, first: str = "", later: str = "  ") -> str:
    """A paragraph as wide as the console; tyro joins lines again that are not indented."""
    return textwrap.fill(text, shutil.get_terminal_size().columns, initial_indent=first, subsequent_indent=later)
