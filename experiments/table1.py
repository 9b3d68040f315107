"""Interference and generalisation: methods in Single, Dual and All, at equal optimiser steps (Tables 1 and 3).

    python -m experiments.table1 --data ../shared/data/flan4          what is missing of the table, then the table
    python -m experiments.table1 --data ... --budget long ...         five times the rows, more test rows
    python -m experiments.table1 --data ... --budget full ...         the paper's budget: for a GPU
    python -m experiments.table1 --data ... --rates .005 .01 --out X  each method at the better of two learning rates
    python -m experiments.table1 --smoke                              the tiny model on synthetic rows, two runs
    python -m experiments.table1 --redraw                             the table from the committed summaries alone

Personalised scores (Table 1) are on each client's own tasks, generalisation (Table 3) on the mix of all. The methods of
the paper run in every scenario and with every seed, what is beside them once in Dual. A run that has a summary in --out
is not run again, wherever it was made, so the table can be filled bit by bit.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from experiments import equal, learning_rates, summaries, table1_figures, table1_tables
from experiments.measurements import show_markdown
from experiments.methods import FIRST, METHODS, SCENARIOS, own, variant
from experiments.sweep import at_least_one, runs_of, sweep
from fedrouter_jax import files
from fedrouter_jax import method as method_lib
from fedrouter_jax.config import Config
from fedrouter_jax.errors import UserError
from fedrouter_jax.presets import flan4, flan4_cpu, smoke
from fedrouter_jax.terminal import guarded, parse


@dataclass(frozen=True)
class Table1:
    """Methods by scenario: interference and generalisation."""

    data: str = "flan4"
    """Folder of the real rows."""
    seeds: int = 5
    """Seeds 0 .. N-1."""
    first_seed: int = 0
    """Begin at this seed: several processes can share a table, each with seeds of its own."""
    methods: tuple[str, ...] = FIRST
    """Methods that run in every scenario and with every seed; one of your own as MODULE:FUNCTION."""
    once: tuple[str, ...] = tuple(name for name in METHODS if name not in FIRST)
    """Methods that run in Dual with seed 0 only."""
    scenarios: tuple[Literal["dual", "single", "all"], ...] = SCENARIOS
    """Scenarios."""
    rates: tuple[float, ...] = ()
    """Peak learning rates to choose among, for each method and scenario by rows held out of the training rows before
    any test row is asked: a run more for each. By default all train at the budget's."""
    clients: int | None = None
    """Clients; by default 4, of the full budget 8. Methods that group clients want more of them than tasks."""
    budget: Literal["short", "long", "full"] = "short"
    """24 optimiser steps of 2 rows; or 60 of 4, on all rows there are and with several times the test rows; or the
    paper's: eight clients, 250 of 16."""
    out: Path | None = None
    """Folder for summaries, table and figures, and for the runs themselves (work); by default docs/results/table1
    (-long, -full) and runs/table1, or runs/smoke."""
    smoke: bool = False
    """The tiny random model on synthetic rows: only the first two runs."""
    redraw: bool = False
    """Only draw the table from the summaries in --out."""


def budget(options: Table1, scenario: str) -> Config:
    """The reduced budgets of the table: 4 clients, 24 optimiser steps of 2 rows; or 60 of 4, in mixed precision.

    The full one is that of the paper's launcher (`presets.flan4`), in bfloat16.
    """
    config = _budget(options, scenario)
    if options.clients is None:
        return config
    return replace(config, data=replace(config.data, clients=options.clients))


def _budget(options: Table1, scenario: str) -> Config:
    if options.smoke:
        config = smoke()
        return replace(config, data=replace(config.data, scenario=scenario))
    if options.budget == "full":
        config = flan4(scenario)
        return replace(
            config,
            dtype="bfloat16",
            data=replace(config.data, data=options.data),
            evaluation=replace(config.evaluation, evaluate_at=()),
            compute=replace(config.compute, checkpoint_every=config.rounds.rounds),
        )
    config = flan4_cpu(scenario)
    data = replace(config.data, data=options.data, clients=4, test_rows=16, mix_rows=24, balanced=True)
    if options.budget == "short":
        return replace(config, data=data, rounds=replace(config.rounds, rounds=6))
    return replace(
        config,
        dtype="mixed",
        data=replace(data, train_rows=300, test_rows=96, mix_rows=96),
        rounds=replace(config.rounds, rounds=10),
        local=replace(config.local, steps=6, batch=4, learning_rate=3e-3, min_learning_rate=3e-4),
    )


def main(options: Table1) -> None:
    """Run what is missing, then draw."""
    console = Console()
    name = "table1" if options.budget == "short" else f"table1-{options.budget}"
    usual = Path("runs/smoke" if options.smoke else "docs/results") / name
    out = options.out or usual
    at_least_one(seeds=options.seeds, clients=1 if options.clients is None else options.clients)
    if not 0 <= options.first_seed < options.seeds:
        raise UserError(f"--first-seed is {options.first_seed}; with --seeds {options.seeds} it is one below that")
    named = {*options.methods, *options.once}
    unknown = sorted(name for name in named - set(METHODS) if not own(name))
    if unknown:
        raise UserError(
            f"no method is called {unknown[0]!r}; choose among {', '.join(METHODS)}, or give MODULE:FUNCTION"
        )
    if not options.redraw:
        for method in sorted(filter(own, named)):  # before hours of others
            config = variant(budget(options, "dual"), method, 0)
            method_lib.check(config, method_lib.strategy(config, None))
        folder = Path("runs/smoke/table1-runs" if options.smoke else f"runs/{name}")
        folder, made = runs_of(options.out, usual, folder), configs(options)
        there, now = kept(out), {name: summaries.portable(config) for name, config in made.items()}
        equal.check_budgets(there | now)
        if options.rates:
            tried = learning_rates.trials(made, options.rates)
            if options.first_seed and not all((out / "rates" / f"{name}.json").exists() for name in tried):
                raise UserError("not all --rates have been tried; the process with --first-seed 0 does that first")
            learning_rates.check(tried, made, out / "runs")
            sweep(tried, folder / "rates", console, out / "rates")
            best = learning_rates.chosen({name: summaries.read(out / "rates" / f"{name}.json") for name in tried})
            console.print(f"peak learning rates: {', '.join(f'{kind} {rate:g}' for kind, rate in best.items())}")
            made = learning_rates.tuned(made, best)
        equal.check_rates(there | made)
        sweep(made, folder, console, out / "runs")
    draw(out)
    show_markdown(out / "table1.md")


def configs(options: Table1) -> dict[str, Config]:
    """`{"scenario-method-seed": config}` of the table."""
    seeds = range(options.first_seed, options.seeds)
    jobs = [(seed, s, m) for seed in seeds for s in options.scenarios for m in options.methods]
    jobs += [(0, "dual", method) for method in options.once if options.first_seed == 0]
    if options.smoke:
        jobs = jobs[:2]
    return {
        f"{scenario}-{method}-{seed}": variant(budget(options, scenario), method, seed)
        for seed, scenario, method in jobs
    }


def kept(out: Path) -> dict[str, Config]:
    """The configs of the summaries that the table in a folder shows."""
    return summaries.configs(table1_tables.shown(summaries.load(out / "runs")), out / "runs")


def draw(out: Path) -> None:
    """table1.md, table1.png and, where there are seeds to pair, leads.png from the summaries."""
    found, there = summaries.load(out / "runs"), kept(out)
    equal.check_budgets(there)
    equal.check_rates(there)
    if not table1_tables.grouped(found):
        raise UserError(
            f"{out / 'runs'} holds no run of the table to draw; run without --redraw, or choose another --out"
        )
    tried = learning_rates.markdown(summaries.load(out / "rates"), found)
    files.write(out / "table1.md", table1_tables.markdown(found, tried))
    table1_figures.scores(found).savefig(out / "table1.png", dpi=100, bbox_inches="tight")
    if table1_tables.paired(table1_tables.cells(found)):
        table1_figures.leads(found).savefig(out / "leads.png", dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    arguments = parse(Table1, prog="python -m experiments.table1")
    sys.exit(guarded(lambda: main(arguments)))
