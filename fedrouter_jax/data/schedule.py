"""What each round trains: its lanes and their batches, as pure functions of (seed, round, client, cluster).

Nothing is remembered between rounds, so a resumed run, a run with other lanes at once, and a run on other devices all
draw the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from fedrouter_jax.data import packing
from fedrouter_jax.data.tokens import Tokens
from fedrouter_jax.types import Server, Work

Weighting = Literal["cluster", "client", "uniform"]
Turns = Literal["own", "staggered"]


@dataclass(frozen=True)
class RoundConfig:
    """Which lanes take part in a round, and with what weight."""

    rounds: int = 25
    """Federated rounds T."""
    participation: float = 1.0
    """Share of the clients that take part in a round, drawn anew each round (at least one)."""
    clusters_per_round: int = 1
    """Local clusters a client trains in a round, in turn; 0: all of them (n_l times the compute and upload)."""
    turns: Turns = "own"
    """The order of a client's turns: that of its own clustering, or one from the server that spreads the clients over
    the global clusters in every round (staggered)."""
    weighting: Weighting = "cluster"
    """An adapter's weight in averages: rows of its local cluster, rows of its client (as released), or 1."""
    server: Server = "average"
    """What the server does with averages: takes them (FedAvg), or FedAvgM, or FedAdagrad, FedAdam, FedYogi
    (arXiv 2003.00295)."""
    server_rate: float = 1.0
    """Learning rate of the server's optimiser; all but FedAvgM want about 1e-2."""


def taking_part(clients: int, participation: float) -> int:
    """How many clients take part in a round."""
    return max(1, int(participation * clients + 0.5))


def drawn(clients: int, round: int, participation: float, seed: int) -> np.ndarray:
    """The clients that take part in round `round` (1..T), in order."""
    rng = np.random.default_rng([seed, round, 0xC11E])
    return np.sort(rng.choice(clients, taking_part(clients, participation), replace=False))


def lanes(sizes: np.ndarray, round: int, config: RoundConfig, seed: int) -> Work:
    """The lanes of round `round` (1..T); `sizes` int [client, cluster] counts rows.

    Shapes depend on `config` and the shape of `sizes` alone. A client with fewer filled clusters than it should train
    gets lanes of weight 0, as does one without rows. The clusters of a client take turns, empty ones skipped: with one
    a round, number (round - 1) mod n_l.
    """
    clients, clusters = sizes.shape
    each = min(config.clusters_per_round or clusters, clusters)
    client, cluster, weight = [], [], []
    for who in drawn(clients, round, config.participation, seed):
        filled = np.flatnonzero(sizes[who])
        for turn in range(each):
            which = int(filled[((round - 1) * each + turn) % len(filled)]) if len(filled) else 0
            rows = {"cluster": sizes[who, which], "client": sizes[who].sum(), "uniform": 1}[config.weighting]
            client.append(who)
            cluster.append(which)
            weight.append(rows if turn < len(filled) else 0)
    return Work(np.array(client, np.int32), np.array(cluster, np.int32), np.array(weight, np.float32))


def never_trained(sizes: np.ndarray, config: RoundConfig, seed: int) -> list[tuple[int, int]]:
    """The (client, cluster) pairs with rows that no round reaches, as when T < n_l."""
    plans = (lanes(sizes, t, config, seed) for t in range(1, config.rounds + 1))
    reached = {pair for work in plans for pair in zip(work.client.tolist(), work.cluster.tolist(), strict=True)}
    return sorted(set(zip(*(axis.tolist() for axis in np.nonzero(sizes)), strict=True)) - reached)


def draw(rows: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` row indices: shuffled passes over all rows, so that none comes twice before every other came once."""
    passes = -(-count // rows)
    return np.concatenate([rng.permutation(rows) for _ in range(passes)])[:count]


def rows_of_steps(rows: Sequence[Tokens], steps: int, size: int, seeds: Sequence[int]) -> list[list[Tokens]]:
    """The `size` rows of each step of a lane; `seeds` are the run's seed, round, client and local cluster."""
    order = draw(len(rows), steps * size, np.random.default_rng(seeds))
    return [[rows[i] for i in order[step * size :][:size]] for step in range(steps)]


def groups_of(lanes: int, together: int, rows_of_devices: int = 1) -> tuple[int, int]:
    """How many groups of how many lanes: as many on each row of devices, of `together` lanes at most, and even.

    `federation.make_round` counts the same way.
    """
    groups = -(-lanes // (together * rows_of_devices)) * rows_of_devices
    return groups, -(-lanes // groups)


def batches(
    work: Work,
    members: Sequence[Sequence[Sequence[Tokens]]],
    round: int,
    steps: int,
    size: int,
    time: int,
    predicted: int,
    seed: int,
    together: int = 1,
    rows_of_devices: int = 1,
) -> packing.Batch:
    """The rows of a round, leaves `[group, step, pack, ...]` (numpy). `members[client][cluster]` are encoded rows.

    A step takes `size` rows of each lane; packs hold `time` tokens and `predicted` response tokens. At most `together`
    lanes, in order, are a group and share its packs; there are as many groups on each of `rows_of_devices`. A lane of
    weight 0 gets no rows, and a group that only fills up has none.
    """
    none: list[list[Tokens]] = [[]] * steps
    drawn = [
        rows_of_steps(members[client][cluster], steps, size, [seed, round, client, cluster]) if weight > 0 else none
        for client, cluster, weight in zip(work.client, work.cluster, work.weight, strict=True)
    ]
    groups, each = groups_of(len(drawn), together, rows_of_devices)

    def group(lanes: list[list[list[Tokens]]]) -> packing.Batch:
        taken = ([lane[step] for lane in lanes] for step in range(steps))
        return stack([packing.batch(rows, each * size, time, predicted) for rows in taken])

    return stack([group(drawn[number * each : (number + 1) * each]) for number in range(groups)])


def stack(trees: Sequence[packing.Batch]) -> packing.Batch:
    """Batches stacked on a new leading axis (numpy)."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
