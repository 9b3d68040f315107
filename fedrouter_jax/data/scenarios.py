"""Who holds what: rows dealt as in the paper's Single, Dual and All scenarios, by random mixtures, or as they come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from fedrouter_jax.data.rows import Dataset, Row
from fedrouter_jax.errors import UserError

Scenario = Literal["single", "dual", "all", "dirichlet", "natural"]


@dataclass(frozen=True)
class DataConfig:
    """Rows, and who holds them."""

    data: str = "synthetic"
    """Embedded "synthetic" data, a directory with train and test files, one file (JSONL, JSON, CSV, Parquet), or a
    Hugging Face dataset id OWNER/NAME (OWNER/NAME:CONFIGURATION where it has several)."""
    columns: tuple[str, ...] = ()
    """Column names of the data, as instruction=NAME output=NAME task=NAME client=NAME input=NAME; what is left out
    keeps its name. An input (Alpaca's, Dolly's context) follows its instruction after an empty line."""
    scenario: Scenario = "dual"
    """Each client holds one task (single), two neighbouring ones (dual), all, a random mixture (dirichlet), or the rows
    whose `client` column names it (natural: the first --clients of them)."""
    mixture_alpha: float = 0.5
    """Dirichlet only: small, and a client holds little but one task; large, and all hold the same mixture."""
    unseen: tuple[str, ...] = ()
    """Tasks that no client holds: only the mix asks for them."""
    newcomers: int = 0
    """Clients, the last ones, that join when training is over; their scores are told apart."""
    shift: int = 0
    """A client is tested on what the client so many places further on holds; 0: on what it holds itself. Such texts
    want --personalised-routing global: a client's own clusters are of other tasks."""
    clients: int = 8
    """Number of clients."""
    train_rows: int = 600
    """Training rows a client, at most."""
    test_rows: int = 300
    """Test rows a client, at most (personalised evaluation)."""
    mix_rows: int = 300
    """Test rows of the mix of all tasks, at most (generalisation)."""
    balanced: bool = False
    """Test rows of a task that is answered by labels: as many of each label. One answer to all then scores the same
    whichever it is. (In dirichlet and natural those of the mix alone.)"""
    validation: bool = False
    """Ask held-out training rows, a fifth of each task's, and leave the test rows alone: to choose a rate, say."""
    template: str = "alpaca"
    """Prompt template: alpaca; short, which saves 25 tokens a row; chat, the model's own (with one day in July 2024
    where it tells the date); or a text that holds {instruction} once."""
    max_length: int = 1024
    """Longest row in tokens, prompt and response; a longer instruction loses its end, never its answer."""
    max_response: int = 128
    """Longest response in tokens, EOS included; also the longest generated answer."""

    @property
    def founders(self) -> int:
        """How many clients train: the first ones, all but the newcomers."""
        return self.clients - self.newcomers


LABELS = 8  # a task with no more different answers than this is answered by labels


class Client(NamedTuple):
    """Row indices of one client into `Dataset.train` and `Dataset.test`."""

    train: list[int]
    test: list[int]


class Partition(NamedTuple):
    """The clients, and the test rows of the mix of all tasks (generalisation)."""

    clients: list[Client]
    mix: list[int]
    tasks: list[str]  # those that clients hold
    founding: int  # how many of them the clients hold that are there from the start


def tasks_of(client: int, tasks: Sequence[str], scenario: Scenario) -> list[str]:
    """The tasks a client holds: one, two neighbours, or all (FedRouter, arXiv 2604.00050, section 5)."""
    held = {"single": 1, "dual": min(2, len(tasks))}.get(scenario, len(tasks))
    return [tasks[(client + i) % len(tasks)] for i in range(held)]


def deal(
    rows: Sequence[Row], holders: dict[str, list[int]], cap: int, clients: int, rng, balanced: bool = False
) -> list[list[int]]:
    """Deal each task's shuffled rows round robin to its holders; a client takes at most `cap` rows in equal shares.

    `balanced`: the rows of a task that is answered by labels label by label, as many of each, where a share holds one.
    """
    hands: list[list[int]] = [[] for _ in range(clients)]
    held = Counter(client for of in holders.values() for client in of)
    for task, clients_of in holders.items():
        indices = [i for i, row in enumerate(rows) if row.task == task]
        found = sorted({rows[i].output for i in indices})
        most = min(LABELS, *(cap // held[client] for client in clients_of))
        labels = [{label} for label in found] if balanced and len(found) <= most else [set(found)]
        piles = [rng.permutation([i for i in indices if rows[i].output in label]) for label in labels]
        least = min(map(len, piles), default=0)
        for seat, client in enumerate(clients_of):
            share = cap // held[client] // max(1, len(piles))
            hands[client].extend(int(i) for pile in piles for i in pile[:least][seat :: len(clients_of)][:share])
    return [sorted(hand) for hand in hands]


def deal_shares(rows: Sequence[Row], tasks: Sequence[str], shares: np.ndarray, cap: int, rng) -> list[list[int]]:
    """Deal each client `cap` shuffled rows by its `shares` [client, task]; fewer for all where a task runs out."""
    hands: list[list[int]] = [[] for _ in shares]
    exact = shares * cap
    counts = exact.astype(int)
    order = np.argsort(np.argsort(counts - exact, axis=1, kind="stable"), axis=1)
    counts += order < cap - counts.sum(axis=1, keepdims=True)  # the largest remainders are rounded up
    for number, task in enumerate(tasks):
        indices = rng.permutation([i for i, row in enumerate(rows) if row.task == task])
        wanted = counts[:, number]
        if wanted.sum() > len(indices):
            wanted = wanted * len(indices) // wanted.sum()
        for hand, mine in zip(hands, np.split(indices, np.cumsum(wanted))[:-1], strict=True):
            hand.extend(int(i) for i in mine)
    return [sorted(hand) for hand in hands]


def clients_named(dataset: Dataset, count: int) -> list[str]:
    """The first `count` clients that training rows name, in the order of their first row.

    Raises `UserError` if there are fewer, or rows that name none.
    """
    names = list(dict.fromkeys(row.client for row in dataset.train))
    if "" in names:
        lacking = "they name none" if names == [""] else "some rows name none"
        raise UserError(
            f"scenario 'natural' takes clients from the rows of {dataset.name}, but {lacking}; map their column with "
            "--columns client=NAME, or deal rows by another --scenario"
        )
    if len(names) < count:
        raise UserError(f"--clients is {count}, but the training rows of {dataset.name} name {len(names)}; lower it")
    return names[:count]


def own_rows(rows: Sequence[Row], names: Sequence[str], tasks: Sequence[str], cap: int, rng) -> list[list[int]]:
    """The rows of these tasks that name each client; where they are more than `cap`, so many by chance."""
    own: dict[str, list[int]] = {name: [] for name in names}
    for i, row in enumerate(rows):
        if row.client in own and row.task in tasks:
            own[row.client].append(i)
    return [sorted(int(i) for i in rng.permutation(own[name])[:cap]) for name in names]


def partition(dataset: Dataset, config: DataConfig, seed: int) -> Partition:
    """Split a dataset over clients without overlap.

    `train_rows` and `test_rows` cap a client's rows, `mix_rows` the test rows of the mix; tasks share a cap equally, in
    a Dirichlet mixture (Hsu et al., arXiv 1909.06335) by chance. Test rows are dealt like train rows (personalised
    evaluation). Tasks keep the order of their first appearance. Raises `UserError` when rows carry no task but the
    scenario needs them, or a client would be left without rows.
    """
    found = list(dict.fromkeys(row.task for row in dataset.train))
    tasks = [task for task in found if task not in config.unseen]
    _check(dataset, config, found, tasks)
    rng = np.random.default_rng([seed, 0x5CE7])
    train, test = _dealt(dataset, config, tasks, seed, rng)
    mix = deal(dataset.test, {task: [0] for task in found}, config.mix_rows, 1, rng, config.balanced)[0]
    if config.shift:
        test = _shifted(config, tasks, test)
    founding, held = (
        {dataset.train[i].task for hand in hands for i in hand} for hands in (train[: config.founders], train)
    )
    clients = [Client(own, asked) for own, asked in zip(train, test, strict=True)]
    return Partition(clients, mix, [task for task in tasks if task in held], len(founding))


def _check(dataset: Dataset, config: DataConfig, found: Sequence[str], tasks: Sequence[str]) -> None:
    """Raise `UserError` for rows that no scenario can deal; `tasks` are those `found` that clients may hold."""
    clients = config.clients
    unknown = sorted(set(config.unseen) - set(found))
    if unknown:
        raise UserError(f"--unseen names {unknown[0]!r}, which is no task of {dataset.name}; its tasks: {found}")
    if "" in found and len(found) > 1:
        bare = sum(row.task == "" for row in dataset.train)
        raise UserError(
            f"{dataset.name}: {bare} of {len(dataset.train)} training rows have no task; give all rows one, or none"
        )
    for split, rows in (("training", dataset.train), ("test", dataset.test)):
        if clients > len(rows):
            raise UserError(f"--clients is {clients}, but {dataset.name} has {len(rows)} {split} rows; lower it")
    if not tasks:
        raise UserError(f"--unseen names all tasks of {dataset.name}; leave at least one to train")
    if config.scenario in ("single", "dual") and len(tasks) < 2 <= len(found):
        raise UserError(
            f"scenario {config.scenario!r} deals tasks to clients, but --unseen leaves only {tasks[0]!r} of "
            f"{dataset.name}; name fewer, or use --scenario all"
        )
    if config.scenario in ("single", "dual") and len(tasks) < 2:
        raise UserError(
            f"scenario {config.scenario!r} deals tasks to clients, but the rows of {dataset.name} have "
            f"{'no task' if tasks == [''] else 'one task only'}; map the task column with --columns task=NAME or use "
            "--scenario all"
        )
    strange = sorted({row.task for row in dataset.test} - set(found))
    if strange:
        raise UserError(
            f"{dataset.name}: test rows of task {strange[0]!r}, which no training row has; label both alike"
        )
    if config.mix_rows < len(found):
        raise UserError(
            f"--mix-rows is {config.mix_rows}, but the mix is of {len(found)} tasks; give one row of each at least"
        )


def _dealt(dataset: Dataset, config: DataConfig, tasks: Sequence[str], seed: int, rng) -> tuple[list, list]:
    """The training and test rows of each client; raises `UserError` where one would be left without."""
    clients, names = config.clients, None
    if config.scenario == "dirichlet":
        shares = np.random.default_rng([seed, 0xD1]).dirichlet([config.mixture_alpha] * len(tasks), clients)
        train = deal_shares(dataset.train, tasks, shares, config.train_rows, rng)
        test = deal_shares(dataset.test, tasks, shares, config.test_rows, rng)
    elif config.scenario == "natural":
        names = clients_named(dataset, clients)
        train = own_rows(dataset.train, names, tasks, config.train_rows, rng)
        test = own_rows(dataset.test, names, tasks, config.test_rows, rng)
    else:
        holders = _holders(config, tasks)
        train = deal(dataset.train, holders, config.train_rows, clients, rng)
        test = deal(dataset.test, holders, config.test_rows, clients, rng, config.balanced)
    for split, hands in (("training", train), ("test", test)):
        empty = next((client for client, hand in enumerate(hands) if not hand), None)
        if empty is not None and names is not None:
            raise UserError(
                f"client {names[empty]!r} has no {split} row in {dataset.name}; give it some, or leave its rows out"
            )
        if empty is not None:
            raise UserError(
                f"client {empty} gets no {split} row: {dataset.name} has too few rows for {clients} clients; "
                f"lower --clients or bring more rows{' (of each label, or leave out --balanced)' * config.balanced}"
            )
    return train, test


def _holders(config: DataConfig, tasks: Sequence[str]) -> dict[str, list[int]]:
    """The clients that hold each task; raises `UserError` for too low caps, or a task that nobody trains."""
    clients, founders = config.clients, config.founders
    held = [tasks_of(client, tasks, config.scenario) for client in range(clients)]
    for flag, cap in (("--train-rows", config.train_rows), ("--test-rows", config.test_rows)):
        if cap < len(held[0]):
            raise UserError(f"{flag} is {cap}, but a client holds {len(held[0])} tasks; give one row of each at least")
    holders = {task: [c for c in range(clients) if task in held[c]] for task in tasks}
    orphan = next((task for task, of in holders.items() if not any(client < founders for client in of)), None)
    if orphan is not None:
        enough = len(tasks) + 1 - len(held[0]) + config.newcomers
        raise UserError(
            f"{founders} clients that train leave task {orphan!r} without one in scenario {config.scenario!r}; "
            f"raise --clients to at least {enough}"
        )
    return holders


def _shifted(config: DataConfig, tasks: Sequence[str], test: list[list[int]]) -> list[list[int]]:
    """The test rows of clients further on; raises `UserError` where all hold just the tasks they are then asked."""
    turn = [(client + config.shift) % config.clients for client in range(config.clients)]
    held = [set(tasks_of(client, tasks, config.scenario)) for client in range(config.clients)]
    dealt = config.scenario in ("single", "dual", "all")
    if dealt and all(held[client] == held[other] for client, other in enumerate(turn)):
        raise UserError(
            f"--shift is {config.shift}, but in scenario {config.scenario!r} with {config.clients} clients that tests "
            "all of them on the tasks they hold themselves; choose another"
        )
    return [test[other] for other in turn]
