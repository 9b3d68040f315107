"""Who holds what: rows dealt to clients as in the paper's Single, Dual and All scenarios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from fedrouter_jax.data.rows import Dataset, Row
from fedrouter_jax.errors import UserError

Scenario = Literal["single", "dual", "all"]


class Client(NamedTuple):
    """Row indices of one client into `Dataset.train` and `Dataset.test`."""

    train: list[int]
    test: list[int]


class Partition(NamedTuple):
    """The clients, and the test rows of the mix of all tasks (generalisation)."""

    clients: list[Client]
    mix: list[int]
    tasks: list[str]


def tasks_of(client: int, tasks: Sequence[str], scenario: Scenario) -> list[str]:
    """The tasks a client holds: one, two neighbours, or all (FedRouter, arXiv 2604.00050, section 5)."""
    held = {"single": 1, "dual": min(2, len(tasks)), "all": len(tasks)}[scenario]
    return [tasks[(client + i) % len(tasks)] for i in range(held)]


def deal(rows: Sequence[Row], holders: dict[str, list[int]], cap: int, clients: int, rng) -> list[list[int]]:
    """Deal each task's shuffled rows round robin to its holders; a client takes at most `cap` rows in equal shares."""
    hands: list[list[int]] = [[] for _ in range(clients)]
    held = {client: sum(client in of for of in holders.values()) for client in range(clients)}
    for task, clients_of in holders.items():
        indices = rng.permutation([i for i, row in enumerate(rows) if row.task == task])
        for seat, client in enumerate(clients_of):
            hands[client].extend(int(i) for i in indices[seat :: len(clients_of)][: max(1, cap // held[client])])
    return [sorted(hand) for hand in hands]


def partition(
    dataset: Dataset, scenario: Scenario, clients: int, train_rows: int, test_rows: int, mix_rows: int, seed: int
) -> Partition:
    """Split a dataset over clients without overlap.

    `train_rows` and `test_rows` cap a client's rows, `mix_rows` the test rows of the mix; tasks share a cap equally.
    Test rows are dealt like train rows (personalised evaluation). Tasks keep the order of their first appearance.
    Raises `UserError` when rows carry no task but the scenario needs them, or a client would be left without rows.
    """
    tasks = list(dict.fromkeys(row.task for row in dataset.train))
    if scenario != "all" and len(tasks) < 2:
        raise UserError(
            f"scenario {scenario!r} deals tasks to clients, but {dataset.name} has {len(tasks)} task "
            "label; map the task column with --columns task=NAME or use --scenario all"
        )
    unseen = sorted({row.task for row in dataset.test} - set(tasks))
    if unseen:
        raise UserError(f"{dataset.name}: test rows of task {unseen[0]!r}, which no training row has; label both alike")
    rng = np.random.default_rng([seed, 0x5CE7])
    held = [tasks_of(client, tasks, scenario) for client in range(clients)]
    holders = {task: [c for c in range(clients) if task in held[c]] for task in tasks}
    orphan = next((task for task, of in holders.items() if not of), None)
    if orphan is not None:
        raise UserError(
            f"{clients} clients leave task {orphan!r} without a client in scenario {scenario!r}; "
            f"raise --clients to at least {len(tasks)}"
        )
    train = deal(dataset.train, holders, train_rows, clients, rng)
    test = deal(dataset.test, holders, test_rows, clients, rng)
    for split, hands in (("training", train), ("test", test)):
        empty = next((client for client, hand in enumerate(hands) if not hand), None)
        if empty is not None:
            raise UserError(
                f"client {empty} gets no {split} row: {dataset.name} has too few rows for {clients} clients; "
                "lower --clients or bring more rows"
            )
    mix = deal(dataset.test, {task: [0] for task in tasks}, mix_rows, 1, rng)[0]
    return Partition([Client(a, b) for a, b in zip(train, test, strict=True)], mix, tasks)
