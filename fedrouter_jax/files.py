"""Files that no kill, full disk or second process leaves half written. Of several processes the first writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedrouter_jax import processes
from fedrouter_jax.errors import UserError


def write(path: Path, text: str) -> None:
    """Write a whole text file at once."""
    if processes.first():
        with replaced(path) as beside:
            beside.write_text(text, encoding="utf-8")


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
        raise UserError(
            f"{path} could not be written ({error.strerror}); free space there or choose another folder, then try "
            "again (a run: resume it)"
        ) from error
