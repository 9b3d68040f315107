"""The command line: `python -m fedrouter_jax` or `fedrouter`."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from fedrouter_jax import __version__, commands
from fedrouter_jax import config as config_lib
from fedrouter_jax.commands import Export, Plan, Processes, Report, Resume, Route, Run
from fedrouter_jax.config import Config
from fedrouter_jax.errors import UserError, printable
from fedrouter_jax.presets import ABOUT, PRESETS
from fedrouter_jax.terminal import guarded, parse, progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known = {"run": run, "resume": resume, "report": report, "route": route, "export": export, "plan": plan}
    if arguments[:1] == ["help"]:  # of a command, or of all
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(commands.USAGE, end="")
        return 0
    if arguments[0] == "--version":
        print(f"fedrouter {__version__}")
        return 0
    if arguments[0] not in known:
        near = "".join(f"; there is {name}" for name in get_close_matches(arguments[0], known, 1))
        print(f"fedrouter: no command {arguments[0]!r}{near}; choose among {', '.join(known)}", file=sys.stderr)
        return 2
    return guarded(lambda: known[arguments[0]](arguments[1:]), "the same command begins anew")


def run(arguments: list[str]) -> None:
    """`fedrouter run`."""
    from fedrouter_jax import idle, processes, runs
    from fedrouter_jax import method as method_lib

    preset = preset_of(arguments)
    named = commands.listed("Presets; flan4-... need --data FOLDER with train.jsonl and test.jsonl", ABOUT)
    parsed = parse(
        Run,
        args=arguments,
        default=Run(config=PRESETS[preset]() if preset else Config()),
        also=commands.ALSO_CALLED,
        **commands.about("run", Run, named, commands.listed("Words", commands.WORDS)),
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


def preset_of(arguments: list[str]) -> str | None:
    """The NAME of `--preset NAME`, looked up first: its values are the defaults that other options are parsed over."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", action="append", nargs="?", const="")
    names = parser.parse_known_args(arguments)[0].preset or []
    if len(names) > 1:
        raise UserError(f"--preset is given {len(names)} times; start from one")
    if names and names[0] not in PRESETS:
        near = "".join(f"; there is {name}" for name in get_close_matches(names[0], PRESETS, 1))
        raise UserError(f"--preset {names[0]!r} is unknown{near}; choose among {', '.join(PRESETS)}")
    return next(iter(names), None)


def resume(arguments: list[str]) -> None:
    """`fedrouter resume`."""
    from fedrouter_jax import runs

    parsed = parse(Resume, args=arguments, **commands.about("resume", Resume))
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
    import jax

    from fedrouter_jax import files, records
    from fedrouter_jax import report as report_lib

    parsed = parse(Report, args=arguments, **commands.about("report", Report))
    jax.config.update("jax_platforms", "cpu")  # a run may be training on the accelerator, which one process can have
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
    files.check_name(to, "--to")
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
    from rich.text import Text

    from fedrouter_jax import serve
    from fedrouter_jax.sharing import silent

    parsed = parse(Route, args=arguments, **commands.about("route", Route))
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
        cells = (answer["text"], answer["adapter"], answer["task"], distances, answer["answer"])
        table.add_row(*(Text(printable(cell)) for cell in cells))
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

    parsed = parse(Export, args=arguments, **commands.about("export", Export))
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

    preset = preset_of(arguments)
    shapes = f"Models that need not be at hand: --model {', '.join(plan_lib.SHAPES)}."
    parsed = parse(
        Plan,
        args=arguments,
        default=Plan(config=PRESETS[preset]() if preset else Config()),
        also=commands.ALSO_CALLED,
        **commands.about("plan", Plan, commands.filled(shapes)),
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
