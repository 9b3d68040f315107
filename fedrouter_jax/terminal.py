"""What a user at a terminal sees while something runs, and when it goes wrong."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time as clock
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import partial
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro
from rich.console import Console
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from fedrouter_jax.errors import UserError, one_line, printable

T = TypeVar("T")
# XLA ends a process whose devices come to a sum more than a minute apart, for it takes them to be stuck. They are not:
# between two sums each row of devices trains lanes of its own, and one may have less to do than another.
WAITS = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds",
    "--xla_cpu_collective_call_terminate_timeout_seconds",
    "--xla_gpu_first_collective_call_warn_stuck_timeout_seconds",
    "--xla_gpu_first_collective_call_terminate_timeout_seconds",
)
DAY = 24 * 60 * 60


def guarded(action: Callable[[], None], again: str = "the same command goes on from there") -> int:
    """Do something for a user at a terminal; returns the exit code, and says in one line what was wrong.

    `again` is what is said of an interrupt that does not say it itself.
    """
    # The advice of third-party loggers is not for the user of this tool.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if os.environ.setdefault("HF_HUB_VERBOSITY", "error") == "error":  # its warnings come twice, by the root's handler
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # where it is imported already
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale without some letter must not cost the answers
    wait_for_devices()
    try:
        keep_programs()
        action()
        if sys.stdout:  # which a daemon may lack
            sys.stdout.flush()  # or a reader that has stopped would only be noticed after this
    except UserError as error:
        return failed(2, str(error))
    except BrokenPipeError:  # whoever reads what this prints has stopped, as `head` does: nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 141  # what a shell says of a program that SIGPIPE has ended
    except OSError as error:  # a path that no check has looked at
        reason = " ".join(str(error.strerror or error).split())
        return failed(2, f"{error.filename}: {reason}" if error.filename else reason)
    except KeyboardInterrupt as stop:
        return failed(130, f"interrupted; {stop if stop.args else again}")
    except Exception as error:
        if told := of_device(error):
            return failed(2, told)
        # A fault of ours; where there are other processes they must not wait for this one.
        from fedrouter_jax import processes

        if processes.joined():
            traceback.print_exc()
            processes.leave(1)
        raise
    return 0


def of_device(error: Exception) -> str | None:
    """What to say where a device is missing or full; None for other errors."""
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"this machine's memory is used up ({said[:200]}); give fewer clients, clusters or rows"
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in said:
        return (
            f"a device's memory is used up ({said[:200]}); less at a time takes less: of a run --groups-at-once 1 "
            "--packs-at-once 1 --rows-at-once 8 --remat (and a lower --rank), or, where it has begun, "
            "these under compute in its config.json"
        )
    import jax

    try:
        jax.devices()
    except Exception as none:  # JAX has several
        asked, why = os.environ.get("JAX_PLATFORMS", ""), one_line(none) or type(none).__name__
        return f"JAX finds no device ({why}; JAX_PLATFORMS is {asked!r}); install JAX for it, or choose another"
    return None


def failed(code: int, why: str) -> int:
    """Say in one line what was wrong; returns the exit code."""
    print(f"fedrouter: {printable(why)}", file=sys.stderr, flush=True)
    from fedrouter_jax import processes

    processes.leave(code)
    return code


def wait_for_devices() -> None:
    """Let the devices of a process wait a day for each other, unless XLA is told how long. Before JAX looks for any."""
    told = os.environ.get("XLA_FLAGS", "").strip()
    if told and not told.startswith("-"):  # the name of a file of flags
        return
    os.environ["XLA_FLAGS"] = " ".join([told, *(f"{flag}={DAY}" for flag in WAITS if flag not in told)]).strip()


def keep_programs() -> None:
    """Keep compiled programs between processes (beside the tokenizers), unless JAX was told where or not to."""
    import jax

    from fedrouter_jax.models.load import cache_folder

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))


def parse(options: type[T], prog: str, also: Mapping[str, str] = MappingProxyType({}), **others: Any) -> T:
    """`tyro.cli`, in whose help a docstring of several lines is one paragraph, and None is neither value nor default.

    What it refuses it says in one line, and exits with 2. `also` says what options are called here that many know by
    another name. Of a class with a preset the usage says so.
    """
    registry, inside = ConstructorRegistry(), []

    @registry.struct_rule
    def _(info: StructTypeInfo) -> Any:
        if inside:  # it is this rule that asks, and tyro's own that answer
            return None
        inside.append(info)
        spec = ConstructorRegistry.get_struct_spec(info)
        inside.clear()
        if not isinstance(spec, StructConstructorSpec):
            return spec
        fields = (replace(f, helptext=partial(joined, f.helptext), type=shown(f.type)) for f in spec.fields)
        return replace(spec, fields=tuple(fields))

    usage = f"{prog} [--preset NAME]" if "preset" in options.__annotations__ else prog
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            found = tyro.cli(options, prog=usage, registry=registry, **others)
    except SystemExit as stop:
        if stop.code == 2:
            sys.exit(failed(2, f"{in_a_line(said.getvalue(), also)}; see {prog} --help"))
        raise
    print(said.getvalue(), end="", file=sys.stderr)
    return found


def joined(text: str | Callable[[], str | None] | None) -> str | None:
    """A help text on one line."""
    found = text() if callable(text) else text
    return found and " ".join(found.split())


def shown(kind: Any) -> Any:
    """The type of an option, for a help that shows neither None as a value nor a default that is none."""
    kind, *told = (kind.__origin__, *kind.__metadata__) if get_origin(kind) is Annotated else (kind,)
    values = [value for value in get_args(kind) if value is not NoneType] if NoneType in get_args(kind) else []
    named = [f"{{{','.join(get_args(v))}}}" if get_origin(v) is Literal else v.__name__.upper() for v in values]
    hint = tyro.conf.arg(
        metavar="|".join(named) or None,
        help_behavior_hint=lambda default: "" if default in ("", "None") else f"(default: {default})",
    )
    return Annotated[(kind, hint, *told)]


def in_a_line(box: str, also: Mapping[str, str] = MappingProxyType({})) -> str:
    """What is wrong and which options are like the one given, of the box that tyro draws around that."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", box)
    inside = "\n".join(line.strip("│╰╯ ") for line in plain.splitlines()[1:])  # below its title
    wrong, *others = [*filter(None, map(str.strip, re.split(r"[─-]{5,}", inside)))] or [plain]
    like = re.findall(r"^--.*", "\n".join(others), flags=re.MULTILINE)
    like = [re.sub(r" \{[^}]*$", "", option) for option in like]  # its values went on in the next line
    like += [there for name, there in also.items() if name in re.split(r"[\s,=]+", wrong)]
    return " ".join(wrong.split()).rstrip(".") + (f"; there is {', '.join(like)}" if like else "")


@contextmanager
def progress() -> Iterator[Callable]:
    """Progress bars with the time left, as a `sharing.Track`; where no terminal can draw them, lines (`logged`)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from fedrouter_jax import processes, sharing

    console = Console(stderr=True)
    if not processes.first():
        yield sharing.silent
        return
    if not console.is_terminal:
        yield logged
        return
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:

        @contextmanager
        def track(what: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
            bar = bars.add_task(what, total=total, completed=done, note="")
            yield lambda rows, note="": bars.update(bar, advance=rows, note=note)

        yield track


@contextmanager
def logged(what: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Progress as a line for every tenth, for logs."""
    started, before, tenths = clock.monotonic(), done, 10 * done // total

    def advance(rows: int, note: str = "") -> None:
        nonlocal done, tenths
        done += rows
        if 10 * done // total > tenths:
            tenths, spent = 10 * done // total, clock.monotonic() - started
            left = spent * (total - done) / (done - before)
            print(
                f"{what} {done}/{total}, {spent:.0f} s, {left:.0f} s left {note}".strip(), file=sys.stderr, flush=True
            )

    yield advance
