"""Where rows come from: the embedded grammars, local JSONL, JSON, CSV or Parquet files, or a Hugging Face data set.

Text is taken as it is: never stripped, converted or dropped. A number or a boolean where text is expected is an
error, not a string made up from it (`True` could mean `true`, `yes` or `1`). The first bad row stops the load with
one line that names the file and the line.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedrouter_jax.data import synthetic
from fedrouter_jax.data.readers import SUFFIXES, Record, brief, listed, read_records, shown
from fedrouter_jax.data.rows import Dataset, Row
from fedrouter_jax.errors import UserError

FIELDS = (*Row._fields, "input")
OPTIONAL = ("task", "client", "input")
HELD_OUT = 0.2  # of the instructions, where one file is both train and test
TEST_NAMES = ("test", "validation", "valid", "val", "dev")  # the first one present is the test split


def load(spec: str, columns: dict[str, str] | None = None, seed: int = 0) -> Dataset:
    """Rows of the source that `spec` names.

    `spec` is one of, in this order:

    * `"synthetic"`: the embedded tasks, `synthetic.make(seed)`;
    * a directory that holds `train` and one of `test`, `validation`, `valid`, `val`, `dev`, each a file of one of
      `SUFFIXES`;
    * one such file, split by `seed` (`split`);
    * else the id of a Hugging Face data set, OWNER/NAME, or `ID:CONFIGURATION` where it has several, whose `train`
      split and first split named as above are read (a data set with no test split is split as one file is).

    `columns` maps `FIELDS` to the source's column names; a field left out has its own name. Without a task column, or
    with a null in it, the task is `""`; so is the client, which may be an integer, too. An `input`, what an instruction
    is about (Alpaca's; Dolly's `context`), follows it after an empty line, where there is one. Every other value has to
    be text that is not blank.
    Raises `UserError` for anything else that is found.
    """
    unknown = sorted(set(columns or {}) - set(FIELDS))
    if unknown:
        raise UserError(f"columns has no field '{unknown[0]}'; the fields are {listed(FIELDS)}")
    if spec == "synthetic":
        if columns:
            raise UserError("columns does not apply to the synthetic data, whose fields are fixed; leave it out")
        return synthetic.make(seed)
    path = path_of(spec)
    if path is None:
        return _hugging_face(spec, columns, seed)
    if path.is_dir():
        train_path, test_path = _split_files(path)
        return Dataset(read(train_path, columns), read(test_path, columns), path.resolve().name)
    train, test = split(read(path, columns), seed, str(path))
    return Dataset(train, test, path.stem)


def path_of(spec: str) -> Path | None:
    """The file or directory that `spec` names; None where it is "synthetic" or may be a Hugging Face data set's id.

    Ids have an owner: whether there is one without is known only after half a minute of asking the hub again and again.
    Raises `UserError` for anything else.
    """
    if spec == "synthetic":
        return None
    if not spec:
        raise UserError("the data source is empty; give a path, a Hugging Face data set id, or 'synthetic'")
    try:
        path = Path(spec).expanduser()
        if path.is_dir() or path.is_file():  # of a name that is too long this cannot be said
            return path
    except (RuntimeError, OSError) as error:
        raise UserError(f"{spec[:100]}: no path that can be ({brief(error)}); give one that exists") from error
    here = path.parent != Path() and path.parent.is_dir()  # a folder of that owner's name: a path with a slip in it
    if here or path.suffix.lower() in SUFFIXES or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:\w[\w.-]*)?", spec):
        raise UserError(
            f"{spec[:200]}: no such file or directory {f'in {path.parent}' if here else 'here'}; give a path that "
            "exists, 'synthetic', or a Hugging Face data set by its full id, OWNER/NAME, where no folder OWNER is"
        )
    return None


def columns(pairs: Sequence[str]) -> dict[str, str]:
    """`("instruction=question", ...)` as a mapping; raises `UserError` for anything else."""
    mapping: dict[str, str] = {}
    for name, _, column in (pair.partition("=") for pair in pairs):
        if name not in FIELDS or not column:
            expected = ", ".join(f"{field}=NAME" for field in FIELDS)
            raise UserError(f"--columns has {name!r}; expected {expected}")
        if name in mapping:
            raise UserError(f"--columns gives {name} twice, {mapping[name]!r} and {column!r}; choose one")
        mapping[name] = column
    texts = {"instruction": "instruction", "output": "output"}
    texts |= {name: column for name, column in mapping.items() if name in (*texts, "input")}
    for one, other in itertools.combinations(texts, 2):
        if texts[one] == texts[other]:
            raise UserError(f"--columns takes {texts[one]!r} for both {one} and {other}; name a column for each")
    return mapping


def read(path: Path, columns: Mapping[str, str] | None = None) -> tuple[Row, ...]:
    """The rows of one such file, in file order; `columns` and errors as in `load`."""
    return _rows(read_records(path, _columns(columns or {}).values()), columns or {}, str(path))


def read_questions(path: Path, columns: Mapping[str, str]) -> tuple[Row, ...]:
    """The rows of such a file, `""` for an answer that is missing or no text. Columns and errors as in `load`."""
    found, rows = _columns(columns), []
    needed = [found[field] for field in ("instruction", "input") if field == "instruction" or field in columns]
    for place, record in read_records(path, [found[f] for f in ("instruction", "input", "output") if f in found]):
        for column in needed:
            if column not in record:
                raise UserError(
                    f"{place}: no column '{column}'; the columns are {listed(record)}; rename the one meant"
                )
        answer = record.get(found["output"])
        answer = _text(answer, found["output"], place, blank=True) if isinstance(answer, str) else ""
        rows.append(Row(_instruction(record, found, place), answer, ""))
    if not rows:
        raise UserError(f"{path}: no rows; expected at least one row with '{needed[0]}'")
    return tuple(rows)


def _columns(columns: Mapping[str, str]) -> dict[str, str]:
    """The column of every field; one called `input` that another field takes is no input."""
    found = {field: columns.get(field, field) for field in FIELDS}
    taken = "input" not in columns and "input" in columns.values()
    return {field: column for field, column in found.items() if field != "input" or not taken}


def _instruction(record: Record, found: Mapping[str, str], place: str) -> str:
    """An instruction, and behind it its input, if there is one."""
    text = _text(record[found["instruction"]], found["instruction"], place, blank=False)
    about = record.get(column := found.get("input"))
    about = "" if about is None else _text(about, column, place, blank=True)
    return f"{text}\n\n{about}" if about.strip() else text


def split(rows: tuple[Row, ...], seed: int, where: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(train, test) of `rows`, neither empty, in their order, divided by instruction so that repeated ones do not leak.

    Of each task of each client a fifth of the distinct instructions, and one at least where there are two, goes to test
    with all their rows. `where` names the rows in the `UserError` for a single instruction.
    """
    instructions = list(dict.fromkeys(row.instruction for row in rows))
    if len(instructions) < 2:
        raise UserError(
            f"{where}: only one instruction, so no test rows can be held out; give at least 2 different ones"
        )
    groups: dict[tuple[str, str], dict[str, None]] = {}  # whose scores want test rows
    group_of = {row.instruction: (row.client, row.task) for row in reversed(rows)}  # of its first row
    for instruction in instructions:
        groups.setdefault(group_of[instruction], {})[instruction] = None
    if all(len(group) == 1 for group in groups.values()):
        groups = {("", ""): dict.fromkeys(instructions)}
    shuffled, held_out = random.Random(f"{seed}/split"), set()
    for group in map(list, groups.values()):
        shuffled.shuffle(group)
        held_out.update(group[: min(max(round(HELD_OUT * len(group)), 1), len(group) - 1)])
    return (
        tuple(row for row in rows if row.instruction not in held_out),
        tuple(row for row in rows if row.instruction in held_out),
    )


def _split_files(directory: Path) -> tuple[Path, Path]:
    """The train and the test file of a directory."""
    found: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.stem in ("train", *TEST_NAMES) and path.is_file():
            if path.stem in found:
                raise UserError(f"{directory}: both {found[path.stem].name} and {path.name}; keep one of them")
            found[path.stem] = path
    if "train" not in found:
        saved = any((directory / name).exists() for name in ("dataset_dict.json", "dataset_info.json"))
        remedy = "; datasets.load_from_disk reads it, and to_parquet writes what is expected" if saved else ""
        raise UserError(f"{directory}: no train file; expected train and test as one of {listed(SUFFIXES)}{remedy}")
    test_name = next((name for name in TEST_NAMES if name in found), None)
    if test_name is None:
        raise UserError(
            f"{directory}: no test rows beside {found['train'].name}; add a test file named {', '.join(TEST_NAMES)}, "
            "or give the train file itself and it is split"
        )
    return found["train"], found[test_name]


def _rows(records: Iterable[tuple[str, Record]], columns: Mapping[str, str], where: str) -> tuple[Row, ...]:
    """Checked rows from (place, record) pairs; a place reads "PATH line 3"."""
    rows: list[Row] = []
    found = _columns(columns)
    for place, record in records:
        for field, column in found.items():
            # An optional column that the user named has to be there; the default one may be absent.
            if column not in record and (field not in OPTIONAL or field in columns):
                remedy = "fill it in or remove the row" if rows else f"name it with --columns {field}=YOUR_COLUMN"
                raise UserError(
                    f"{place}: no column '{column}' for the {field}; the columns are {listed(record)}; {remedy}"
                )
        task, client = record.get(found["task"]), record.get(found["client"])
        client = str(client) if type(client) is int else client
        rows.append(
            Row(
                _instruction(record, found, place),
                _text(record[found["output"]], found["output"], place, blank=False),
                "" if task is None else _text(task, found["task"], place, blank=True),
                "" if client is None else _text(client, found["client"], place, blank=True),
            )
        )
    if not rows:
        raise UserError(f"{where}: no rows; expected at least one row with {listed(FIELDS[:2])}")
    return tuple(rows)


def _text(value: object, column: str, place: str, blank: bool) -> str:
    if value is None:
        raise UserError(f"{place}: '{column}' is null; expected text: fill it in or remove the row")
    if not isinstance(value, str):
        raise UserError(
            f"{place}: '{column}' is {shown(value)} ({type(value).__name__}); expected text: write it as a string"
        )
    if not blank and not value.strip():
        raise UserError(f"{place}: '{column}' is blank; expected text: fill it in or remove the row")
    try:
        value.encode()  # JSON can spell half a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: '{column}' has a lone surrogate at character {error.start}; remove it") from error
    return value


def _hugging_face(spec: str, columns: Mapping[str, str] | None, seed: int) -> Dataset:
    import datasets  # here, for it takes seconds and few commands need it

    try:
        loaded = datasets.load_dataset(*spec.split(":"))
    except Exception as error:  # the hub, the network and each builder raise types of their own
        reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__  # the second line has the choice
        remedy = "; choose a configuration as in openai/gsm8k:main" if "onfig" in reason else ""
        raise UserError(
            f"'{spec}' is neither a local path nor a Hugging Face data set that loads ({reason}){remedy}"
        ) from error
    if "train" not in loaded:
        raise UserError(f"{spec}: no train split; the splits are {listed(loaded)}")

    def rows(name: str) -> tuple[Row, ...]:
        where, part = f"{spec} split '{name}'", loaded[name]
        kept = [column for column in part.column_names if column in _columns(columns or {}).values()]
        # Pictures and sounds beside the texts would be opened, and paths and addresses in them with them.
        found = part.select_columns(kept) if kept else [{}] * len(part)
        lacking = dict.fromkeys(part.column_names)
        return _rows(((f"{where} row {i}", lacking | row) for i, row in enumerate(found, 1)), columns or {}, where)

    test_name = next((name for name in TEST_NAMES if name in loaded), None)
    if test_name is None:
        train, test = split(rows("train"), seed, spec)
        return Dataset(train, test, spec)
    return Dataset(rows("train"), rows(test_name), spec)
