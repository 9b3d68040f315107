"""Tables of runs (terminal, Markdown, CSV), from run directories alone: no model, no data set.

Runs that share everything but the seed are one row: the mean over seeds and their standard deviation.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table as RichTable
from rich.text import Text

from fedrouter_jax import config as config_lib
from fedrouter_jax import runs as runs_lib
from fedrouter_jax.config import Config, DataConfig
from fedrouter_jax.errors import UserError

PARTS = ("personalised", "generalisation")
BASE_PARTS = ("base", "base_generalisation")
FILES = ("config.json", "rounds.jsonl", "clusters.json", "scores.json", "predictions.jsonl", "timings.json", "adapters")
CSV = ("run", "strategy", "model", "data", "scenario", "seed", "finished", "round", "part", "metric", "level", "name")
NOTE = (
    "pers.: personalised, each client's own tasks. gen.: generalisation, the mix of all tasks. ROUGE: F1 of greedy "
    "answers, mean over a client's rows, then over clients. Sent: all clients and rounds, enrolment included."
)
SEEDS = " Several seeds: mean ± standard deviation (n - 1) over the runs; of costs, the mean."


class Run(NamedTuple):
    """What a run directory holds, as far as the run got."""

    path: Path
    config: Config
    rounds: list[dict]  # the complete lines of rounds.jsonl
    clusters: dict | None
    scores: dict | None  # None: unfinished
    timings: dict


class Row(NamedTuple):
    """One row of the tables: runs that differ in their seed alone, or the base model under them."""

    label: str
    runs: list[Run]
    parts: tuple[str, str]  # names of its personalised and its generalisation part in the scores

    @property
    def base(self) -> bool:
        """Whether this is the model without adapters."""
        return self.parts == BASE_PARTS


class Column(NamedTuple):
    """A column of numbers, one for each run of a row."""

    header: str
    of: Callable[[Row], Sequence[float]]
    form: Callable[[float], str] = "{:.3f}".format
    score: bool = True  # mark the highest, and show the spread over seeds


class Table(NamedTuple):
    """A table of text; `bold` holds (row, column) places."""

    title: str
    header: list[str]
    sides: list[Literal["left", "right"]]
    cells: list[list[str]]
    bold: set[tuple[int, int]]


def write(runs: list[Path], to: Path) -> None:
    """Write `to/report.md`, `to/scores.csv` and `to/plots/*.png`; raises `UserError` for a directory that is no run."""
    from fedrouter_jax import plots  # matplotlib takes a second to load

    found = read_all(runs)
    pictures = plots.write(found, rows_of(found), to / "plots")
    runs_lib.write(to / "scores.csv", to_csv(found))
    runs_lib.write(to / "report.md", to_markdown(found, pictures, to))


def show(runs: list[Path], console: Console) -> None:
    """The tables of the report on a terminal."""
    rows = rows_of(read_all(runs))
    for table in tables(rows):
        drawn = RichTable(title=table.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for place, name in enumerate(table.header):
            # A word a line: narrow columns leave the terminal's width to the numbers, which then need not wrap.
            drawn.add_column(Text(name.replace(" ", "\n")), justify=table.sides[place], overflow="fold")
        for i, cells in enumerate(table.cells):
            drawn.add_row(*(Text(cell, "bold" if (i, j) in table.bold else "") for j, cell in enumerate(cells)))
        console.print(drawn)
    for line in [note(rows), *setups(rows)]:
        console.print(Text(line))


def read_all(paths: Sequence[Path]) -> list[Run]:
    """Each run once, in the order given."""
    return [read(path) for path in {Path(path).resolve(): Path(path) for path in paths}.values()]


def read(path: Path) -> Run:
    """One run directory; raises `UserError` that names what it cannot read."""
    config = config_lib.load(path / "config.json")
    needed = ("round", "loss", "lanes", "bytes_up", "bytes_down", "optimiser_steps_per_client", "seconds")
    rounds = list(read_lines(path / "rounds.jsonl", needed))
    clusters, scores, timings = (read_json(path / f"{name}.json") for name in ("clusters", "scores", "timings"))
    return Run(path, config, rounds, clusters, scores, timings or {})


def read_json(path: Path) -> dict | None:
    """The object in a file; None where there is no file yet."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return dict(found.items())
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a JSON object ({error}); delete the file and resume the run") from None


def read_lines(path: Path, needed: Sequence[str]) -> Iterator[dict]:
    """The lines of a JSON Lines file. A last one without a newline was cut short by a kill: it is left out."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], 1):
        try:
            record = json.loads(line)
            for name in needed:
                record[name]
        except (ValueError, TypeError, KeyError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else f"no JSON object ({error})"
            raise UserError(f"{path}, line {number}: {what}; restore the file or start a new run") from None
        yield record


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Base models first, one for each model and data; then the runs, those that differ in their seed alone together."""
    varying = {name for run in runs for name, value in _choices(run).items() if value != _choices(runs[0])[name]}
    of_base = {"model", "dtype", *(field.name for field in fields(DataConfig))}
    bases: dict[Any, dict[int, Run]] = {}
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        if run.scores and BASE_PARTS[0] in run.scores:
            bases.setdefault(setting(run), {}).setdefault(run.config.seed, run)  # all runs of a seed have the same one
        # An unfinished run stands alone: its scores are of an earlier round.
        groups.setdefault((replace(run.config, seed=0), run.scores is None and run.path), []).append(run)
    rows = []
    for of in bases.values():
        chosen = [of[seed] for seed in sorted(of)]
        rows.append(Row(_label("base model", chosen[0], varying & of_base), chosen, BASE_PARTS))
    for same in groups.values():
        label, first = _label(same[0].config.strategy, same[0], varying), same[0]
        if first.scores is None:
            label += f" (unfinished: {len(first.rounds)} of {first.config.rounds.rounds} rounds)"
        rows.append(Row(label, sorted(same, key=lambda run: run.config.seed), PARTS))
    return rows


def setting(run: Run) -> tuple:
    """Scores compare within a setting: the same model and the same rows on the same clients."""
    return run.config.model, run.config.dtype, run.config.data


def _choices(run: Run) -> dict[str, Any]:
    """Every choice by its name, without those that have a column of their own."""
    flat: dict[str, Any] = {}
    for name, value in asdict(run.config).items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return {name: value for name, value in flat.items() if name not in ("strategy", "seed", "scenario")}


def _label(name: str, run: Run, varying: set[str]) -> str:
    """A name and what sets it apart: model and data, then one or two choices, or the directory where they are more."""
    choices = _choices(run)
    others = [key for key in choices if key in varying - {"model", "data"}]
    shown = [key for key in ("model", "data") if key in varying] + (others if len(others) <= 2 else [])
    apart = [f"{key} {brief(choices[key])}" for key in shown] + ([run.path.name] if len(others) > 2 else [])
    return f"{name} ({', '.join(apart)})" if apart else name


def brief(value: Any) -> str:
    """A choice as shown; of an absolute path only the last part."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)


def latest(run: Run) -> tuple[dict, int]:
    """The final scores, else the last intermediate ones, and their round."""
    if run.scores is not None:
        return run.scores, run.config.rounds.rounds
    taken = [(record["scores"], record["round"]) for record in run.rounds if "scores" in record]
    return taken[-1] if taken else ({}, len(run.rounds))


def scores(row: Row, part: int, *path: str) -> list[float]:
    """A score of each run that has it; `part` is 0 (personalised) or 1; `path` such as "rouge1", "mean"."""
    found: list[Any] = [latest(run)[0].get(row.parts[part]) for run in row.runs]
    for key in path:
        found = [entry.get(key) if isinstance(entry, dict) else None for entry in found]
    return [float(value) for value in found if value is not None]


def cost(run: Run) -> dict[str, float]:
    """Bytes sent, optimiser steps a client and round, seconds, lanes rejected: what of it is known."""
    found: dict[str, float] = {}
    for name in ("bytes_up", "bytes_down"):
        found[name] = sum(record[name] for record in run.rounds) + (run.clusters or {}).get(name, 0)
    if run.rounds:
        found["optimiser_steps_per_client"] = float(np.mean([r["optimiser_steps_per_client"] for r in run.rounds]))
        found["seconds_training"] = sum(record["seconds"] for record in run.rounds)
        found["rejected_lanes"] = sum("rejected" in lane for record in run.rounds for lane in record["lanes"])
    return found | ({"seconds_total": run.timings["total"]} if "total" in run.timings else {})


def accuracy(run: Run) -> dict[str, float]:
    """Clustering accuracy of training rows, "local" and "global"; empty where nothing is clustered."""
    return (run.clusters or {}).get("accuracy") or {}


def tasks_of(rows: Sequence[Row], part: int) -> list[str]:
    """The tasks that a part has scores of."""
    found = [latest(run)[0].get(row.parts[part], {}) for row in rows for run in row.runs]
    return sorted({task for entry in found for task in entry.get("rouge1", {}).get("per_task", {})})


def tables(rows: Sequence[Row]) -> list[Table]:
    """Scores, cost, and ROUGE-1 of each task; the highest mean of a setting is bold."""

    def of(measure: Callable[[Run], dict], name: str) -> Callable[[Row], list[float]]:
        return lambda row: [] if row.base else [measure(run)[name] for run in row.runs if name in measure(run)]

    quality = [
        Column(f"{short} {title}", lambda row, part=part, metric=metric: scores(row, part, metric, "mean"))
        for part, short in enumerate(("pers.", "gen."))
        for metric, title in (("rouge1", "ROUGE-1"), ("rougeL", "ROUGE-L"))
    ]
    share, size = "{:.1%}".format, lambda count: decimal(round(count))
    right = [Column("rows in right cluster", of(accuracy, "global"), share)] + [
        Column(f"{short} rows routed right", lambda row, part=part: scores(row, part, "routing_accuracy"), share)
        for part, short in enumerate(("pers.", "gen."))
    ]
    spent = [
        Column("steps per client and round", of(cost, "optimiser_steps_per_client"), "{:.3g}".format, False),
        Column("sent up", of(cost, "bytes_up"), size, False),
        Column("sent down", of(cost, "bytes_down"), size, False),
        Column("seconds total", of(cost, "seconds_total"), "{:.1f}".format, False),
        Column("seconds training", of(cost, "seconds_training"), "{:.1f}".format, False),
    ]
    trained = [row for row in rows if not row.base]
    clustered = [row for row in trained if any(map(accuracy, row.runs))]
    found = [tabulate("Scores", rows, quality, lead=True), tabulate("Cost", trained, spent)]
    found += [tabulate("Clustering and routing accuracy", clustered, right)] if clustered else []
    for part, name in enumerate(PARTS):
        tasks = [
            Column(task, lambda row, part=part, task=task: scores(row, part, "rouge1", "per_task", task))
            for task in tasks_of(rows, part)
        ]
        found += [tabulate(f"ROUGE-1 of each task, {name}", rows, tasks)] if tasks else []
    return found


def tabulate(title: str, rows: Sequence[Row], columns: Sequence[Column], lead: bool = False) -> Table:
    """Text of the numbers, `-` where there is none; with `lead`, scenario and seeds have columns of their own."""
    numbers = [[column.of(row) for column in columns] for row in rows]
    leads = [[name] for name in names(rows)]
    if lead:
        seeds = [", ".join(str(run.config.seed) for run in row.runs) for row in rows]
        leads = [[row.label, row.runs[0].config.data.scenario, of] for row, of in zip(rows, seeds, strict=True)]
    cells = [
        start + [spread(found, column) for found, column in zip(line, columns, strict=True)]
        for start, line in zip(leads, numbers, strict=True)
    ]
    header = ["method", "scenario", "seed"] if lead else ["method"]
    bold = set()
    for j, column in enumerate(columns):
        shown = [column.form(np.mean(line[j])) if line[j] and column.score else "" for line in numbers]
        for i, row in enumerate(rows):
            rivals = [k for k, other in enumerate(rows) if shown[k] and setting(other.runs[0]) == setting(row.runs[0])]
            best = max(rivals, key=lambda k, j=j: np.mean(numbers[k][j]), default=i)
            if len({shown[k] for k in rivals}) > 1 and shown[i] == shown[best]:
                bold.add((i, j + len(header)))
    sides = ["left"] * len(header) + ["right"] * len(columns)
    return Table(title, [*header, *(column.header for column in columns)], sides, cells, bold)


def names(rows: Sequence[Row]) -> list[str]:
    """The rows' labels, with the scenario where there are several, and how many seeds stand behind them."""
    several = len({row.runs[0].config.data.scenario for row in rows}) > 1
    scenario = [f", {row.runs[0].config.data.scenario}" if several else "" for row in rows]
    seeds = [f", {len(row.runs)} seeds" if len(row.runs) > 1 else "" for row in rows]
    return [row.label + where + count for row, where, count in zip(rows, scenario, seeds, strict=True)]


def spread(found: Sequence[float], column: Column) -> str:
    """The number; of several the mean, and ± their standard deviation (n - 1) where they are scores."""
    if not found:
        return "-"
    deviation = f" ± {column.form(float(np.std(found, ddof=1)))}" if column.score and len(found) > 1 else ""
    return column.form(float(np.mean(found))) + deviation


def note(rows: Sequence[Row]) -> str:
    """What the columns mean."""
    return NOTE + (SEEDS if any(len(row.runs) > 1 for row in rows) else "")


def setups(rows: Sequence[Row]) -> list[str]:
    """One line for each row of runs: everything a fair comparison needs."""
    lines = []
    for row in [row for row in rows if not row.base]:
        run, config = row.runs[0], row.runs[0].config
        data, local, lora, rounds = config.data, config.local, config.lora, config.rounds
        said = [
            f"model {brief(config.model)} ({config.dtype})",
            "synthetic data" if data.data == "synthetic" else f"data {brief(data.data)}",
            f"{data.clients} clients, {data.scenario}, at most {data.train_rows} training rows each",
            f"{rounds.rounds} rounds x {local.steps} steps x batch {local.batch}",
            f"learning rate {local.learning_rate:g} to {local.min_learning_rate:g}",
            f"LoRA rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g} on {brief(lora.targets)}",
            f"averages weighted by {rounds.weighting}" if config.strategy != "local" else "no averages",
        ]
        if rounds.participation < 1:
            said.append(f"{rounds.participation:.0%} of the clients a round")
        if run.clusters and run.clusters.get("clustered"):
            said.append(f"{run.clusters['clusters']} clusters, recipe {config.cluster.recipe}")
            said.append(f"local clusters a client and round: {rounds.clusters_per_round or 'all'}")
            routing = config.evaluation.personalised_routing, config.evaluation.generalisation_routing
            said.append("routing {} (personalised), {} (generalisation)".format(*routing))
        devices = sorted({str(of.timings["device"]) for of in row.runs if "device" in of.timings})
        said += [f"device {' and '.join(devices)}"] if devices else []
        rejected = sum(cost(of).get("rejected_lanes", 0) for of in row.runs)
        said += [f"lanes rejected as not finite: {rejected}"] if rejected else []
        if run.scores is None:
            at = f"the scores are of round {latest(run)[1]}" if latest(run)[0] else "no scores yet"
            said.append(f"unfinished, {at}; continue with: fedrouter resume RUN")
        lines.append(f"{row.label}: {'; '.join(said)}.")
    return lines


def to_csv(runs: Sequence[Run]) -> str:
    """Tidy: one line for each run, part, metric, and mean, task or client. Bytes and seconds are plain numbers."""
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    out.writerow([*CSV, "value"])
    for run in runs:
        (taken, at), config = latest(run), run.config
        about = [run.path.resolve().name, config.strategy, brief(config.model), brief(config.data.data)]
        about += [config.data.scenario, config.seed, run.scores is not None, at]
        parts = {"clusters": {f"accuracy_{name}": value for name, value in accuracy(run).items()}, "cost": cost(run)}
        for part, metrics in (parts | taken).items():
            for metric, found in metrics.items():
                levels = found if isinstance(found, dict) else {"mean": found}
                out.writerow([*about, part, metric, "mean", "", levels["mean"]])
                for level in ("task", "client"):
                    for name, value in levels.get(f"per_{level}", {}).items():
                        out.writerow([*about, part, metric, level, name, value])
    return file.getvalue()


def to_markdown(runs: Sequence[Run], pictures: Sequence[Path], to: Path) -> str:
    """The report, with links relative to `to`."""
    rows = rows_of(runs)
    alone = runs[0] if len(runs) == 1 else None
    text = [f"# Run {plain(alone.path.resolve().name)}" if alone else f"# {len(runs)} runs"]
    text += ["\n".join(f"- {plain(line)}" for line in setups(rows))]
    for table in tables(rows):
        lines = [[plain(name) for name in table.header], ["--:" if side == "right" else "---" for side in table.sides]]
        lines += [
            [f"**{plain(cell)}**" if (i, j) in table.bold else plain(cell) for j, cell in enumerate(cells)]
            for i, cells in enumerate(table.cells)
        ]
        text += [f"## {table.title}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    text.insert(4, plain(note(rows)) + " Bold: the highest mean of a setting.")
    text += ["## Plots", "\n\n".join(f"![{path.stem}]({link(path, to)})" for path in pictures)] if pictures else []
    text += samples(alone) if alone else []
    held = [(run, path) for run in runs for path in ([run.path / name for name in FILES] if alone else [run.path])]
    links = [f"- [{plain(path.name or str(path))}]({link(path, to)})" for _, path in held if path.exists()]
    text += ["## Files" if alone else "## Runs", "\n".join(links)]
    return "\n\n".join(text) + "\n"


def samples(run: Run) -> list[str]:
    """The first answer of each task that the trained model gave, personalised."""
    needed = ("part", "task", "client", "slot", "instruction", "reference", "answer", "rouge1")
    first: dict[str, dict] = {}
    for record in read_lines(run.path / "predictions.jsonl", needed):
        if record["part"] == PARTS[0]:
            first.setdefault(record["task"], record)
    text = []
    for task, record in sorted(first.items()):
        where = f"client {record['client']}, adapter {record['slot']}, ROUGE-1 {record['rouge1']:.3f}"
        text.append(f"**{plain(task)}** ({where})\n")
        for name, limit in (("instruction", 150), ("reference", 400), ("answer", 400)):
            text[-1] += f"\n- {name}: {plain(record[name], limit) or '(empty)'}"
    return ["## Answers of the trained model", *text] if text else []


def plain(text: str, limit: int | None = None) -> str:
    """Text on one line that Markdown shows as it is, cut after `limit` characters."""
    line = " ".join(text.split())
    line = line if limit is None or len(line) <= limit else line[:limit] + "..."
    return re.sub(r"([\\`*_\[\]<>|#~&$])", r"\\\1", line)


def link(path: Path, to: Path) -> str:
    """The address of a file from the report's folder."""
    return quote(Path(os.path.relpath(path.resolve(), to.resolve())).as_posix())
