"""The random key of a seed."""

import jax

from fedrouter_jax.types import Array


def key_of(seed: int) -> Array:
    """The same whatever `JAX_DEFAULT_PRNG_IMPL` says, which is often rbg on TPUs."""
    return jax.random.key(seed, impl="threefry2x32")
