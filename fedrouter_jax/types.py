"""The vocabulary of the project: named tuples and aliases.

Shapes are written `[axis, axis]`. The axes that recur: `layer` (decoder blocks), `slot` (adapters in the bank),
`lane` (units of local work in a round), `rank` (LoRA ranks, concatenated over adapters where several are composed),
`width` (the model's hidden size).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

Array = jax.Array
PyTree = Any
Owner = Literal["fixed", "shared", "copied", "cluster", "public", "client"]
Server = Literal["average", "momentum", "adagrad", "adam", "yogi"]  # what the server does with averages
Enrolling = Literal["nothing", "random", "clustering", "tasks"]  # how a client's rows become local clusters


class Ownership(NamedTuple):
    """What an owner of adapter leaves says of them."""

    slot_per: Literal["federation", "cluster", "client"]
    trained: bool  # lanes write it; a "copied" leaf is written by `derive` alone
    sent: bool


# From the coarsest to the finest.
OWNERSHIP: dict[Owner, Ownership] = {
    "fixed": Ownership("federation", trained=False, sent=False),
    "shared": Ownership("federation", trained=True, sent=True),
    "copied": Ownership("cluster", trained=False, sent=False),
    "cluster": Ownership("cluster", trained=True, sent=True),
    "public": Ownership("client", trained=True, sent=True),
    "client": Ownership("client", trained=True, sent=False),
}


class LoRA(NamedTuple):
    """One low-rank adapter, or a stack of them with extra leading axes (Hu et al., ICLR 2022, arXiv 2106.09685).

    A module computes `x W + ((x a) * gates) b`, where the gate of a rank carries `alpha / r`. Adapters with a `gate` of
    their own compete for every token, each with a score `x gate` a seat. Among the adapters that are open (whose gates
    are not zero) as many of the highest scores count as there are such adapters; the gates are multiplied by an
    adapter's part of their softmax. Where an adapter has several seats, one whose weights are all zero is none.
    """

    a: dict[str, Array]  # {module: [layer, in, rank]}
    b: dict[str, Array]  # {module: [layer, rank, out]}
    gate: dict[str, Array] = {}  # {module: [layer, in, seat]}, concatenated [layer, in, slot, seat]; mostly empty


Adapters = dict[str, LoRA]  # the named adapters of one lane, or the bank (each leaf with a leading slot axis)


class Work(NamedTuple):
    """The lanes of one round."""

    client: Array  # int32 [lane]
    cluster: Array  # int32 [lane]: the client's local cluster
    weight: Array  # float32 [lane] >= 0: what it counts in averages (rows, or 1), not normalised


class FederationState(NamedTuple):
    """Everything the server carries from round to round. Structure, shapes and dtypes never change."""

    round: Array  # int32 []: rounds done
    bank: Adapters  # leaves [slot, ...]
    table: Array  # int32 [client, cluster]: the slot of each local cluster, -1 where a client has no such cluster
    memory: PyTree  # what else a strategy keeps, such as the router
    server: PyTree = ()  # states of the server's optimiser, if it has one


class RoundInfo(NamedTuple):
    """What a round reports: numbers per lane and step, never parameters."""

    loss: Array  # float32 [lane, step]
    learning_rate: Array  # float32 []
    rejected: Array  # bool [lane]: the lane's result was not finite and moved nothing


class Phase(NamedTuple):
    """One part of a lane's local work. All numbers may be traced: they may depend on the round."""

    train: PyTree  # prefix tree of the adapters: True, False, or an array that broadcasts to a leaf: which entries move
    weights: dict[str, Any]  # of each named adapter in the forward pass; one that is not named has no part in it


# Trains a group of lanes whose rows share packs; a group may be one lane: (base params, adapters [lane, ...], batch of
# the group, learning rate, keys [lane], phases) -> (adapters, loss float32 [lane, step]: mean cross-entropy over the
# step's response tokens, before the update)
ClientUpdate = Callable[[PyTree, Adapters, Any, Array, Array, tuple[Phase, ...]], tuple[Adapters, Array]]

# The same without training: (base params, adapters [lane, ...], batch of the group) -> loss [lane] of its whole round
ClientLoss = Callable[[PyTree, Adapters, Any], Array]


def one_phase(round: Array, rounds: int) -> tuple[Phase, ...]:
    """All local work goes into the one adapter there is."""
    return (Phase(train={"main": True}, weights={"main": 1.0}),)


class View(NamedTuple):
    """What a router may look at to weigh the adapters for some texts, each asked of one client."""

    embeddings: Array | None = None  # float32 [row, width]: by the frozen base model, where texts were embedded
    task_slots: Array | None = None  # int32 [row]: the slot of a row's true task, -1: none has it; for oracles only
    # weights [row, slot] -> the last hidden state of each prompt's last token, [row, width]
    hidden: Callable[[Array], Array] | None = None
    # weights [client, slot] -> the same of training prompts of each client, [client, reference, width]; for strategies
    # that say how many
    references: Callable[[Array], Array] | None = None


Advance = Callable[[int], None]  # called with the number of rows done, for progress bars


def unseen(rows: int, note: str = "") -> None:
    """The `Advance` that shows nothing."""


class Strategy(NamedTuple):
    """An algorithm: static data and pure functions, as optax.GradientTransformation is."""

    name: str
    owners: PyTree
    init: Callable[..., FederationState]  # (adapters, enrolment) -> state
    ask: Callable[[FederationState, Work], Adapters]  # leaves [lane, ...]
    # (state, all lanes) -> sums of nothing, and `add(sums, some lanes, their adapters [lane, ...]) -> sums`
    collect: Callable[[FederationState, Work], tuple[PyTree, Callable[[PyTree, Work, Adapters], PyTree]]]
    tell: Callable[[FederationState, PyTree], FederationState]  # (state, sums of all lanes) -> state
    route: Callable[..., Array]  # (state, clients [row], view, mode) -> weights [row, slot] over `bank.serving`
    enrolling: Enrolling = "nothing"
    pooled: bool = False  # all clients' rows are one lane
    references: int = 0  # so many training prompts of each client `route` looks at (`View.references`)
    phases: Callable[[Array, int], tuple[Phase, ...]] = one_phase  # (round 1..T, T); their number never changes
    # (round 1..T, T) -> the round, or what is between two, whose learning rate it has
    pace: Callable[[Array, int], Array] = lambda round, rounds: round
    # (state, work, losses) -> state, before lanes ask; `losses` maps the adapters of one slot to losses [lane]
    choose: Callable[[FederationState, Work, Callable[[Adapters], Array]], FederationState] | None = None
    regroup: Callable[[FederationState], FederationState] | None = None  # on the host, after a round
    base: Callable[[FederationState, PyTree], PyTree] | None = None  # the frozen ones, a "shift" beside each target's
    # (state after a round, its lanes, bytes of all that one trains and does not keep) -> bytes one sends, and receives
    traffic: Callable[[FederationState, int, int], tuple[int, int]] = lambda state, lanes, size: (size, size)
    derive: Callable[[FederationState], FederationState] | None = None  # what follows from the new adapters
    # (AdamW on what a phase moves, learning rate, LocalConfig) -> the optax transformation of a lane in place of it;
    # its `update` is told `received`, too: what the lane was given at the start of the round
    optimiser: Callable[[Any, Array, Any], Any] | None = None
    finds_slots: bool = False  # it finds by itself how many clusters of clients there are
    of_products: bool = False  # `tell` averages A B: the server's optimiser, whose steps are of A and B, is not for it

    @property
    def has_local_clusters(self) -> bool:
        """Whether a client's rows are in local clusters, by likeness or by task, each of which trains by itself."""
        return self.enrolling in ("clustering", "tasks")
