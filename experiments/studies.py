"""One choice at a time: what becomes of FedRouter and FedIT when clients, rounds, rows, cluster counts or tests change.

    python -m experiments.studies clients --data ../shared/data/flan4      one study: runs what is missing, then draws
    python -m experiments.studies --smoke                                  the tiny model, synthetic rows, two studies
    python -m experiments.studies --redraw                                 from the committed summaries alone

Every study starts from Table 1's Dual at its reduced budget and changes one thing (`STUDIES`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console

from experiments import studies_figures, summaries, table1, table1_tables, weights
from experiments.measurements import show_markdown
from experiments.methods import variant
from experiments.precision import PRECISIONS
from experiments.sweep import at_least_one, runs_of, sweep
from fedrouter_jax import files
from fedrouter_jax.errors import UserError
from fedrouter_jax.records import PARTS
from fedrouter_jax.terminal import guarded, parse


class Study(NamedTuple):
    """Values of one choice; `changes` maps a value to what it changes in the config and its sections."""

    what: str
    values: tuple
    changes: Callable[[Any], dict[str, Any]]
    methods: tuple[str, ...] = ("fedrouter", "fedit")
    smoke: tuple = ()  # values of the smoke run, where they are not the first two
    model: str | None = None  # the base model, where it is not Table 1's (the smoke run's is always tiny)
    rows: str | None = None  # a folder of rows beside that of --data, where it is not that (nor in the smoke run)


def peak_rate(rate: float) -> dict[str, Any]:
    """What a peak learning rate changes: the least one stays a tenth of it."""
    return {"local": {"learning_rate": rate, "min_learning_rate": rate / 10}}


STUDIES = {
    "clients": Study(
        "clients (Figure 6)", (4, 8, 16, 32, 64), lambda n: {"data": {"clients": n}},
        ("fedrouter+", "fedrouter", "fedit"),
    ),
    "eight-clients": Study(
        "clients, two of whom hold each pair of tasks", (8,), lambda n: {"data": {"clients": n}},
        ("fedrouter+", "fedit", "clustered", "fedlease"),
    ),
    "rounds": Study("rounds", (2, 4, 8, 16), lambda n: {"rounds": {"rounds": n}}),
    "rows": Study("training rows a client", (10, 20, 40, 80), lambda n: {"data": {"train_rows": n}}),
    "local-clusters": Study(
        "local clusters n_l, where two are right", (1, 2, 3, 4),
        lambda n: {"cluster": {"local_clusters": n}}, ("fedrouter",),
    ),
    "global-clusters": Study(
        "global clusters n_g, where four are right", (2, 3, 4, 6, 8),
        lambda n: {"cluster": {"global_clusters": n}}, ("fedrouter",),
    ),
    "routing": Study(
        "routing of a client's own texts", ("local", "global", "oracle"),
        lambda mode: {"evaluation": {"personalised_routing": mode}}, ("fedrouter",),
    ),
    "eight-tasks": Study(
        "clients that hold two of flan8's eight tasks each", (8,), lambda n: {"data": {"clients": n, "mix_rows": 48}},
        ("fedrouter+", "fedit", "clustered"), rows="flan8",
    ),
    "recipe": Study(
        "embedding recipe", ("paper", "standardised", "refined"),
        lambda name: {"cluster": {"recipe": name}}, ("fedrouter",),
    ),
    "mixture": Study(
        "alpha of Dirichlet mixtures of tasks", (0.05, 0.5, 5.0),
        lambda alpha: {"data": {"scenario": "dirichlet", "mixture_alpha": alpha}},
    ),
    "newcomers": Study(
        "of six clients, those that join after training", (0, 1, 2), lambda n: {"data": {"clients": 6, "newcomers": n}},
        ("fedrouter", "fedit", "clustered", "ifca", "fedlease", "feddpa-t", "fedalt", "local"),
    ),
    "shift": Study(
        "places by which clients' tests are shifted, any adapter allowed", (0, 1, 2),
        lambda n: {"data": {"shift": n}, "evaluation": {"personalised_routing": "global"}},
        ("fedrouter", "fedit", "local"),
    ),
    "unseen": Study(
        "task that no client holds", ("none", "gigaword", "glue_qqp", "samsum", "web_nlg_en"),
        lambda task: {"data": {"unseen": () if task == "none" else (task,), "mix_rows": 96}},
        ("fedrouter+", "fedit"), smoke=("none", "headline"),
    ),
    "precision": Study(
        "precision of the frozen base", ("float32", "mixed", "bfloat16", "int8", "nf4"),
        lambda name: dict(zip(("dtype", "quantise"), PRECISIONS[name], strict=True)), ("fedrouter",),
    ),
    "model": Study(
        "base model (Figure 5; the larger two by experiments.weights)",
        ("smollm2-135m", *(str(weights.path(name)) for name in weights.MODELS)),
        lambda name: {"model": name}, ("fedrouter+", "fedit"), smoke=("tiny",),
    ),
    "rate": Study(
        "peak learning rate with the largest base model", (0.001, 0.005),
        peak_rate, ("fedrouter+", "fedit"), model=str(weights.path("qwen2.5-coder-1.5b")),
    ),
    "rate-eight-clients": Study(
        "peak learning rate with eight clients", (0.0025, 0.005, 0.01, 0.02, 0.04),
        lambda rate: {**peak_rate(rate), "data": {"clients": 8}}, ("fedrouter+", "fedit", "clustered", "fedlease"),
    ),
    "rate-0.5b": Study(
        "peak learning rate with the middle base model", (0.001, 0.005),
        peak_rate, ("fedrouter+", "fedit", "clustered", "fedlease"), model=str(weights.path("qwen2.5-coder-0.5b")),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Studies:
    """One choice at a time."""

    study: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Which studies; by default all, with --smoke the first two."""
    data: str = "flan4"
    """Folder of the real rows."""
    seeds: int = 2
    """Seeds 0 .. N-1."""
    only: tuple[str, ...] = ()
    """Of a study's runs only these, a method and a value as METHOD-VALUE (fedit-0.001); by default all."""
    out: Path | None = None
    """Folder for summaries, tables and figures, and for the runs themselves (work); by default docs/results/studies and
    runs/studies, or runs/smoke."""
    smoke: bool = False
    """The tiny random model on synthetic rows: one method, one seed, the first two values of a study."""
    redraw: bool = False
    """Only draw from the summaries in --out."""


def main(options: Studies) -> None:
    """Run what is missing of each study, then draw it."""
    console = Console()
    usual = Path("runs/smoke/studies" if options.smoke else "docs/results/studies")
    out = options.out or usual
    at_least_one(seeds=options.seeds)
    unknown = sorted(set(options.study) - set(STUDIES))
    if unknown:
        raise UserError(f"no study is called {unknown[0]!r}; choose among {', '.join(STUDIES)}")
    for folder in map(out.joinpath, options.study) if options.study else (out,):
        if options.redraw and not any(folder.glob("*.json" if options.study else "*/*.json")):
            raise UserError(f"{folder} holds no summaries to draw; run without --redraw, or choose another --out")
    for name in options.study or (tuple(STUDIES)[:2] if options.smoke else tuple(STUDIES)):
        kept = out / name
        if not options.redraw:
            made = chosen(name, configs(name, options), options.only)
            weights.check({made[run].model for run in made if not summaries.known(kept / f"{run}.json", made[run])})
            folder = Path("runs/smoke/studies-runs" if options.smoke else "runs/studies")
            sweep(made, runs_of(options.out, usual, folder) / name, console, kept)
        found = summaries.load(kept)
        if found and not cells(STUDIES[name], found):
            raise UserError(f"{kept} holds no run of the study to draw; remove {next(iter(found))}.json")
        if found:
            files.write(out / f"{name}.md", markdown(name, found))
            figure(name, found).savefig(out / f"{name}.png", dpi=100, bbox_inches="tight")
            show_markdown(out / f"{name}.md")


def configs(name: str, options: Studies) -> dict:
    """`{"method-value-seed": config}` of a study."""
    study, basis = STUDIES[name], table1.budget(table1.Table1(data=options.data, smoke=options.smoke), "dual")
    seeds, values, methods = options.seeds, study.values, study.methods
    if study.model and not options.smoke:
        basis = replace(basis, model=study.model)
    if study.rows and not options.smoke:
        basis = replace(basis, data=replace(basis.data, data=str(Path(options.data).parent / study.rows)))
    if options.smoke:
        seeds, values, methods = 1, study.smoke or values[:2], methods[:1]
    made = {}
    for seed in range(seeds):
        for value in values:
            parts = {
                part: replace(getattr(basis, part), **new) if isinstance(new, dict) else new
                for part, new in study.changes(value).items()
            }
            for method in methods:
                config = variant(replace(basis, **parts), method, seed)
                made[f"{method}-{label(value)}-{seed}"] = config
    return made


def chosen(name: str, made: dict, only: tuple[str, ...]) -> dict:
    """Those of a study's configs that `--only` names; all where it names none."""
    kinds = dict.fromkeys(run.rpartition("-")[0] for run in made)
    for kind in only:
        if kind not in kinds:
            raise UserError(f"the study {name} has no runs {kind!r}; choose --only among {', '.join(kinds)}")
    return {run: config for run, config in made.items() if not only or run.rpartition("-")[0] in only}


def label(value: Any) -> str:
    """A value in file names and figures."""
    return str(value).rpartition("/")[2].removesuffix(".gguf")


def cells(study: Study, found: dict[str, dict]) -> dict[tuple[str, Any], list[dict]]:
    """Summaries over seeds by (method, value), in the study's order."""
    table: dict[tuple[str, Any], list[dict]] = {}
    for method in study.methods:
        for value in dict.fromkeys((*study.values, *study.smoke)):
            same = [found[name] for name in sorted(found) if name.rpartition("-")[0] == f"{method}-{label(value)}"]
            if same:
                table[method, value] = same
    return table


def markdown(name: str, found: dict[str, dict]) -> str:
    """A row a (method, value): scores of every part and task, clustering and routing accuracy."""
    study = STUDIES[name]
    table = cells(study, found)
    parts = [part for part in PARTS if any(part in s["scores"] for same in table.values() for s in same)]
    basis = next(iter(table.values()))
    first = {str(number): summary for number, summary in enumerate(basis)}
    lines = [f"# Study: {study.what}", "", "The first row, from which the others differ in that alone:", ""]
    *about, seeds = table1_tables.setting(first)
    if len({len(same) for same in table.values()}) > 1:
        seeds = (
            "Mean ± half of the 95 % interval over as many seeds, from 0 on, as a row says; without ±: one seed. "
            "Generalisation: the mix of all tasks."
        )
    lines += [*about, seeds, ""]
    tasks = sorted({task for same in table.values() for s in same for part in parts for task in by_task(s, part)})
    columns = [name, "method", "seeds", *parts, *tasks, "rows clustered right", "own texts routed right"]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rows = len(lines)
    for (method, value), same in table.items():
        scores = [[summaries.score(s, part) for s in same if part in s["scores"]] for part in parts]
        row = [table1_tables.text(values, False) if values else "" for values in scores]
        clustered = [s["accuracy"]["global"] for s in same if s["accuracy"]]
        routed = [s["scores"]["personalised"].get("routing_accuracy") for s in same]
        shares = [values if values and None not in values else None for values in (clustered, routed)]
        for task in tasks:
            values = [[by_task(s, part)[task] for s in same if task in by_task(s, part)] for part in parts]
            row.append(" / ".join(table1_tables.mean_of(scores, len(same)) for scores in values))
        row += ["" if values is None else f"{100 * np.mean(values):.1f} %" for values in shares]
        lines.append(f"| {label(value)} | {method} | {len(same)} | {' | '.join(row)} |")
    fewer = "; in brackets of how many seeds, where not of all" if any(" (" in line for line in lines[rows:]) else ""
    lines += ["", f"In a task's column: {' / '.join(parts)}{fewer}."]
    return "\n".join([*lines, "", f"![{name}]({name}.png)", ""])


def by_task(summary: dict, part: str) -> dict[str, float]:
    """ROUGE-1 of a part by task."""
    return summary["scores"].get(part, {}).get("rouge1", {}).get("per_task", {})


def figure(name: str, found: dict[str, dict]) -> Figure:
    """The study's figure; that of tasks that nobody holds shows their own scores."""
    study = STUDIES[name]
    table = cells(study, found)
    there = {value for _, value in table}
    ticks = {value: label(value) for value in (*study.values, *study.smoke) if value in there}
    if name == "unseen":
        return studies_figures.unseen(table, ticks)
    return studies_figures.figure(study.what, table, ticks)


if __name__ == "__main__":
    arguments = parse(Studies, prog="python -m experiments.studies")
    sys.exit(guarded(lambda: main(arguments)))
