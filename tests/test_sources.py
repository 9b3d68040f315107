"""Sources: the same rows through every format, from files and, without network, from the hub."""

import csv
import json
import subprocess
import sys

import pytest

from fedrouter_jax.data import sources, synthetic
from fedrouter_jax.data.rows import Dataset, Row, digest
from fedrouter_jax.errors import UserError

ROWS = [
    Row('Say "hi",\nplease', "hi", "greet"),
    Row("  Grüße \u2028 auf 日本語 🙂", " hallo ", "greet"),
    Row("2 + 2", "4", "sum"),
    Row("3 + 3", "6", "sum"),
    Row("4 + 4", "8", "sum"),
]


def write(path, rows, fields=Row._fields):
    records = [dict(zip(fields, row, strict=False)) for row in rows]
    if path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
        return path
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(records)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), path)
    return path


def error_of(spec, **arguments):
    with pytest.raises(UserError) as caught:
        sources.load(str(spec), **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", sources.SUFFIXES)
@pytest.mark.parametrize("test_name", ["test", "validation", "val"])
def test_directory_round_trip(tmp_path, suffix, test_name):
    write(tmp_path / f"train{suffix}", ROWS[:3])
    write(tmp_path / f"{test_name}{suffix}", ROWS[3:])
    loaded = sources.load(str(tmp_path))
    assert loaded == Dataset(tuple(ROWS[:3]), tuple(ROWS[3:]), tmp_path.name)


def test_test_split_wins_over_validation_and_formats_may_differ(tmp_path):
    write(tmp_path / "train.csv", ROWS[:3])
    write(tmp_path / "validation.jsonl", ROWS[3:4])
    write(tmp_path / "test.jsonl", ROWS[4:])
    assert sources.load(str(tmp_path)).test == (ROWS[4],)
    for name in ("test", "validation"):
        next(tmp_path.glob(f"{name}.*")).unlink()
    write(tmp_path / "val.csv", ROWS[3:4])
    write(tmp_path / "valid.csv", ROWS[4:])
    assert sources.load(str(tmp_path)).test == (ROWS[4],)
    (tmp_path / "valid.csv").unlink()
    write(tmp_path / "dev.csv", ROWS[4:])
    assert sources.load(str(tmp_path)).test == (ROWS[3],)


def test_json_by_the_name_of_a_list_may_be_lines(tmp_path):
    lines = write(tmp_path / "data.jsonl", ROWS).rename(tmp_path / "data.json")
    assert sources.read(lines) == tuple(ROWS)


def test_a_field_of_a_csv_may_be_long(tmp_path):
    rows = (Row("x" * 200_000, "y", ""),)  # more than Python's reader takes unasked
    assert sources.read(write(tmp_path / "data.csv", rows)) == rows


def test_a_digest_is_of_all_rows_and_their_clients():
    rows = [Row("a", "b", "t"), Row("c", "d", "t")]
    named = [row._replace(client="x") for row in rows]
    splits = [(rows, rows), (rows[:1], rows), (rows, rows[:1]), (rows, rows[::-1]), (named, rows), (rows, named)]
    assert len({digest(Dataset(*parts, "any")) for parts in splits}) == len(splits)


@pytest.mark.parametrize("suffix", sources.SUFFIXES)
def test_columns_map_and_task_may_be_absent(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", [row[:2] for row in ROWS], ("question", "answer"))
    loaded = sources.load(str(path), columns={"instruction": "question", "output": "answer"})
    assert set(loaded.train + loaded.test) == {row._replace(task="") for row in ROWS}
    assert loaded.name == "data"


@pytest.mark.parametrize("suffix", sources.SUFFIXES)
def test_an_input_follows_its_instruction(tmp_path, suffix):
    rows = [("Sum it up.", "a b", "short"), ("Say hello.", "", "hello")]
    path, expected = tmp_path / f"data{suffix}", ["Sum it up.\n\na b", "Say hello."]
    write(path, rows, ("instruction", "input", "output"))  # as Alpaca's
    assert [row.instruction for row in sources.read(path)] == expected
    assert sources.read_questions(path, {}) == sources.read(path)
    write(path, rows, ("instruction", "context", "response"))  # as Dolly's
    named = {"output": "response", "input": "context"}
    assert [row.instruction for row in sources.read(path, named)] == expected
    assert sources.read_questions(path, named) == sources.read(path, named)
    assert [row.instruction for row in sources.read(path, {"output": "response"})] == ["Sum it up.", "Say hello."]
    with pytest.raises(UserError, match="no column 'about' for the input"):
        sources.read(path, named | {"input": "about"})
    with pytest.raises(UserError, match="no column 'about'; the columns are"):
        sources.read_questions(path, {"input": "about"})


def test_a_column_called_input_may_be_the_instruction_itself_or_nothing(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"input": "a", "target": "b"}\n{"input": "c", "target": "d"}')
    taken = {"instruction": "input", "output": "target"}
    assert [row.instruction for row in sources.read(path, taken)] == ["a", "c"]
    assert sources.read_questions(path, taken) == sources.read(path, taken)
    path.write_text('{"instruction": "a", "input": null, "output": "b"}\n{"instruction": "c", "output": "d"}')
    assert [row.instruction for row in sources.read(path)] == ["a", "c"]
    path.write_text('{"instruction": "a", "input": ["x"], "output": "b"}')
    assert "'input' is ['x'] (list); expected text" in error_of(path)


def test_clients_have_names_or_numbers(tmp_path):
    lines = [{"instruction": "a", "output": "b", "who": "ann"}, {"instruction": "c", "output": "d", "who": 7}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, [*lines, {"instruction": "e", "output": "f", "who": None}])))
    loaded = sources.read(path, {"client": "who"})
    assert [row.client for row in loaded] == ["ann", "7", ""]
    path.write_text(json.dumps({"instruction": "a", "output": "b", "client": True}))
    with pytest.raises(UserError, match="'client' is True"):
        sources.read(path)


def test_null_task_is_unknown_and_extra_columns_are_ignored(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"instruction": "a", "output": "b", "task": null, "id": 7}\n\n{"instruction": "c", "output": "d"}\r\n'
    )
    loaded = sources.load(str(path))
    assert set(loaded.train + loaded.test) == {Row("a", "b", ""), Row("c", "d", "")}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_byte_order_mark_is_skipped(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    loaded = sources.load(str(path))
    assert set(loaded.train + loaded.test) == set(ROWS)


def test_one_file_split_is_a_partition_by_seed(tmp_path):
    rows = [Row(f"instruction {i // 2}", f"output {i}", "") for i in range(200)]  # every instruction twice
    path = write(tmp_path / "data.jsonl", rows)
    first = sources.load(str(path), seed=3)
    assert first == sources.load(str(path), seed=3)
    assert first.test != sources.load(str(path), seed=4).test
    assert sorted(first.train + first.test) == sorted(rows)
    assert len(first.test) == 40
    assert not {row.instruction for row in first.train} & {row.instruction for row in first.test}
    assert list(first.train) == [row for row in rows if row in set(first.train)]  # in file order


def test_split_is_the_same_on_every_platform():
    rows = tuple(Row(str(i), "x", "") for i in range(10))
    assert [row.instruction for row in sources.split(rows, 0, "")[1]] == ["0", "8"]
    assert len(sources.split(rows[:8], 0, "")[1]) == 2  # the nearest number


def test_every_task_of_every_client_has_test_rows():
    """Where it has two instructions; one that several clients have is nowhere in both parts."""
    rows = [Row(f"{client} {i}", "x", "ab"[i % 2], client) for client in ("one", "two", "three") for i in range(6)]
    rows += [Row("one 0", "again", "b", "two"), Row("alone", "x", "c", "one")]
    for seed in range(10):
        train, test = sources.split(tuple(rows), seed, "")
        assert sorted(train + test) == sorted(rows)
        assert {(row.client, row.task) for row in test} >= {(c, t) for c in ("one", "two", "three") for t in "ab"}
        assert not {row.instruction for row in train} & {row.instruction for row in test}
        assert "alone" in {row.instruction for row in train}


def test_split_is_never_empty():
    train, test = sources.split((Row("one", "x", ""), Row("two", "x", "")), 0, "")
    assert train and test


def test_synthetic_takes_the_seed():
    assert sources.load("synthetic", seed=5) == synthetic.make(5)


def test_what_not_every_command_needs_is_imported_lazily():
    """Optional libraries, and those that `fedrouter --help` would wait for."""
    slow = ["datasets", "matplotlib", "pandas", "pyarrow", "scipy.optimize", "sklearn", "transformers"]
    code = (
        "import sys, fedrouter_jax.cli, fedrouter_jax.data.sources as s; s.load('synthetic');"
        f"print(*[m for m in {slow} if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set: its splits are what the test puts in the dict."""
    datasets = pytest.importorskip("datasets")
    splits = {}

    def load_dataset(name, config=None):
        assert name == "owner/chat"
        if config is None and "main" in splits:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main']\nExample")
        if config is not None:
            return datasets.DatasetDict({"train": datasets.Dataset.from_list(splits[config])})
        if not splits:
            raise FileNotFoundError("Couldn't find it\non the hub")
        return datasets.DatasetDict({key: datasets.Dataset.from_list(rows) for key, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return splits


def test_hugging_face_splits(hub):
    hub["train"] = [{"q": "a", "a": "b"}]
    hub["validation"] = [{"q": "c", "a": "d"}]
    loaded = sources.load("owner/chat", columns={"instruction": "q", "output": "a"})
    assert loaded == Dataset((Row("a", "b", ""),), (Row("c", "d", ""),), "owner/chat")


def test_hugging_face_train_only_is_split(hub):
    hub["train"] = [row._asdict() for row in ROWS]
    loaded = sources.load("owner/chat")
    assert set(loaded.train + loaded.test) == set(ROWS)
    assert {row.task for row in loaded.test} == {"greet", "sum"}  # one of two or three of each
    assert sources.load("owner/chat", seed=1).test != loaded.test


def test_a_configuration_of_a_hugging_face_data_set_is_named_behind_its_id(hub):
    hub["main"] = [row._asdict() for row in ROWS]
    loaded = sources.load("owner/chat:main")
    assert set(loaded.train + loaded.test) == set(ROWS) and loaded.name == "owner/chat:main"
    message = error_of("owner/chat")
    assert "among the available configs: ['main'])" in message and message.endswith("as in openai/gsm8k:main")
    assert "no such file or directory" in error_of("owner/chat:main:more")


def test_pictures_beside_the_texts_are_not_opened(monkeypatch):
    """What a row of somebody else's names as its picture may be any file, or an address."""
    datasets = pytest.importorskip("datasets")
    rows = [row._asdict() | {"picture": {"bytes": b"junk", "path": "/nowhere.png"}} for row in ROWS]
    found = datasets.Dataset.from_list(rows).cast_column("picture", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"train": found}))
    loaded = sources.load("owner/chat")
    assert set(loaded.train + loaded.test) == set(ROWS)
    with pytest.raises(UserError, match="no column 'question' for the instruction; the columns are .*'picture'"):
        sources.load("owner/chat", columns={"instruction": "question"})


def test_hugging_face_errors(hub):
    assert "'owner/chat' is neither a local path nor" in error_of("owner/chat")
    hub["test"] = [{"instruction": "a", "output": "b"}]
    assert "no train split; the splits are 'test'" in error_of("owner/chat")
    hub["train"] = [{"instruction": "a", "output": 1}]
    assert "owner/chat split 'train' row 1: 'output' is 1 (int)" in error_of("owner/chat")
