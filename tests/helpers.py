"""Constants and functions that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from fedrouter_jax import client, lora
from fedrouter_jax.data import schedule
from fedrouter_jax.routing import Enrolment
from fedrouter_jax.types import Adapters

SHARED = Path(__file__).resolve().parents[2] / "shared"  # real rows, where a checkout has them beside it

LORA = lora.LoRAConfig(rank=4, alpha=8.0, dropout=0.1)
LOCAL = client.LocalConfig(steps=2, batch=3, learning_rate=1e-2)
CLIENTS, CLUSTERS, SLOTS = 4, 2, 3


class Federation(NamedTuple):
    """A small federation: clients with rows in two local clusters each, and three global clusters."""

    model: object
    update: object
    enrolment: Enrolment
    adapters: Adapters
    members: list


def inputs(federation: Federation, t: int, clusters_per_round: int = 1, participation: float = 1.0, together: int = 1):
    """The work and batches of round t."""
    sizes = np.array([[len(rows) for rows in held] for held in federation.members])
    config = schedule.RoundConfig(clusters_per_round=clusters_per_round, participation=participation)
    work = schedule.lanes(sizes, t, config, 0)
    return work, schedule.batches(work, federation.members, t, LOCAL.steps, LOCAL.batch, 320, 96, 0, together)


def assert_close(one, other, tolerance: float = 1e-5) -> None:
    """Two pytrees of equal structure and nearly equal leaves."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)
