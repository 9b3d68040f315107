"""Where a measurement lies: its JSON, and the page made from it beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedrouter_jax import files
from fedrouter_jax.terminal import show_markdown


def keep(name: str, found: dict[str, Any], page: str, out: Path | None, small: bool) -> Path:
    """Write `name.json` and `name.md`, show the page, return the folder.

    That is `out`, by default docs/bench, or runs/bench of what is `small`, only tried.
    """
    folder = out or Path("runs/bench" if small else "docs/bench")
    files.write(folder / f"{name}.json", json.dumps(found, indent=1) + "\n")
    files.write(folder / f"{name}.md", page)
    show_markdown(folder / f"{name}.md")
    return folder
