"""The machine's limit, measured: the rate of a large product of matrices."""

from __future__ import annotations

import time as clock
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def matrix_rows() -> int:
    """Rows of square matrices whose product takes milliseconds."""
    return 2048 if jax.default_backend() == "cpu" else 8192


def matrix_rate(dtype: str = "float32") -> float:
    """FLOP/s of a large product of that type with float32 sums, as our training makes them."""
    product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    a = jax.random.normal(jax.random.key(0), (matrix_rows(), matrix_rows())).astype(dtype)  # on a GPU ones are faster
    return best_rate(lambda: product(a, a).block_until_ready())


def best_rate(product: Callable[[], Any], times: int = 5, rows: int | None = None) -> float:
    """FLOP/s of a product of square matrices of `rows` (`matrix_rows()`); the best after one that compiles."""
    product()
    best = np.inf
    for _ in range(times):
        before = clock.perf_counter()
        product()
        best = min(best, clock.perf_counter() - before)
    return 2 * (rows or matrix_rows()) ** 3 / best
