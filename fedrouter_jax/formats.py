"""The files of a run directory: what they hold, and how they are read and checked. Written by `runs`, read by all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes none of typing before Python 3.12

from fedrouter_jax.errors import UserError

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Score(TypedDict):
    """A metric of a part."""

    mean: float  # over clients
    per_task: dict[str, float]
    per_client: dict[str, float]


class Part(TypedDict):
    """The scores of one kind of questions."""

    rows: int
    rouge1: Score
    rouge2: NotRequired[Score]  # what reports can do without, older runs may lack
    rougeL: NotRequired[Score]
    exact: NotRequired[Score]
    loss: NotRequired[Score]  # nats a response token
    routing_accuracy: NotRequired[float]


class Scores(TypedDict):
    """`scores.json`."""

    personalised: Part
    generalisation: Part
    newcomers: NotRequired[Part]
    base: NotRequired[Part]
    base_generalisation: NotRequired[Part]
    base_newcomers: NotRequired[Part]


class Lane(TypedDict):
    """What one client trained in a round."""

    client: int
    cluster: int
    weight: float
    loss: list[float | None]  # of each optimiser step; None: not finite
    rejected: NotRequired[str]  # why its result was left out


class Round(TypedDict):
    """A line of `rounds.jsonl`."""

    round: int
    loss: float | None  # mean over lanes whose losses are finite; None: there are none
    learning_rate: float
    seconds: Finite
    bytes_up: Finite
    bytes_down: Finite
    optimiser_steps_per_client: float
    tokens: int  # that all lanes trained on
    lanes: list[Lane]
    table: NotRequired[list[list[int]]]  # as in clusters.json, where a round changed it
    scores: NotRequired[Scores]


Client = TypedDict(
    "Client",
    {
        "client": int,
        "name": NotRequired[str],  # of clients that came with their rows
        "rows": list[int],
        "tasks": list[str],
        "local": list[int],
        "global": list[int],  # a word of Python
    },
)
Accuracy = TypedDict("Accuracy", {"local": float, "global": float})


class Clusters(TypedDict):
    """`clusters.json`: lists by training row of a client, `table` [client][local cluster] of slots."""

    tasks: list[str]
    clustered: bool
    recipe: str | None
    clusters: int
    table: list[list[int]]
    slot_tasks: list[str]
    accuracy: Accuracy | None
    silhouettes: dict[str, Any]
    bytes_up: Finite
    bytes_down: Finite
    never_trained: NotRequired[list[Any]]  # pairs of client and local cluster
    training_rows: NotRequired[int]  # there are, dealt to clients or not
    cut_rows: NotRequired[int]  # training rows longer than --max-length or --max-response
    seen_rows: NotRequired[int]  # test rows that are asked, with an instruction of the training rows
    test_rows: NotRequired[int]  # that are asked
    data: NotRequired[str]  # sha256 of all rows
    model: NotRequired[str]  # that of the weights
    described: NotRequired[str]  # that of the model's configuration and tokenizer, where they are files of their own
    config: NotRequired[dict[str, Any]]  # choices by section.name
    clients: list[Client]


class Answer(TypedDict):
    """A line of `predictions.jsonl`."""

    part: str
    client: int
    row: int
    task: str
    slot: int | None  # None: the base model
    instruction: str
    reference: str
    answer: str
    rouge1: float
    rouge2: NotRequired[float]
    rougeL: NotRequired[float]
    exact: NotRequired[float]
    loss: NotRequired[float | None]  # None: not finite


class Timings(TypedDict):
    """`timings.json`: seconds by phase."""

    device: NotRequired[str]
    total: NotRequired[float]
    embed: NotRequired[float]
    cluster: NotRequired[float]
    evaluate: NotRequired[float]
    taken_over: NotRequired[list[str]]  # from another run of the same sweep


def read_json(path: Path, form: Any = dict[str, Any], remedy: str = "delete it and resume the run") -> Any:
    """The object of that form in a file; None where there is no file yet. Raises `UserError` for anything else."""
    if not path.exists():
        return None
    try:
        return _checked(json.loads(path.read_text(encoding="utf-8")), form)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {wrong(error)}; restore the file, or {remedy}") from None


def read_clusters(path: Path) -> Clusters | None:
    """`clusters.json`, whose lists fit each other; None where there is none yet. Raises `UserError` otherwise."""
    found = read_json(path, Clusters, "start a new run")
    if found is not None and (odd := _odd(found)):
        raise UserError(f"{path}: {odd}; restore the file, or start a new run")
    return found


def _odd(found: Clusters) -> str | None:
    """What does not fit, in words; None: all does."""
    slots, table = range(found["clusters"]), found["table"]
    if len(found["slot_tasks"]) != len(slots):
        return f"{len(found['slot_tasks'])} slot_tasks for {len(slots)} clusters"
    if len(table) != len(found["clients"]) or not table:
        return f"a table of {len(table)} rows for {len(found['clients'])} clients"
    if [client["client"] for client in found["clients"]] != [*range(len(table))]:
        return "the clients are not numbered from 0"
    if any(slot not in slots and slot != -1 for row in table for slot in row):
        return f"the table has slots beyond {len(slots)}"
    for number, (row, client) in enumerate(zip(table, found["clients"], strict=True)):
        rows, tasks, local, own = (client[name] for name in ("rows", "tasks", "local", "global"))
        if not len(rows) == len(tasks) == len(local) == len(own):
            return f"client {number} has lists of unequal lengths"
        if not {*tasks} <= {*found["tasks"]}:
            return f"client {number} has rows of unknown tasks"
        if not all(k in range(len(row)) and row[k] == slot >= 0 for k, slot in zip(local, own, strict=True)):
            return f"the clusters of client {number} are not those of the table"
    if not {*found["slot_tasks"]} <= {"", *found["tasks"]}:
        return "slot_tasks names unknown tasks"
    return None


def read_lines(path: Path, form: Any, remedy: str = "start a new run") -> Iterator[Any]:
    """The lines of a JSON Lines file. A last one without a newline was cut short by a kill: it is left out.

    Raises `UserError` for one that is not of that form.
    """
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], 1):
        try:
            yield _checked(json.loads(line), form)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {wrong(error)}; restore the file or {remedy}") from None


def read_rounds(path: Path, most: int | None = None) -> list[Any]:
    """The lines of `rounds.jsonl`, or the first `most`: those of round 1, 2, 3, ..., each once.

    Raises `UserError` for others.
    """
    rounds = list(islice(read_lines(path, Round), most))
    for number, record in enumerate(rounds, 1):
        if record["round"] != number:
            raise UserError(
                f"{path}, line {number}: round {record['round']}, expected {number}; "
                "restore the file or start a new run"
            )
    return rounds


adapter = cache(TypeAdapter)  # building one takes longer than most checks


def _checked(found: Any, form: Any) -> Any:
    adapter(form).validate_python(found, strict=True)
    json.dumps(found, ensure_ascii=False).encode()  # halves of characters, which no file takes and no plot shows
    return found


def wrong(error: Exception) -> str:
    """What is wrong, in a line."""
    if not isinstance(error, ValidationError):
        return f"not a JSON object ({error})"
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    found = "" if first["type"] == "missing" else f", found {str(first['input'])[:60]!r}"
    return f"{where}: {first['msg']}{found}" if where else f"not a JSON object{found}"
