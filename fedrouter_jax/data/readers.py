"""Files of rows: JSONL, JSON, CSV and Parquet, as records of whatever columns they have.

The first line or row that cannot be read stops with one line that names the file and the place.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from fedrouter_jax.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
Record = Mapping[str, object]


def read_records(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, Record]]:
    """(place, record) of every row of a file; records hold the columns `wanted`, and may hold others."""
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": partial(_read_parquet, wanted=wanted),
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: cannot read a '{path.suffix}' file; expected one of {listed(SUFFIXES)}")
    try:
        yield from readers[path.suffix.lower()](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or brief(error)})") from error


def listed(names: Iterable[object]) -> str:
    """Names in quotes, for a message: at most ten, long ones cut short."""
    names = list(names)
    more = [f"{len(names) - 10} more"] if len(names) > 10 else []
    return ", ".join([*map(shown, names[:10]), *more]) or "none"


def brief(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def shown(value: object) -> str:
    """A value, cut short, for a message."""
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _decode(data: bytes, path: Path, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise UserError(
            f"{path} line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error


def _file_bytes(path: Path) -> bytes:
    return path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # the byte order mark that spreadsheets write


def _read_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    for number, data in enumerate(_file_bytes(path).split(b"\n"), 1):
        line = _decode(data, path, number)
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            record = json.loads(line, object_pairs_hook=_once)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{place}: not valid JSON ({error.msg} at column {error.colno}); expected one object on each line"
            ) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nesting as deep
            raise UserError(f"{place}: not JSON that can be read ({brief(error)}); simplify the line") from error
        yield place, _object(record, place)


def _read_json(path: Path) -> Iterator[tuple[str, Record]]:
    """A list of objects, as Alpaca's file is; or, by another name, JSONL."""
    text = _decode(_file_bytes(path), path)
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    try:
        records = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}); expected a list of "
            "objects, or one object on each line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON that can be read ({brief(error)}); simplify the file") from error
    for number, record in enumerate(records, 1):
        place = f"{path} row {number}"
        yield place, _object(record, place)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, whose keys come once each: of two, JSON itself would silently take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice in an object")
    return found


def _object(record: object, place: str) -> Record:
    if not isinstance(record, dict):
        raise UserError(f'{place}: a JSON {type(record).__name__}; expected an object, as {{"instruction": ...}}')
    return record


def _read_csv(path: Path) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(2**30)  # the default refuses long texts
    text = _decode(_file_bytes(path), path)
    first = text.lstrip().partition("\n")[0].strip()
    if "," not in first and (";" in first or "\t" in first):
        raise UserError(f"{path} line 1: no commas in the header {shown(first)}; save the file with commas")
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path} line {lines.line_num + 1}"  # where this row starts; quoted text may run over several lines
        try:
            values = next(lines, None)
        except csv.Error as error:
            raise UserError(f"{place}: not valid CSV ({brief(error)}); check the quotes of this row") from error
        if values is None:
            return
        if not values:  # an empty line
            continue
        if header is None:
            header = values
            if len(set(header)) < len(header):
                raise UserError(f"{place}: a column name occurs twice in the header {listed(header)}")
            continue
        if len(values) != len(header):
            raise UserError(
                f"{place}: {len(values)} fields; expected {len(header)} as in the header: is the row cut off?"
            )
        yield place, dict(zip(header, values, strict=True))


def _read_parquet(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, Record]]:
    """The columns wanted of those there are, and nothing else: others may be of types that Python has no values for."""
    import pyarrow  # here, for few commands need it
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        twice = next((name for name in wanted if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path}: column {twice!r} occurs twice; rename one of them")
        found = file.read(columns=[name for name in names if name in wanted]).to_pylist()
        records = found or [{}] * file.metadata.num_rows  # of no columns it reads no rows
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({brief(error)}); is it cut off?") from error
    for number, record in enumerate(records, 1):
        yield f"{path} row {number}", dict.fromkeys(names) | record
