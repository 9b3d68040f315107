"""Tables of runs (terminal, Markdown, CSV), from run directories alone: no model, no data set.

Runs whose results differ by the seed alone are one row: the mean over seeds and their standard deviation.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table as RichTable
from rich.text import Text

from fedrouter_jax import files, formats
from fedrouter_jax.errors import printable
from fedrouter_jax.leads import best_rows, leads, told
from fedrouter_jax.records import (
    PARTS,
    Row,
    Run,
    accuracy,
    brief,
    cost,
    latest,
    names,
    ranges,
    read_all,
    rows_of,
    scores,
    several_scenarios,
    tasks_of,
)
from fedrouter_jax.setups import setups

FILES = ("config.json", "rounds.jsonl", "clusters.json", "scores.json", "predictions.jsonl", "timings.json", "adapters")
CSV = ("run", "strategy", "model", "data", "scenario", "seed", "finished", "round", "part", "metric", "level", "name")
SHORT = ("pers.", "gen.", "new.")  # of records.PARTS
NOTE = (
    "pers.: personalised, each client's own tasks. gen.: generalisation, the mix of all tasks. ROUGE: F1 of greedy "
    "answers, mean over a client's rows, then over clients."
)
NEW = " new.: clients that joined after training, their own tasks."
SEEDS = " ±, but of leads: standard deviation (n - 1) over the seeds, beside their mean."
BOLD = (
    " Bold: the best mean of finished runs on the same rows, in as many rounds, steps and rows a step, where all have "
    "the same seeds; references apart."
)
FEWER = " In brackets: how many seeds have it, where not all."
LEADS = (
    "The method that is best on own tasks (no reference) over each other on the same rows in as many steps, on the "
    "seeds that both have, two or more: mean of the differences by seed ± half of its 95 % interval (Student's t), and "
    "in how many seeds it is ahead. It was chosen by these scores, which flatters it."
)
SENT = "Sent: all clients and rounds, enrolment included."


class Column(NamedTuple):
    """A column of numbers, one for each run of a row."""

    header: str
    of: Callable[[Row], Sequence[float]]
    form: Callable[[float], str] = "{:.3f}".format
    best: Callable | None = max  # of scores, which show their spread over seeds: `max` or `min`, marked


class Table(NamedTuple):
    """A table of text; `bold` holds (row, column) places, `note` is what its columns mean."""

    title: str
    header: list[str]
    sides: list[Literal["left", "right"]]
    cells: list[list[str]]
    bold: set[tuple[int, int]]
    note: str = ""


def write(runs: list[Path], to: Path) -> None:
    """Write `to/report.md`, `to/scores.csv` and `to/plots/*.png`; raises `UserError` for a directory that is no run."""
    from fedrouter_jax import plots  # matplotlib takes a second to load

    found = read_all(runs)
    pictures = plots.write(found, rows_of(found), to / "plots")
    files.write(to / "scores.csv", to_csv(found))
    files.write(to / "report.md", to_markdown(found, pictures, to))


def show(runs: list[Path], console: Console) -> None:
    """The tables of the report on a terminal."""
    rows = rows_of(read_all(runs))
    for table in tables(rows):
        console.print(drawn(table, console.width))
        console.print(Text(f"{printable(table.note)}\n" if table.note else ""))
    for line in setups(rows):
        console.print(Text(printable(line)))


def drawn(table: Table, width: int) -> RichTable:
    """A table for a terminal of that many columns."""
    plain_edges = {"box": SIMPLE_HEAD, "pad_edge": False, "show_edge": False, "collapse_padding": True}
    found = RichTable(title=table.title, title_justify="left", **plain_edges)
    numbers = [j for j, side in enumerate(table.sides) if side == "right"]
    longest = [max(map(cell_len, [*table.header[j].split(), *(cells[j] for cells in table.cells)])) for j in numbers]
    taken = sum(2 + length for length in longest)
    whole = taken + 12 * (len(table.sides) - len(numbers)) <= width  # a name on several lines is read, no number is
    for j, name in enumerate(table.header):
        # A word a line: narrow columns leave the terminal's width to the numbers.
        heading = Text(printable(name).replace(" ", "\n"))
        found.add_column(heading, justify=table.sides[j], overflow="fold", no_wrap=whole and j in numbers)
    for i, cells in enumerate(table.cells):
        found.add_row(*(Text(printable(cell), "bold" if (i, j) in table.bold else "") for j, cell in enumerate(cells)))
    return found


def tables(rows: Sequence[Row]) -> list[Table]:
    """Scores, leads, cost, and ROUGE-1 of each task; the best mean of those that compare is bold."""

    def of(measure: Callable[[Run], dict], name: str) -> Callable[[Row], list[float]]:
        return lambda row: [] if row.base else [measure(run)[name] for run in row.runs if name in measure(run)]

    quality = [
        Column(f"{short} {title}", lambda row, part=part, metric=metric: scores(row, part, metric, "mean"))
        for part, short in enumerate(SHORT)
        for metric, title in (("rouge1", "ROUGE-1"), ("rougeL", "ROUGE-L"))
        if part < 2 or any(scores(row, part, metric, "mean") for row in rows)
    ]
    losses = [
        Column(f"{short} rows", lambda row, part=part: scores(row, part, "loss", "mean"), best=min)
        for part, short in enumerate(SHORT)
        if part < 2 or any(scores(row, part, "loss", "mean") for row in rows)
    ]
    share, size = "{:.1%}".format, lambda count: decimal(round(count))
    right = [Column("rows in right cluster", of(accuracy, "global"), share)] + [
        Column(f"{short} rows routed right", lambda row, part=part: scores(row, part, "routing_accuracy"), share)
        for part, short in enumerate(SHORT[:2])
    ]
    spent = [
        Column("steps per client and round", of(cost, "optimiser_steps_per_client"), "{:.3g}".format, None),
        Column("sent up", of(cost, "bytes_up"), size, None),
        Column("sent down", of(cost, "bytes_down"), size, None),
        Column("seconds total", of(cost, "seconds_total"), "{:.1f}".format, None),
        Column("seconds training", of(cost, "seconds_training"), "{:.1f}".format, None),
    ]
    trained = [row for row in rows if not row.base]
    clustered = [row for row in trained if any(map(accuracy, row.runs))]
    found = [tabulate("Scores", rows, quality, seeds_apart=True)]
    found[0] = found[0]._replace(note=note(rows) + BOLD * bool(found[0].bold) + FEWER * bool(found[0].note))
    found += tabulate_leads(rows)
    if any(column.of(row) for column in losses for row in rows):
        found.append(tabulate("Loss of the reference answers, nats a token", rows, losses))
    found.append(tabulate("Cost", trained, spent)._replace(note=SENT + unmeasured(trained)))
    found += [tabulate("Clustering and routing accuracy", clustered, right)] if clustered else []
    for part, name in enumerate(PARTS):
        tasks = [
            Column(task, lambda row, part=part, task=task: scores(row, part, "rouge1", "per_task", task))
            for task in tasks_of(rows, part)
        ]
        found += [tabulate(f"ROUGE-1 of each task, {name}", rows, tasks)] if tasks else []
    return found


def tabulate(title: str, rows: Sequence[Row], columns: Sequence[Column], seeds_apart: bool = False) -> Table:
    """Text of the numbers, `-` where there is none; `seeds_apart`: they, and scenarios if several, have columns."""
    numbers = [[column.of(row) for column in columns] for row in rows]
    starts, header = [[name] for name in names(rows)], ["method"]
    if seeds_apart:
        header = ["method", *["scenario"] * several_scenarios(rows), "seed"]
        of = [[row.label, row.runs[0].config.data.scenario, ranges([r.config.seed for r in row.runs])] for row in rows]
        starts = [[name, *[scenario] * (len(header) > 2), seeds] for name, scenario, seeds in of]
    cells = [
        start + [spread(found, column, len(row.runs)) for found, column in zip(line, columns, strict=True)]
        for row, start, line in zip(rows, starts, numbers, strict=True)
    ]
    by_column = [[line[j] for line in numbers] for j in range(len(columns))]
    bold = {
        (i, j + len(header))
        for j, (column, found) in enumerate(zip(columns, by_column, strict=True))
        if column.best
        for i in best_rows(rows, found, column.best, column.form)
    }
    sides = ["left"] * len(header) + ["right"] * len(columns)
    several = zip(columns, by_column, strict=True)
    fewer = any(c.best and 0 < len(v) < len(r.runs) for c, found in several for r, v in zip(rows, found, strict=True))
    return Table(title, [*header, *(c.header for c in columns)], sides, cells, bold, FEWER.strip() * fewer)


def spread(found: Sequence[float], column: Column, count: int) -> str:
    """The number, or the mean; of scores ± their standard deviation (n - 1), and of how many, where not of `count`."""
    if not found:
        return "-"
    mean = column.form(float(np.mean(found)))
    if column.best is None:
        return mean
    deviation = f" ± {column.form(float(np.std(found, ddof=1)))}" if len(found) > 1 else ""
    return mean + deviation + f" ({len(found)})" * (len(found) < count)


def note(rows: Sequence[Row]) -> str:
    """What the columns of scores mean."""
    joined = any(scores(row, 2, "rouge1", "mean") for row in rows)
    return NOTE + (NEW if joined else "") + (SEEDS if any(len(row.runs) > 1 for row in rows) else "")


def unmeasured(rows: Sequence[Row]) -> str:
    """Which rows are told no seconds in all, or not of all their runs, and why."""
    taken = [row.label for row in rows if any(run.timings.get("taken_over") for run in row.runs)]
    resumed = [row.label for row in rows if any(run.timings and "total" not in run.timings for run in row.runs)]
    why = (("that took embeddings or base answers over from another run", taken), ("that were resumed", resumed))
    several = " Of several seeds, means." if any(len(row.runs) > 1 for row in rows) else ""
    mixed = [row.label for row in rows if len({run.config.compute for run in row.runs}) > 1]
    several += f" Seconds of {', '.join(mixed)} are of several compute settings." * bool(mixed)
    return several + "".join(f" Seconds total leave out runs {of} ({', '.join(who)})." for of, who in why if who)


def tabulate_leads(rows: Sequence[Row]) -> list[Table]:
    """The table of leads, if there are any."""
    found, several = leads(rows), several_scenarios(rows)
    cells = []
    for lead in found:
        of = [f"{lead.ours.label} over {lead.theirs.label}"]
        of += [lead.ours.runs[0].config.data.scenario] * several
        of += [ranges(lead.seeds)]
        for values in (lead.own, lead.mix):
            of += [told(values), f"{sum(v > 0 for v in values)} of {len(values)}"]
        cells.append(of)
    header = ["method", *["scenario"] * several, "seed"]
    sides = ["left"] * len(header) + ["right"] * 4
    header += [f"{short} {what}" for short in SHORT[:2] for what in ("ROUGE-1", "ahead in")]
    return [Table("Leads", header, sides, cells, set(), LEADS)] * bool(found)


def to_csv(runs: Sequence[Run]) -> str:
    """Tidy: one line for each run, part, metric, and mean, task or client. Bytes and seconds are plain numbers."""
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    out.writerow([*CSV, "value"])
    for run in runs:
        (taken, at), config = latest(run), run.config
        about = [str(run.path), config.strategy, brief(config.model), brief(config.data.data)]
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
    for table in tables(rows):
        lines = [[plain(name) for name in table.header], ["--:" if side == "right" else "---" for side in table.sides]]
        lines += [
            [f"**{plain(cell)}**" if (i, j) in table.bold else plain(cell) for j, cell in enumerate(cells)]
            for i, cells in enumerate(table.cells)
        ]
        text += [f"## {table.title}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
        text += [plain(table.note)] if table.note else []
    text += ["## Settings", "\n".join(f"- {plain(line)}" for line in setups(rows))]
    text += ["## Plots", "\n\n".join(f"![{path.stem}]({link(path, to)})" for path in pictures)] if pictures else []
    text += samples(alone) if alone else []
    paths = [alone.path / name for name in FILES] if alone else [run.path for run in runs]
    links = [f"- [{plain(path.name or str(path))}]({link(path, to)})" for path in paths if path.exists()]
    text += ["## Files" if alone else "## Runs", "\n".join(links)]
    return "\n\n".join(text) + "\n"


def samples(run: Run) -> list[str]:
    """The first answer of each task that the trained model gave, personalised."""
    first: dict[str, dict] = {}
    for record in formats.read_lines(run.path / "predictions.jsonl", formats.Answer, "delete it and resume the run"):
        if record["part"] == PARTS[0]:
            first.setdefault(record["task"], record)
    text = []
    for task, record in sorted(first.items()):
        where = f"client {record['client']}, adapter {record['slot']}, ROUGE-1 {record['rouge1']:.3f}"
        text.append(f"**{plain(task) or 'no task'}** ({where})\n")
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
