"""Routed answers and exports of a finished run."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import begun

from fedrouter_jax import config as config_lib
from fedrouter_jax import experiment, files, runs, serve
from fedrouter_jax.cli import main
from fedrouter_jax.errors import UserError
from fedrouter_jax.presets import smoke


def test_route_answers_with_the_nearest_adapter(finished, capsys):
    texts = ["Facts: Red Cafe, town, Oslo\nTurn the facts into one sentence.", "Is tea good?\nIs tea bad?\nSame?"]
    assert main(["route", str(finished), *texts, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["text"] for answer in answers] == texts
    for answer in answers:
        assert len(answer["distances"]) == 4
        assert answer["slot"] == int(np.argmin(answer["distances"]))
        assert answer["adapter"] == f"cluster_{answer['slot']}" and isinstance(answer["answer"], str)
        assert not answer["cut"]


def test_route_shows_all_of_texts_without_spaces_and_says_which_were_cut(finished, capsys):
    text = "".join(chr(0x4E00 + i) for i in range(40)) + "\x1b[2J :100:"  # which would clear the terminal, and a smiley
    assert main(["route", str(finished), text, 999 * "long "]) == 0
    shown = capsys.readouterr()
    assert set(text) - {"\x1b"} <= set(shown.out) and not {"…", "\x1b"} & {*shown.out}
    (note,) = shown.err.splitlines()
    assert note == "note: longer than --max-length 320, so cut at its end: text 2"


def test_route_answers_the_rows_of_a_file_as_the_same_texts(finished, tmp_path, capsys):
    texts = ["Facts: Red Cafe, town, Oslo\nTurn the facts into one sentence.", *(12 * [999 * "long "])]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps({"instruction": text, "id": 1}) + "\n" for text in texts))  # no answers there
    assert main(["route", str(finished), "--rows", str(file), "--json"]) == 0
    shown = capsys.readouterr()
    assert [json.loads(line) for line in shown.out.splitlines()] == serve.route(finished, texts)
    *progress, note = shown.err.splitlines()
    assert [line.split(",")[0] for line in progress][-1] == "answering 13/13"
    assert note.endswith("so cut at its end: text 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more")


def test_a_file_of_texts_has_them_where_the_rows_of_the_run_had_theirs(tmp_path):
    data = dataclasses.replace(smoke().data, data="rows.csv", columns=("instruction=question", "output=answer"))
    files.write(tmp_path / "config.json", config_lib.to_json(dataclasses.replace(smoke(), data=data)))
    (tmp_path / "asked.csv").write_text('id,question\n1,"Is it so,\nor not?"\n2,Why?\n')
    rows = serve.questions_of(tmp_path / "asked.csv", tmp_path)
    assert [(row.instruction, row.output) for row in rows] == [("Is it so,\nor not?", ""), ("Why?", "")]


def test_answers_are_compared_with_those_that_a_file_knows(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve.answers, "answer", lambda *_: ["a b", "c d", "e f"])
    known, file = ["a b", "c x", None], tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps({"instruction": "text", "output": answer}) + "\n" for answer in known))
    assert main(["route", str(finished), "--rows", str(file), "--json"]) == 0
    shown = capsys.readouterr()
    answers = [json.loads(line) for line in shown.out.splitlines()]
    assert [answer.get("reference") for answer in answers] == known and "rouge1" not in answers[2]
    assert [answers[i][metric] for i in (0, 1) for metric in ("rouge1", "rouge2", "exact")] == [1, 1, 1, 0.5, 0, 0]
    scores = "ROUGE-1 0.750, ROUGE-2 0.500, ROUGE-L 0.750, exact match 0.500"
    assert shown.err.splitlines()[-1] == f"note: beside 2 known answers: {scores}"


@pytest.mark.parametrize(
    "rows, beside, expected",
    [
        ('{"instruction": "a"}\n', ["text"], "route has 1 texts and --rows"),
        ('{"question": "a"}\n', [], "line 1: no column 'instruction'; the columns are 'question'"),
        ('{"instruction": "a"}\n{"instruction": null}\n', [], "line 2: 'instruction' is null"),
        ('{"instruction": "a", "output": "\\ud83d"}\n', [], "line 1: 'output' has a lone surrogate"),
        ("\n", [], "no rows"),
    ],
)
def test_files_that_cannot_be_routed(rows, beside, expected, finished, tmp_path, capsys):
    (tmp_path / "asked.jsonl").write_text(rows)
    assert main(["route", str(finished), *beside, "--rows", str(tmp_path / "asked.jsonl")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


@pytest.mark.parametrize("texts, expected", [((), "no text to route"), (("a", " "), "text 2"), (("a\udcff",), "UTF-8")])
def test_texts_that_cannot_be_routed(texts, expected, finished):
    with pytest.raises(UserError, match=expected):
        serve.route(finished, texts)


def test_a_long_text_leaves_room_for_its_answer(finished, monkeypatch):
    asked = []
    monkeypatch.setattr(serve.answers, "answer", lambda p, s, prompts, *_: asked.extend(prompts) or [""])
    serve.route(finished, [999 * "long "])
    assert [len(prompt) for prompt in asked] == [smoke().data.max_length - smoke().data.max_response]


@pytest.mark.parametrize(
    "strategy, expected",
    [
        *((name, "say whose with --client") for name in ("clustered", "fedlease", "ifca", "local", "ditto")),
        ("oracle", "routes no new text; use a fedrouter run"),
    ],
)
def test_who_asks_must_be_known_to_methods_with_a_cluster_or_an_adapter_a_client(strategy, expected, monkeypatch):
    prepared, enrolment, state, _ = begun(strategy)
    monkeypatch.setattr(serve.runs, "read", lambda run: runs.Loaded(prepared, enrolment, [], state, None))
    with pytest.raises(UserError, match=expected):
        serve.route(Path("run"), ["a text"])


def test_answers_that_are_interrupted_are_not_said_to_be_kept(finished, monkeypatch, capsys):
    monkeypatch.setattr(serve, "route", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["route", str(finished), "text"]) == 130
    assert capsys.readouterr().err == "fedrouter: interrupted; the same command begins anew\n"


def test_route_refuses_a_client_that_is_not_there(finished, capsys):
    assert main(["route", str(finished), "text", "--client", "9"]) == 2
    assert "clients are 0 to 3" in capsys.readouterr().err


def test_a_client_is_answered_by_its_own_adapters(finished, monkeypatch):
    monkeypatch.setattr(serve.answers, "answer", lambda prepared, state, prompts, *_: [""] * len(prompts))
    texts = [row["instruction"] for row in map(json.loads, (finished / "predictions.jsonl").read_text().splitlines())]
    table, moved = json.loads((finished / "clusters.json").read_text())["table"], 0
    anybody = [found["slot"] for found in serve.route(finished, texts)]
    for client, own in enumerate(table):
        slots = [found["slot"] for found in serve.route(finished, texts, client)]
        assert set(slots) <= set(own)
        moved += slots != anybody
    assert moved  # some texts are of others' tasks


def test_export_writes_what_the_run_holds(finished, tmp_path, capsys):
    assert main(["export", str(finished), "--to", str(tmp_path)]) == 0
    for path in [*finished.glob("adapters/*.json"), *finished.glob("adapters/*/*"), *finished.glob("router/*")]:
        assert (tmp_path / path.relative_to(finished)).read_bytes() == path.read_bytes()
    assert main(["export", str(finished), "--to", str(tmp_path)]) == 2
    assert "adapters of two runs would mix" in capsys.readouterr().err


def test_an_unfinished_run_says_so_when_it_is_used(finished, tmp_path, capsys):
    part = tmp_path / "part"
    shutil.copytree(finished, part)
    shutil.rmtree(part / "checkpoints" / "3")
    for run, notes in ((finished, []), (part, [f"note: {part} has done 2 of 3 rounds"])):
        for arguments in (["route", str(run), "text", "--json"], ["export", str(run), "--to", f"{run}-exported"]):
            assert main(arguments) == 0
            printed, errors = capsys.readouterr()
            assert errors.splitlines() == notes and "note" not in printed


def test_a_run_that_trains_on_while_it_is_read_answers_at_its_latest_checkpoint(finished, tmp_path, monkeypatch):
    """The one that was there when reading began may be gone when the model is loaded."""
    part = tmp_path / "part"
    shutil.copytree(finished, part)
    shutil.rmtree(part / "checkpoints" / "3")
    prepared = experiment.without_rows

    def goes_on(*given):
        shutil.rmtree(part / "checkpoints")
        shutil.copytree(finished / "checkpoints" / "3", part / "checkpoints" / "3")
        return prepared(*given)

    monkeypatch.setattr(experiment, "without_rows", goes_on)
    assert serve.route(part, ["a text"])[0]["round"] == 3
