"""The methods that the experiments compare, by the names of the tables: a strategy, and what it changes in a config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedrouter_jax.config import Config
from fedrouter_jax.strategies import STRATEGIES

SCENARIOS = ("dual", "single", "all")  # in order of worth
BOUNDS = {  # references, not rivals
    "oracle": "told the tasks",
    "oracle+": "told the tasks, turns staggered",
    "centralised": "all rows in one place",
}
OURS = (  # no baselines
    "fedrouter+",
    "fedrouter",
    *(name for name in STRATEGIES if name.startswith("fedrouter-")),
    "fedrouter-released",
)
FIRST = (
    "fedrouter+",
    "fedrouter",
    "fedrouter-warm",
    "fedrouter-a",
    "fedrouter-sum",
    "fedit",
    "fedsa",
    "feddpa-t",
    "local",
    "clustered",
    "oracle",
)
LABELS = ("glue_qqp",)  # tasks answered by yes or no, as many of each: at these budgets hardly better than a coin
HEADLINE = ("fedrouter+", "fedrouter", "fedit", "fedsa", "feddpa-t", "local", "clustered", "oracle")  # in README
# Name: strategy, and what it changes in the sections of the config.
METHODS: dict[str, tuple[str, dict[str, dict]]] = {
    "fedrouter+": ("fedrouter", {"rounds": {"turns": "staggered"}}),
    **{name: (name, {}) for name in STRATEGIES},
    "oracle+": ("oracle", {"rounds": {"turns": "staggered"}}),
    "fedrouter-released": ("fedrouter", {"cluster": {"recipe": "paper"}, "rounds": {"weighting": "client"}}),
    "feddpa-t-released": ("feddpa-t", {"evaluation": {"instance_weight": "global"}}),
    "fedprox": ("fedit", {"local": {"proximal": 0.1}}),
    "fedavgm": ("fedit", {"rounds": {"server": "momentum"}}),
    "fedadagrad": ("fedit", {"rounds": {"server": "adagrad", "server_rate": 1e-2}}),
    "fedadam": ("fedit", {"rounds": {"server": "adam", "server_rate": 1e-2}}),
    "fedyogi": ("fedit", {"rounds": {"server": "yogi", "server_rate": 1e-2}}),
}


def own(method: str) -> bool:
    """Whether it is somebody's own, MODULE:FUNCTION."""
    return ":" in method


def ordered(names: Iterable[str]) -> list[str]:
    """The methods among names in the tables' order, those of somebody's own last."""
    names = set(names)
    return [*(method for method in METHODS if method in names), *sorted(filter(own, names))]


def variant(config: Config, method: str, seed: int) -> Config:
    """The config of a method; of somebody's own with a + behind it clients take turns as in FedRouter+."""
    staggered = METHODS["fedrouter+"][1] if own(method) and method.endswith("+") else {}
    strategy, changes = METHODS.get(method, (method.removesuffix("+"), staggered))
    parts = {section: replace(getattr(config, section), **values) for section, values in changes.items()}
    return replace(config, strategy=strategy, seed=seed, **parts)
