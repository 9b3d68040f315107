"""A peak learning rate for each method, chosen before any test row is asked.

Each method trains with seed 0 at every rate while a fifth of the training rows is held out (`--validation`). Its rate
is the one with the least loss of clients' own held-out rows; the table's runs train on all rows at it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments import summaries, table1_tables
from experiments.sweep import check_rows, rows_now
from fedrouter_jax import config as config_lib
from fedrouter_jax.config import Config
from fedrouter_jax.errors import UserError


def trials(configs: Mapping[str, Config], rates: Sequence[float]) -> dict[str, Config]:
    """`{"scenario-method-rate": config}` of what is tried for a table's `{"scenario-method-seed": config}`."""
    kinds = {kind_of(name): config for name, config in configs.items()}
    return {
        f"{kind}-{plain(rate)}": at(replace(config, seed=0, data=replace(config.data, validation=True)), rate)
        for kind, config in kinds.items()
        for rate in dict.fromkeys(rates)
    }


def at(config: Config, rate: float) -> Config:
    """The config at another peak rate; what the rate falls to keeps its proportion."""
    least = config.local.min_learning_rate * (rate / config.local.learning_rate)
    return replace(config, local=replace(config.local, learning_rate=rate, min_learning_rate=least))


def check(tried: Mapping[str, Config], configs: Mapping[str, Config], kept: Path) -> None:
    """Raise `UserError` before hours of trials for what would end them, or make them choose by rows of the test.

    `configs` are the table's, whose summaries are in `kept`.
    """
    for config in tried.values():
        config_lib.check(config)
    rows, first = (rows_now(of) for of in (configs, {name: replace(c, seed=0) for name, c in configs.items()}))
    if len({*rows.values(), *first.values()}) > 1:
        raise UserError(
            "--rates holds training rows out, but these rows are split, or made, by the seed, so that test rows of one "
            "seed are training rows of another; give a folder with train and test, or --seeds 1"
        )
    check_rows(configs, kept)
    rates = {config.local.learning_rate for config in tried.values()}
    for name, config in configs.items():
        path = kept / f"{name}.json"
        if path.exists() and not any(summaries.known(path, at(config, rate)) for rate in rates):
            theirs = config_lib.of_json(summaries.read(path)["config"], path)
            rate = theirs.local.learning_rate
            other = summaries.differing(theirs, summaries.portable(at(config, rate))) or f"the rate {rate:g}"
            raise UserError(f"{path} is of another experiment, with {other}; choose another --out or remove it")


def chosen(tried: Mapping[str, dict]) -> dict[str, float]:
    """`{"scenario-method": rate}`: of the rates in summaries of what was tried the one of least loss."""
    found = {"-".join(kind): losses for kind, losses in by_rate(tried).items()}
    for kind, losses in found.items():
        if min(losses.values()) == math.inf:
            raise UserError(f"{kind}: no loss is finite at {', '.join(map(plain, losses))}; give lower --rates")
    return {kind: min(losses, key=losses.get) for kind, losses in found.items()}


def tuned(configs: Mapping[str, Config], rates: Mapping[str, float]) -> dict[str, Config]:
    """A table's configs, each at the rate of its scenario and method."""
    return {name: at(config, rates[kind_of(name)]) for name, config in configs.items()}


def by_rate(tried: Mapping[str, dict]) -> dict[tuple[str, str], dict[float, float]]:
    """`{(scenario, method): {rate: loss of clients' own held-out rows}}`; infinite where it was no finite number."""

    def loss(summary):
        return summary["scores"]["personalised"].get("loss", {"mean": math.inf})["mean"]

    return {
        kind: {summary["config"]["local"]["learning_rate"]: loss(summary) for summary in same}
        for kind, same in table1_tables.grouped(tried).items()
    }


def kind_of(name: str) -> str:
    """Scenario and method of a run's name."""
    return name.rpartition("-")[0]


def plain(rate: float) -> str:
    """A rate without an exponent, whose sign would part a run's name."""
    return np.format_float_positional(rate, trim="-")


def markdown(tried: Mapping[str, dict], runs: Mapping[str, dict]) -> list[str]:
    """A section of the table's report: the losses, and which rates its runs have; nothing where none was tried."""
    found = by_rate(tried)
    if not found:
        return []
    rates = sorted({rate for losses in found.values() for rate in losses})
    about = (
        "Loss of clients' own rows, nats a token, where a fifth of the training rows is held out; seed 0. Bold: at the "
        "peak rate of the method's runs above. Where that is at an end of what was tried, others may be better."
    )
    lines = ["## Learning rates", "", about, "", f"| | {' | '.join(map(plain, rates))} |"]
    lines.append("|---" * (len(rates) + 1) + "|")
    taken = {kind: same[0]["config"]["local"]["learning_rate"] for kind, same in table1_tables.grouped(runs).items()}
    for (scenario, method), losses in found.items():
        cells = [
            table1_tables.text([losses[rate]], rate == taken.get((scenario, method))) if rate in losses else ""
            for rate in rates
        ]
        lines.append(f"| {method}, {scenario} | {' | '.join(cells)} |")
    return [*lines, ""]
