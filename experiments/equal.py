"""What a table may compare: runs of equal rows and budgets, each method at one learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from fedrouter_jax.config import Config
from fedrouter_jax.errors import UserError


def check_budgets(configs: Mapping[str, Config]) -> None:
    """Raise `UserError` where runs of one table differ in model, precision, adapters, rows or steps."""

    def budget(config: Config) -> dict:
        data, local = asdict(replace(config.data, scenario="dual")), config.local
        steps = {"rounds": config.rounds.rounds, "steps": local.steps, "batch": local.batch}
        model = {"model": config.model, "dtype": config.dtype, "quantise": config.quantise}
        return {**model, **asdict(config.lora), **data, **steps}

    _check_equal({name: ("", budget(config)) for name, config in configs.items()}, "equal rows and budgets")


def check_rates(configs: Mapping[str, Config]) -> None:
    """Raise `UserError` where runs of one method and scenario differ in the peak learning rate."""
    rates = {name: {"learning_rate": config.local.learning_rate} for name, config in configs.items()}
    _check_equal({name: (name.rpartition("-")[0], rate) for name, rate in rates.items()}, "each method at one rate")


def _check_equal(runs: Mapping[str, tuple[str, dict]], what: str) -> None:
    """Raise `UserError` where two of `{name: (kind, choices)}` of one kind differ in a choice."""
    firsts: dict[str, str] = {}
    for name, (kind, found) in runs.items():
        first = firsts.setdefault(kind, name)
        for key, expected in runs[first][1].items():
            if found[key] != expected:
                raise UserError(
                    f"a table compares {what}, but {key} is {expected!r} in {first} and {found[key]!r} in {name}; give "
                    "each a folder of its own (--out)"
                )
