"""The command line: `python -m fedrouter_jax` or `fedrouter`."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from fedrouter_jax import config as config_lib
from fedrouter_jax.config import Config
from fedrouter_jax.errors import UserError
from fedrouter_jax.presets import PRESETS
from fedrouter_jax.terminal import guarded, parse, progress

USAGE = """\
usage: fedrouter COMMAND ...

Federated fine-tuning of language models with one LoRA adapter per task.

  run      one experiment                 fedrouter run --preset smoke
  resume   continue a stopped run         fedrouter resume runs/smoke-fedrouter-0
  report   tables and plots of runs       fedrouter report runs/*
  route    which adapter answers a text   fedrouter route runs/smoke-fedrouter-0 "Summarise: ..."
  export   PEFT adapters and the router   fedrouter export runs/smoke-fedrouter-0 --to adapters/
  plan     what a run would take          fedrouter plan --model llama-3.1-8b --dtype bfloat16 --memory 80

fedrouter COMMAND --help shows what a command takes.
"""


@dataclass(frozen=True)
class Processes:
    """Several processes that run this together: start the same command on every host (docs/scaling.md)."""

    coordinator: str | None = None
    """HOST:PORT of the first process, or "auto" where JAX finds the others (TPU pods, Slurm, Open MPI)."""
    num_processes: int | None = None
    """How many they are."""
    process_id: int | None = None
    """Which one this is, from 0."""


@dataclass(frozen=True)
class Run:
    """Run one experiment. Start from a --preset and change any field of it."""

    config: Annotated[Config, tyro.conf.OmitArgPrefixes]
    processes: Annotated[Processes, tyro.conf.OmitArgPrefixes] = Processes()
    out: Path | None = None
    """Run directory; by default runs/PRESET-STRATEGY-SEED. Several processes must all see it."""


@dataclass(frozen=True)
class Resume:
    """Continue a stopped run to the same result as if it had never stopped."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    processes: Annotated[Processes, tyro.conf.OmitArgPrefixes] = Processes()


@dataclass(frozen=True)
class Report:
    """Tables (terminal, Markdown, CSV) and plots from run directories alone."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    to: Path | None = None
    """Folder for report.md, scores.csv and plots/; by default the run directory, or runs/report for several runs."""


@dataclass(frozen=True)
class Route:
    """Send texts to adapters: the chosen one, the distance to every centroid, and the answer."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    texts: tyro.conf.Positional[tuple[str, ...]] = ()
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
    to: Path = field(default=Path("exported"))
    """Folder to write to."""


@dataclass(frozen=True)
class Plan:
    """What a run would take, before anything is loaded: memory on a device, bytes on the wire, time."""

    config: Annotated[Config, tyro.conf.OmitArgPrefixes]
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"run": run, "resume": resume, "report": report, "route": route, "export": export, "plan": plan}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if arguments[0] not in commands:
        print(f"fedrouter: no command {arguments[0]!r}; choose among {', '.join(commands)}", file=sys.stderr)
        return 2
    return guarded(lambda: commands[arguments[0]](arguments[1:]), "the same command begins anew")


def run(arguments: list[str]) -> None:
    """`fedrouter run`."""
    from fedrouter_jax import idle, processes, runs
    from fedrouter_jax import method as method_lib

    preset, arguments = take_preset(arguments)
    names = ", ".join(PRESETS)
    parsed = parse(
        Run,
        prog="fedrouter run",
        args=arguments,
        default=Run(PRESETS[preset]() if preset else Config()),
        description=f"Run one experiment. --preset NAME starts from one of: {names}; any field below changes it. "
        "Words: a lane is one client's training of one of its clusters in a round; a slot holds an adapter; the mix is "
        "test rows of all tasks, asked of every client; packs are rows laid side by side, which train together.",
    )
    method = parsed.config.strategy.replace(":", "-")
    out = parsed.out or Path("runs") / f"{preset or 'run'}-{method}-{parsed.config.seed}"
    together(parsed.processes)
    config_lib.check(parsed.config)
    method_lib.check(parsed.config, method_lib.strategy(parsed.config, None))
    check_rows(preset, parsed.config.data.data)
    for option in idle.options(parsed.config) if processes.first() else ():  # now, for the run may take hours
        print(f"note: without effect here: {option}", file=sys.stderr)
    with resumable(out):
        with progress() as track:
            runs.run(parsed.config, out, track)
        finish(out)


def take_preset(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Split `--preset NAME` off: its values are the defaults that the other options are parsed over."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", action="append", nargs="?", const="")
    found, others = parser.parse_known_args(arguments)
    names = found.preset or []
    if len(names) > 1:
        raise UserError(f"--preset is given {len(names)} times; start from one")
    if names and names[0] not in PRESETS:
        raise UserError(f"--preset {names[0]!r} is unknown; choose among {', '.join(PRESETS)}")
    return next(iter(names), None), others


def resume(arguments: list[str]) -> None:
    """`fedrouter resume`."""
    from fedrouter_jax import runs

    parsed = parse(Resume, prog="fedrouter resume", args=arguments)
    together(parsed.processes)
    with resumable(parsed.run):
        with progress() as track:
            runs.proceed(parsed.run, track)
        finish(parsed.run)


def check_rows(preset: str | None, data: str) -> None:
    """Raise `UserError`, before anything is written, where `data` names no rows, as those of a preset may not."""
    from fedrouter_jax.data import sources

    try:
        sources.path_of(data)
    except UserError as error:
        if preset is None or data != PRESETS[preset]().data.data:
            raise
        raise UserError(f"preset {preset} needs --data FOLDER with train.jsonl and test.jsonl ({error})") from None


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Where a run is interrupted, say how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        goes_on = (
            f"`fedrouter resume {out}` goes on from there" if (out / "config.json").exists() else "nothing is lost"
        )
        raise KeyboardInterrupt(goes_on) from None


def together(asked: Processes) -> None:
    """Join the other processes, if there are any."""
    import jax

    from fedrouter_jax import processes

    if asked.coordinator is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", None)  # programs of one process are kept, not those of several
    processes.join(asked.coordinator, asked.num_processes, asked.process_id)


def finish(out: Path) -> None:
    """What a finished run shows: its tables, and where everything is."""
    from fedrouter_jax import processes, records
    from fedrouter_jax import report as report_lib

    if not processes.first():
        return

    report_lib.write([out], out)
    console = Console()
    report_lib.show([out], console)
    for line in records.notes(records.read(out)):
        console.print(f"note: {line}", markup=False)
    console.print(f"run {escape(str(out))}: report.md, plots/, adapters/, scores.json, predictions.jsonl")


def report(arguments: list[str]) -> None:
    """`fedrouter report`."""
    from fedrouter_jax import records
    from fedrouter_jax import report as report_lib

    parsed = parse(Report, prog="fedrouter report", args=arguments)
    # `runs/*` names what else lies there: reports of several runs, folders of sweeps, runs that were refused.
    named = [path for path in parsed.runs if (path / "config.json").exists() or not path.exists()]
    others = [path for path in parsed.runs if path not in named]
    begun = [path for path in named if not path.exists() or records.begun(path)]
    bare = [path for path in named if path not in begun]
    if bare and not begun:
        raise UserError(f"{bare[0]} has nothing to report yet; go on with it by: fedrouter resume {bare[0]}")
    if not begun:
        found = f", and {others[0]} is none: it has no config.json" if others else ", such as runs/smoke-fedrouter-0"
        raise UserError(f"report needs at least one run directory{found}")
    to = parsed.to or (begun[0] if len(begun) == 1 else Path("runs/report"))
    report_lib.write(begun, to)
    console = Console()
    report_lib.show(begun, console)
    for why, passed in (("no run directories", others), ("nothing done yet", bare)):
        if passed:
            console.print(f"passed over, {why}: {escape(', '.join(map(str, passed)))}")
    console.print(f"written: {escape(str(to / 'report.md'))}, {escape(str(to / 'scores.csv'))}, plots/")


def route(arguments: list[str]) -> None:
    """`fedrouter route`."""
    from rich.table import Column, Table

    from fedrouter_jax import serve
    from fedrouter_jax.sharing import silent

    parsed = parse(Route, prog="fedrouter route", args=arguments)
    texts, references = parsed.texts, ()
    if parsed.rows is not None:
        if texts:
            raise UserError(f"route has {len(texts)} texts and --rows {parsed.rows}; give one of them")
        texts, references, *_ = zip(*serve.questions_of(parsed.rows, parsed.run), strict=True)
    with progress() as track:
        answers = serve.route(parsed.run, texts, parsed.client, track if parsed.rows else silent, references)
    note_unfinished(parsed.run, answers[0]["round"])
    for line in serve.notes(parsed.run, answers):
        print(f"note: {line}", file=sys.stderr)
    if parsed.json:
        for answer in answers:
            print(json.dumps(answer))  # in ASCII, whatever the terminal takes
        return
    names = ("text", "adapter", "task", "distances", "answer")
    table = Table(*(Column(name, overflow="fold") for name in names))  # nothing is left out where no spaces are
    for answer in answers:
        distances = " ".join(f"{value:.3f}" for value in answer["distances"])
        table.add_row(*map(escape, (answer["text"], answer["adapter"], answer["task"], distances, answer["answer"])))
    Console().print(table)


def note_unfinished(run: Path, done: int) -> None:
    """Say on stderr that a run's adapters, of so many rounds, are not yet its last."""
    rounds = config_lib.load(run / "config.json").rounds.rounds
    if done < rounds:
        print(f"note: {run} has done {done} of {rounds} rounds", file=sys.stderr)


def export(arguments: list[str]) -> None:
    """`fedrouter export`."""
    from fedrouter_jax import export as export_lib
    from fedrouter_jax import runs

    parsed = parse(Export, prog="fedrouter export", args=arguments)
    held = next((folder for folder in (parsed.to / "adapters", parsed.to / "router") if folder.exists()), None)
    if held is not None:
        raise UserError(f"{held} is there, and adapters of two runs would mix; remove it, or give a new folder by --to")
    loaded = runs.read(parsed.run, routes=False)
    export_lib.write(parsed.to, loaded.prepared, loaded.state, loaded.slot_tasks)
    note_unfinished(parsed.run, int(loaded.state.round))
    router = f" and {parsed.to}/router" if loaded.prepared.strategy.enrolling == "clustering" else ""
    print(f"written: {parsed.to}/adapters{router}")


def plan(arguments: list[str]) -> None:
    """`fedrouter plan`."""
    from fedrouter_jax import plan as plan_lib

    preset, arguments = take_preset(arguments)
    parsed = parse(
        Plan,
        prog="fedrouter plan",
        args=arguments,
        default=Plan(PRESETS[preset]() if preset else Config()),
        description=f"What a run would take, from shapes alone. --model takes {', '.join(plan_lib.SHAPES)} too, "
        "whether they are at hand or not.",
    )
    for name in ("devices", "memory", "rate", "row_tokens", "response_tokens"):
        value = getattr(parsed, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if parsed.response_tokens >= parsed.row_tokens:
        raise UserError(f"--response-tokens is {parsed.response_tokens}, of --row-tokens {parsed.row_tokens} in all")
    data = parsed.config.data
    for name, value, flag, most in (
        ("row", parsed.row_tokens, "length", data.max_length),
        ("response", parsed.response_tokens, "response", data.max_response),
    ):
        if value > most:
            raise UserError(f"--{name}-tokens is {value}, but rows are cut at --max-{flag} {most}; raise that, too")
    limit, rate = (None if v is None else v * unit for v, unit in ((parsed.memory, 2**30), (parsed.rate, 1e12)))
    tokens = parsed.row_tokens, parsed.response_tokens
    found = plan_lib.plan(parsed.config, *tokens, parsed.devices, limit, rate, parsed.platform)
    if parsed.json:
        record = found._asdict() | {"memory": found.memory._asdict() | {"total": found.memory.total}}
        print(json.dumps(record))
        return
    plan_lib.show(found, parsed.config, Console(), limit)
