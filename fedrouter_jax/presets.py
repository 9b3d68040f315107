"""Named experiments: functions from nothing to a config. Every field can still be set on the command line."""

from __future__ import annotations

from dataclasses import replace

from fedrouter_jax.client import LocalConfig
from fedrouter_jax.config import Config, DataConfig, EvaluationConfig
from fedrouter_jax.data.scenarios import Scenario
from fedrouter_jax.data.schedule import RoundConfig
from fedrouter_jax.routing import ClusterConfig


def smoke() -> Config:
    """A tiny random model on synthetic rows: seconds, to see that everything works. Its scores mean nothing."""
    return Config(
        model="tiny",
        data=DataConfig(
            clients=4, train_rows=24, test_rows=8, mix_rows=8, template="short", max_length=320, max_response=24
        ),
        rounds=RoundConfig(rounds=3),
        local=LocalConfig(steps=2, batch=4, learning_rate=5e-3),
        evaluation=EvaluationConfig(evaluate_at=(1,)),
    )


def demo() -> Config:
    """SmolLM2-135M on synthetic rows, small enough for two CPU cores: minutes."""
    return Config(
        data=DataConfig(
            clients=4, train_rows=48, test_rows=8, mix_rows=24, template="short", max_length=192, max_response=24
        ),
        rounds=RoundConfig(rounds=6),
        local=LocalConfig(steps=4, batch=2, learning_rate=6e-3, min_learning_rate=6e-4),
        evaluation=EvaluationConfig(evaluate_at=()),
    )


def flan4(scenario: Scenario) -> Config:
    """The paper's budget (FedRouter, arXiv 2604.00050) on rows of its four tasks; give the rows with --data."""
    return Config(data=DataConfig(data="flan4", scenario=scenario))


def flan4_flower(scenario: Scenario) -> Config:
    """`flan4` with the choices of the public code's Flower path: its recipe, weights by all rows of a client."""
    rounds = RoundConfig(weighting="client")
    return replace(flan4(scenario), rounds=rounds, cluster=ClusterConfig(recipe="paper"))


def flan4_plain(scenario: Scenario) -> Config:
    """`flan4` with those of its plain path: every local cluster in every round (n_l times the work), equal weights.

    Not taken over from there: dropout in evaluation, and a learning rate that lags by one round.
    """
    rounds = RoundConfig(weighting="uniform", clusters_per_round=0)
    return replace(flan4(scenario), rounds=rounds, cluster=ClusterConfig(recipe="paper"))


def flan4_cpu(scenario: Scenario) -> Config:
    """`flan4` at a budget for two CPU cores: a quarter of an hour or so."""
    return Config(
        data=DataConfig(
            data="flan4", scenario=scenario, train_rows=80, test_rows=16, mix_rows=48, template="short",
            max_length=320, max_response=48,
        ),
        rounds=RoundConfig(rounds=8),
        local=LocalConfig(steps=4, batch=2, learning_rate=5e-3, min_learning_rate=5e-4),
        evaluation=EvaluationConfig(evaluate_at=()),
    )  # fmt: skip


HELD = {"single": "one task a client", "dual": "two tasks a client", "all": "all tasks on every client"}
PRESETS = {
    "smoke": smoke,
    "demo": demo,
    **{f"flan4-{name}": lambda name=name: flan4(name) for name in HELD},
    **{f"flan4-{name}-flower": lambda name=name: flan4_flower(name) for name in HELD},
    **{f"flan4-{name}-plain": lambda name=name: flan4_plain(name) for name in HELD},
    **{f"flan4-{name}-cpu": lambda name=name: flan4_cpu(name) for name in HELD},
}
ABOUT = {
    "smoke": "a tiny random model on synthetic rows, in seconds",
    "demo": "SmolLM2-135M on synthetic rows, minutes on two cores",
    **{f"flan4-{name}": f"the paper's budget, {held}" for name, held in HELD.items()},
    **{f"flan4-{name}-flower": f"flan4-{name} as the public code's Flower path has it" for name in HELD},
    **{f"flan4-{name}-plain": f"flan4-{name} as the public code's plain path has it" for name in HELD},
    **{f"flan4-{name}-cpu": f"a budget for two CPU cores, {held}" for name, held in HELD.items()},
}
