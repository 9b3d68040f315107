"""A peak learning rate for each method, chosen before any test row is asked.

Each method trains with seed 0 at every rate while a fifth of the training rows is held out (`--validation`). Its rate
is the one with the least loss of clients' own held-out rows; the table's runs train on all rows at it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from experiments import table1_tables
from fedrouter_jax.config import Config


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
    least = rate * config.local.min_learning_rate / config.local.learning_rate
    return replace(config, local=replace(config.local, learning_rate=rate, min_learning_rate=least))


def chosen(tried: Mapping[str, dict]) -> dict[str, float]:
    """`{"scenario-method": rate}`: of the rates in summaries of what was tried the one of least loss."""
    return {"-".join(kind): min(losses, key=losses.get) for kind, losses in by_rate(tried).items()}


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


def markdown(tried: Mapping[str, dict]) -> list[str]:
    """A section of the table's report: the losses, and which rates were chosen; nothing where none was tried."""
    found = by_rate(tried)
    if not found:
        return []
    rates = sorted({rate for losses in found.values() for rate in losses})
    about = (
        "Loss of clients' own rows, nats a token, where a fifth of the training rows is held out; seed 0. Bold: the "
        "least, whose peak rate is the method's above. Where that is at an end of what was tried, others may be better."
    )
    lines = ["## Learning rates", "", about, "", f"| | {' | '.join(map(plain, rates))} |"]
    lines.append("|---" * (len(rates) + 1) + "|")
    for (scenario, method), losses in found.items():
        least = min(losses.values())
        shown = {rate: table1_tables.text([loss], loss == least) for rate, loss in losses.items()}
        lines.append(f"| {method}, {scenario} | {' | '.join(shown.get(rate, '') for rate in rates)} |")
    return [*lines, ""]
