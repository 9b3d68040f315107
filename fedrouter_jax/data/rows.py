"""The two tuples every data source gives and every consumer takes."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple


class Row(NamedTuple):
    """One supervised example, as raw text (no prompt template)."""

    instruction: str
    output: str
    task: str  # "" when unknown


class Dataset(NamedTuple):
    """Train and held-out rows of one source."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]
    name: str
    synthetic: bool


def digest(dataset: Dataset) -> str:
    """The SHA-256, hexadecimal, of all rows in their order."""
    return hashlib.sha256(json.dumps([dataset.train, dataset.test]).encode()).hexdigest()
