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
    client: str = ""  # whose row it is; "" when rows are to be dealt


class Dataset(NamedTuple):
    """Train and held-out rows of one source."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]
    name: str


def digest(dataset: Dataset) -> str:
    """The SHA-256, hexadecimal, of all rows in their order."""
    parts = [[row if row.client else row[:3] for row in part] for part in (dataset.train, dataset.test)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
