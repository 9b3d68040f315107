"""One clear line for rows that cannot be read."""

import re

import pytest
from test_sources import ROWS, error_of, write

from fedrouter_jax.data import sources

GOOD = '{"instruction": "a", "output": "b"}\n'
SURROGATE = '{"instruction": "a\\ud800", "output": "b"}\n'
BAD_FILES = [
    ("empty.jsonl", b"", r"empty\.jsonl: no rows; expected at least one"),
    ("blank.jsonl", b"\n \n", r"blank\.jsonl: no rows"),
    ("empty.csv", b"", r"empty\.csv: no rows"),
    ("header.csv", b"instruction,output\n", r"header\.csv: no rows"),
    ("broken.jsonl", f"{GOOD}\n{GOOD[:20]}\n".encode(), r"broken\.jsonl line 3: not valid JSON \(.*column 21\)"),
    (
        "again.jsonl",
        GOOD.encode() + b'{"instruction": "a", "output": "b", "output": "c"}',
        r"line 2: .*'output' comes twice",
    ),
    ("again.json", b'[{"task": "a", "task": "b"}]', r"again\.json: .*the key 'task' comes twice"),
    ("deep.jsonl", b"[" * 100_000, r"deep\.jsonl line 1: not JSON that can be read"),
    ("digits.jsonl", b'{"task": ' + b"1" * 5000 + b"}", r"digits\.jsonl line 1: not JSON that can be read"),
    ("newline.csv", b'"a\nb",c\n1,2\n', r"newline\.csv line 3: no column 'instruction' .* 'a\\nb', 'c'"),
    (
        "cut.json",
        b'[{"instruction": "a", "output": "b"},\n {"instruc',
        r"cut\.json line 2: not valid JSON .*a list",
    ),
    ("text.json", b'[{"instruction": "a", "output": "b"}, "c"]', r"text\.json row 2: a JSON str; expected an object"),
    ("blank.json", b'[{"instruction": "a", "output": ""}]', r"blank\.json row 1: 'output' is blank"),
    ("deep.json", b"[" * 100_000, r"deep\.json: not JSON that can be read"),
    ("one.json", b'{"rows": [\n]}', r"one\.json line 1: not valid JSON"),
    ("array.jsonl", f"{GOOD}[1, 2]\n".encode(), r"array\.jsonl line 2: a JSON list; expected an object"),
    ("column.jsonl", b'{"instruction": "a", "text": "b"}', r"line 1: no column 'output' .* are 'instruction', 'text';"),
    ("column.csv", b"question,output\na,b\n", r"column\.csv line 2: no column 'instruction' .* 'question', 'output'"),
    ("blank.csv", b'instruction,output\na,b\n" \t",b\n', r"blank\.csv line 3: 'instruction' is blank"),
    ("blank2.jsonl", b'{"instruction": "a", "output": ""}', r"line 1: 'output' is blank"),
    ("latin.jsonl", GOOD.encode() + b'{"instruction": "caf\xe9"}', r"latin\.jsonl line 2: byte 0xe9 is not UTF-8"),
    ("latin.csv", b"instruction,output\na,b\nc,caf\xe9\n", r"latin\.csv line 3: byte 0xe9 is not UTF-8"),
    ("wide.jsonl", GOOD.encode("utf-16"), r"line 1: byte 0xff is not UTF-8"),
    ("number.jsonl", b'{"instruction": "a", "output": 4}', r"line 1: 'output' is 4 \(int\); expected text"),
    ("bool.jsonl", b'{"instruction": "a", "output": true}', r"line 1: 'output' is True \(bool\); expected text"),
    (
        "null.jsonl",
        b'{"instruction": null, "output": "a"}',
        r"line 1: 'instruction' is null; expected text: fill it in",
    ),
    ("later.jsonl", (GOOD + '{"instruction": "a"}').encode(), r"line 2: no column 'output' .*; fill it in or remove"),
    ("SHORT.CSV", b"instruction,output\na\n", r"SHORT\.CSV line 2: 1 fields; expected 2"),  # as Windows names it
    (
        "semi.csv",
        b'"instruction";"output"\n"a";"b"\n',
        r"semi\.csv line 1: no commas in the header .*; save the file with",
    ),
    ("task.jsonl", b'{"instruction": "a", "output": "b", "task": 1}', r"line 1: 'task' is 1 \(int\); expected text"),
    ("half.jsonl", SURROGATE.encode(), r"line 1: 'instruction' has a lone surrogate at character 1"),
    ("quote.csv", b'instruction,output\na,b\n"c,d\ne,f\n', r"quote\.csv line 3: not valid CSV \(unexpected end"),
    ("short.csv", b'instruction,output\n"a\nb",c\nd\n', r"short\.csv line 4: 1 fields; expected 2 .* cut off"),
    ("long.csv", b"instruction,output\na,b,c\n", r"long\.csv line 2: 3 fields; expected 2"),
    ("twice.csv", b"output,output\na,b\n", r"twice\.csv line 1: a column name occurs twice"),
    ("zero.parquet", b"", r"zero\.parquet: not a readable Parquet file"),
    ("noise.parquet", b"PAR1 and then nothing", r"noise\.parquet: not a readable Parquet file"),
    ("notes.txt", b"hello", r"notes\.txt: cannot read a '\.txt' file; expected one of '\.jsonl'"),
    ("one.jsonl", (GOOD * 3).encode(), r"one\.jsonl: only one instruction, so no test rows"),
]


@pytest.mark.parametrize("name, data, expected", BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_bad_file(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    message = error_of(tmp_path / name)
    assert re.search(expected, message), message
    assert message.startswith(str(tmp_path / name))


def test_truncated_and_empty_parquet(tmp_path):
    path = write(tmp_path / "data.parquet", ROWS)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "data.parquet: not a readable Parquet file" in error_of(path)
    path.write_bytes(data[:40] + bytes(60) + data[100:])  # damaged pages under a sound footer
    assert "data.parquet" in error_of(path)


def test_parquet_rows_are_checked(tmp_path):
    path = write(tmp_path / "data.parquet", [ROWS[0], (b"\xff", "x", "y")][1:])
    assert "data.parquet row 1: 'instruction' is b'\\xff' (bytes)" in error_of(path)
    path = write(tmp_path / "data.parquet", [("a", "b")], ("question", "output"))
    assert "row 1: no column 'instruction' for the instruction; the columns are 'question'" in error_of(path)


def test_parquet_columns_that_nobody_asked_for_are_not_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = write(tmp_path / "data.parquet", ROWS)
    table = parquet.read_table(path)
    late = pyarrow.array([2**53] * len(ROWS), pyarrow.timestamp("s"))  # a year that Python's dates do not reach
    parquet.write_table(table.append_column("when", late), path)
    assert len(sources.read(path)) == len(ROWS)
    parquet.write_table(table.append_column("output", table["output"]), path)
    assert "column 'output' occurs twice" in error_of(path)


def test_a_path_that_cannot_be(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "~nosuchuser/x: no path that can be" in error_of("~nosuchuser/x")
    assert "a" * 100 in error_of("a" * 300)  # newer Pythons say that it is no folder


@pytest.mark.parametrize(
    "spec", ["missing.jsonl", "./missing", "/no/such/place", "a/b/c", "two words", "~/no/such", "flan4", "gsm8k:main"]
)
def test_missing_path(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    assert f"{spec}: no such file or directory" in error_of(spec)
    assert "the data source is empty" in error_of("")


def test_directory_without_files_or_test_rows(tmp_path):
    assert "no train file; expected train and test as one of '.jsonl', '.json', '.csv', '.p" in error_of(tmp_path)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").touch()  # by datasets' save_to_disk
    assert "to_parquet writes what is expected" in error_of(tmp_path / "saved")
    write(tmp_path / "train.jsonl", ROWS)
    assert "no test rows beside train.jsonl" in error_of(tmp_path)
    (tmp_path / "test.jsonl").touch()
    assert "test.jsonl: no rows" in error_of(tmp_path)
    write(tmp_path / "train.csv", ROWS)
    assert "both train.csv and train.jsonl" in error_of(tmp_path)


def test_bad_arguments(tmp_path):
    path = write(tmp_path / "data.jsonl", ROWS)
    assert "columns has no field 'prompt'; the fields are 'instruction'" in error_of(path, columns={"prompt": "x"})
    assert "no column 'kind' for the task" in error_of(path, columns={"task": "kind"})
    assert "does not apply to the synthetic data" in error_of("synthetic", columns={"task": "kind"})


def test_unreadable_file_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "data.jsonl", ROWS)

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    assert "data.jsonl: cannot be read (Permission denied)" in error_of(path)
