"""Files that no kill, full disk or second process leaves half written. Of several processes the first writes."""

from __future__ import annotations

import errno
import fcntl
import os
import time as clock
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedrouter_jax import processes
from fedrouter_jax.errors import UserError

LOCK = "run.lock"


def write(path: Path, text: str) -> None:
    """Write a whole text file at once."""
    if processes.first():
        with replaced(path) as beside:
            beside.write_text(text, encoding="utf-8")


def check_name(path: Path, option: str) -> None:
    """Raise `UserError` for a folder that pages cannot name, nor Orbax write to."""
    if str(path.absolute()) != str(path.absolute()).encode(errors="ignore").decode():
        raise UserError(f"{option} {str(path)!r} is, or lies in, a folder whose name is not UTF-8; choose another")


def appear(path: Path, seconds: int = 90) -> None:
    """Wait until this process sees what another has written, of several that have met since.

    On NFS a host that has looked for it before may remember for a minute that it was not there. What does not appear is
    missed where it is read.
    """
    for _ in range(seconds):
        if path.exists():
            return
        clock.sleep(1)


def append(path: Path, line: str) -> None:
    """Add a line to a log."""
    if processes.first():
        with guarded(path), path.open("a", encoding="utf-8") as file:
            file.write(line)


def lines(path: Path) -> list[str]:
    """The complete lines of a log; one that a kill cut short is not among them."""
    if not path.exists():
        return []
    try:
        return path.read_text(encoding="utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); restore the file, or start a new run") from None


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to, which then takes the place of `path`: that is either the old file or the new one, whole."""
    with guarded(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".tmp")
        try:
            yield beside
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)  # what was cut short is of no use, and may have filled the disk
            raise


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn a failed write (a full disk, no permission) into one clear line."""
    try:
        yield
    except OSError as error:
        remedy = "free space there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see what is there"
        raise UserError(
            f"{path} could not be written ({error.strerror}); {remedy} or choose another folder, then try again (a "
            "run: resume it, a report: --to DIR)"
        ) from error


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keep a folder for this process, and those joined to it; raises `UserError` where another one has it.

    The lock file stays: were it removed, one process could lock the old file and another a new one.
    """
    with ExitStack() as opened:
        if not processes.agreed(not processes.first() or _locked(folder / LOCK, opened)):
            raise UserError(f"another process works on {folder}; wait for it, or end it")
        yield


def _locked(path: Path, opened: ExitStack) -> bool:
    """Whether nobody else holds this lock; then it is held until `opened` closes. At a kill the kernel drops it."""
    with guarded(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = opened.enter_context(path.open("a"))  # to write, or NFS gives no lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # a file system without locks: the run goes on without
    return True
