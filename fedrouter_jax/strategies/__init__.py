"""One algorithm a file. `STRATEGIES` names those the command line offers."""

from fedrouter_jax.strategies.centralised import centralised
from fedrouter_jax.strategies.clustered import clustered
from fedrouter_jax.strategies.collaboration import fedrouter_a, fedrouter_soft, fedrouter_sum, fedrouter_warm
from fedrouter_jax.strategies.fedalt import fedalt
from fedrouter_jax.strategies.feddpa import feddpa_f, feddpa_t
from fedrouter_jax.strategies.fedex import fedex
from fedrouter_jax.strategies.fedit import fedit
from fedrouter_jax.strategies.fedlease import fedlease
from fedrouter_jax.strategies.fedrouter import fedrouter
from fedrouter_jax.strategies.fedsa import fedsa
from fedrouter_jax.strategies.ffalora import ffalora
from fedrouter_jax.strategies.flora import flora
from fedrouter_jax.strategies.ifca import ifca
from fedrouter_jax.strategies.local import local
from fedrouter_jax.strategies.oracle import oracle

STRATEGIES = {
    "fedrouter": fedrouter,
    "fedit": fedit,
    "local": local,
    "fedsa": fedsa,
    "feddpa-t": feddpa_t,
    "feddpa-f": feddpa_f,
    "clustered": clustered,
    "ffalora": ffalora,
    "fedex": fedex,
    "flora": flora,
    "ifca": ifca,
    "fedalt": fedalt,
    "fedlease": fedlease,
    "fedrouter-warm": fedrouter_warm,
    "fedrouter-a": fedrouter_a,
    "fedrouter-sum": fedrouter_sum,
    "fedrouter-soft": fedrouter_soft,
    "oracle": oracle,
    "centralised": centralised,
}

__all__ = ["STRATEGIES", *(name.replace("-", "_") for name in STRATEGIES)]
