"""Where a measurement lies: its JSON, and the page made from it beside it; how pages are shown."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from fedrouter_jax import files


def keep(name: str, found: dict[str, Any], page: str, out: Path | None, small: bool) -> Path:
    """Write `name.json` and `name.md`, show the page, return the folder.

    That is `out`, by default docs/bench, or runs/bench of what is `small`, only tried.
    """
    folder = out or Path("runs/bench" if small else "docs/bench")
    files.write(folder / f"{name}.json", json.dumps(found, indent=1) + "\n")
    files.write(folder / f"{name}.md", page)
    show_markdown(folder / f"{name}.md")
    return folder


def show_markdown(path: Path, console: Console | None = None) -> None:
    """A Markdown file, drawn; where no terminal can or its tables are too wide for it, as it is, and where it lies."""
    console, text = console or Console(), path.read_text(encoding="utf-8")
    if console.is_terminal and widest(text) <= console.width:
        console.print(Markdown(text))
    else:
        console.file.write(f"{text}\n{path}\n")


def widest(text: str) -> int:
    """The columns of a terminal that the widest table of a Markdown page takes."""
    tables = [list(lines) for is_table, lines in groupby(text.splitlines(), lambda s: s.startswith("|")) if is_table]
    columns = [list(zip(*(line.split("|") for line in table), strict=False)) for table in tables]
    return max((sum(max(map(len, cells)) + 1 for cells in table) for table in columns), default=0)
