"""One algorithm a file. `STRATEGIES` names those the command line offers."""

from fedrouter_jax.strategies.fedit import fedit
from fedrouter_jax.strategies.fedrouter import fedrouter
from fedrouter_jax.strategies.local import local

STRATEGIES = {"fedrouter": fedrouter, "fedit": fedit, "local": local}

__all__ = ["STRATEGIES", "fedit", "fedrouter", "local"]
