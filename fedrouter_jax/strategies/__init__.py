"""One algorithm a file. `STRATEGIES` names those the command line offers; `find` takes others, too."""

import difflib
import importlib
import inspect
import re
import traceback
from collections.abc import Callable

from fedrouter_jax.errors import UserError, one_line
from fedrouter_jax.strategies.centralised import centralised
from fedrouter_jax.strategies.clustered import clustered
from fedrouter_jax.strategies.collaboration import (
    fedrouter_a,
    fedrouter_b,
    fedrouter_soft,
    fedrouter_sum,
    fedrouter_warm,
)
from fedrouter_jax.strategies.ditto import ditto
from fedrouter_jax.strategies.fedalt import fedalt
from fedrouter_jax.strategies.feddpa import feddpa_f, feddpa_t
from fedrouter_jax.strategies.fedex import fedex
from fedrouter_jax.strategies.fedit import fedit
from fedrouter_jax.strategies.fedlease import fedlease
from fedrouter_jax.strategies.fedrouter import fedrouter
from fedrouter_jax.strategies.fedsa import fedsa
from fedrouter_jax.strategies.ffalora import ffalora
from fedrouter_jax.strategies.flexlora import flexlora
from fedrouter_jax.strategies.flora import flora
from fedrouter_jax.strategies.ifca import ifca
from fedrouter_jax.strategies.local import local
from fedrouter_jax.strategies.oracle import oracle
from fedrouter_jax.strategies.rolora import rolora
from fedrouter_jax.strategies.scaffold import scaffold
from fedrouter_jax.types import Strategy

STRATEGIES = {
    "fedrouter": fedrouter,
    "fedit": fedit,
    "local": local,
    "fedsa": fedsa,
    "scaffold": scaffold,
    "ditto": ditto,
    "feddpa-t": feddpa_t,
    "feddpa-f": feddpa_f,
    "clustered": clustered,
    "ffalora": ffalora,
    "rolora": rolora,
    "fedex": fedex,
    "flexlora": flexlora,
    "flora": flora,
    "ifca": ifca,
    "fedalt": fedalt,
    "fedlease": fedlease,
    "fedrouter-warm": fedrouter_warm,
    "fedrouter-a": fedrouter_a,
    "fedrouter-b": fedrouter_b,
    "fedrouter-sum": fedrouter_sum,
    "fedrouter-soft": fedrouter_soft,
    "oracle": oracle,
    "centralised": centralised,
}

ALSO_CALLED = {  # what others, or the tables, call a method and its options
    "fedavg": "fedit",
    "fedprox": "fedit --proximal 0.1",
    "fedavgm": "fedit --server momentum",
    **{f"fed{server}": f"fedit --server {server} --server-rate 0.01" for server in ("adagrad", "adam", "yogi")},
    **{f"{name}+": f"{name} --turns staggered" for name in STRATEGIES if re.match("fedrouter|oracle", name)},
}

__all__ = ["STRATEGIES", "find", *(name.replace("-", "_") for name in STRATEGIES)]


def find(name: str) -> Callable[..., Strategy]:
    """What makes the strategy of that name: one of `STRATEGIES`, or MODULE:FUNCTION that can be imported.

    The latter is called with `config`, which it hands on to a function that takes one. Raises `UserError` for a name
    that is neither, and where that function fails.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    module, colon, function = name.partition(":")
    if not colon:
        known = ", ".join(STRATEGIES)
        raise UserError(f"--strategy {name!r} is unknown{meant(name)}; choose among {known}, or give MODULE:FUNCTION")
    try:
        make = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # somebody's code: it may raise anything
        raise UserError(
            f"--strategy {name}: not to be imported ({_told(error)}); `python -m fedrouter_jax` looks here, too"
        ) from error
    if not callable(make):
        raise UserError(f"--strategy {name} is a {type(make).__name__}; expected a function that gives a Strategy")

    def made(config) -> Strategy:
        try:
            strategy = make(config=config) if "config" in inspect.signature(make).parameters else make()
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(
                f"--strategy {name} could not be called, with config if it takes one ({_told(error)}); mend it there"
            ) from error
        if not isinstance(strategy, Strategy):
            raise UserError(
                f"--strategy {name} gives a {type(strategy).__name__}; expected a fedrouter_jax.types.Strategy"
            )
        return strategy

    return made


def meant(name: str) -> str:
    """What a name that no strategy has may mean, to be put behind it; empty where nothing is like it."""
    low = name.lower()
    if low in ALSO_CALLED:
        return f"; {low} is --strategy {ALSO_CALLED[low]}"
    bare = {re.sub(r"\W", "", known): known for known in STRATEGIES}
    asked = re.sub(r"[\W_]", "", low)
    near = [key for key in (asked, asked.removesuffix("lora")) if key in bare][:1]
    near = near or difflib.get_close_matches(asked, bare, 2)
    return f"; there is {' and '.join(bare[key] for key in near)}" if near else ""


def _told(error: BaseException) -> str:
    """An error and where it was raised, in a line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {one_line(error)}, {place.filename}:{place.lineno}"
