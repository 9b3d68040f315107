"""Scores on each client's own tasks and on the mix of all: ROUGE of greedy answers, loss of the references."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fedrouter_jax import answers, clusters, processes, rouge, routing
from fedrouter_jax import bank as bank_lib
from fedrouter_jax.errors import UserError
from fedrouter_jax.experiment import Prepared, test_rows
from fedrouter_jax.sharing import Track, silent
from fedrouter_jax.types import Array, FederationState, View

METRICS = ("rouge1", "rouge2", "rougeL", "exact", "loss")


class Question(NamedTuple):
    """One test row asked of one client."""

    part: str  # "personalised", "generalisation" or "newcomers"; "base" or "base_..." for the same of the base model
    client: int
    row: int  # index into the test rows
    weights: tuple[float, ...]  # over slots; all zero: the base model


class Evaluation(NamedTuple):
    """Scores and the answers behind them."""

    scores: dict[str, dict]
    answers: list[dict]  # one record per question


def distinct(questions: Sequence[Question]) -> tuple[list[tuple[int, tuple[float, ...]]], list[int]]:
    """The distinct (row, weights) among questions, and for each question its index there: each is answered once."""
    index: dict[tuple[int, tuple[float, ...]], int] = {}
    places = [index.setdefault((q.row, q.weights), len(index)) for q in questions]
    return list(index), places


def summary(questions: Sequence[Question], tasks: Sequence[str], scores: Sequence[dict[str, float]]) -> dict[str, dict]:
    """`{part: {metric: {"mean", "per_task", "per_client"}, "rows"}}`.

    A client's score is the mean over its rows; `mean` is the mean over clients; `per_task` the mean over the rows of a
    task (`tasks[i]` is that of question i). A metric that is not finite for every row of a part is left out there.
    """
    parts: dict[str, dict] = {}
    for part in dict.fromkeys(q.part for q in questions):
        here = [i for i, q in enumerate(questions) if q.part == part]
        parts[part] = {"rows": len(here)}
        for metric in METRICS:
            if not np.isfinite([scores[i][metric] for i in here]).all():
                continue  # a loss may overflow; JSON has no word for that
            clients, by_task = defaultdict(list), defaultdict(list)
            for i in here:
                clients[questions[i].client].append(scores[i][metric])
                by_task[tasks[i]].append(scores[i][metric])
            per_client = {str(client): float(np.mean(values)) for client, values in sorted(clients.items())}
            parts[part][metric] = {
                "mean": float(np.mean(list(per_client.values()))),
                "per_task": {task: float(np.mean(values)) for task, values in sorted(by_task.items())},
                "per_client": per_client,
            }
    return parts


def questions(
    prepared: Prepared,
    state: FederationState,
    enrolment: routing.Enrolment,
    embeddings: np.ndarray | None,
    with_base: bool,
) -> list[Question]:
    """Who is asked what, and which adapter answers.

    `embeddings` as for `experiment.enroll`; `with_base`: the same of the base model, too.
    """
    config, split = prepared.config, prepared.partition
    asked = {row: place for place, row in enumerate(test_rows(split))}
    where = None if embeddings is None else embeddings[-len(asked) :]
    counts = clusters.slot_tasks(prepared, enrolment)
    task_slot = np.where(counts.any(axis=1), counts.argmax(axis=1), -1)  # nobody may hold rows of a task

    def routed(part: str, pairs: list[tuple[int, int]], mode: routing.Mode) -> list[Question]:
        clients = jnp.asarray([c for c, _ in pairs])
        tasks = [prepared.dataset.test[row].task for _, row in pairs]
        slots = [task_slot[split.tasks.index(task)] if task in split.tasks else -1 for task in tasks]
        points = None if where is None else jnp.asarray(where[[asked[row] for _, row in pairs]])
        prompts = [prepared.test[row].prompt for _, row in pairs]
        seen = view(prepared, state, points, jnp.asarray(slots), prompts)
        weights = routing_weights(prepared, state, clients, seen, mode)
        return [Question(part, c, row, tuple(weight)) for (c, row), weight in zip(pairs, weights.tolist(), strict=True)]

    own = [(c, row) for c, held in enumerate(split.clients) for row in held.test]
    trained = config.data.founders
    mix = [(c, row) for c in range(trained) for row in split.mix]
    asked_of = {
        "personalised": ([pair for pair in own if pair[0] < trained], config.evaluation.personalised_routing),
        "generalisation": (mix, config.evaluation.generalisation_routing),
        "newcomers": ([pair for pair in own if pair[0] >= trained], config.evaluation.personalised_routing),
    }
    asked_of = {part: value for part, value in asked_of.items() if value[0]}
    found = [question for part, (pairs, mode) in asked_of.items() for question in routed(part, pairs, mode)]
    if with_base:
        nobody = (0.0,) * len(found[0].weights)
        for part, (pairs, _) in asked_of.items():
            name = "base" if part == "personalised" else f"base_{part}"
            found += [Question(name, c, row, nobody) for c, row in pairs]
    return found


def routing_weights(
    prepared: Prepared, state: FederationState, clients: Array, seen: View, mode: routing.Mode
) -> np.ndarray:
    """The weights [row, slot] that the strategy's router gives adapters; raises `UserError` for another shape."""
    strategy = prepared.strategy
    weights = np.asarray(processes.of_first(strategy.route(state, clients, seen, mode)))
    names = bank_lib.serving_names(strategy.owners, state.bank)
    if weights.shape != (len(clients), len(names)):
        raise UserError(
            f"{strategy.name} routes {len(clients)} texts by weights of shape {weights.shape}; expected a row for each "
            f"text and a column for each of {len(names)} slots, {names[0]} to {names[-1]}; `bank.weights` puts "
            "those of several adapters together"
        )
    return weights


def view(
    prepared: Prepared,
    state: FederationState,
    embeddings: jnp.ndarray | None,
    task_slots: jnp.ndarray | None,
    prompts: list[list[int]],
) -> View:
    """What a router may look at for some prompts; hidden states are computed when it asks for them."""

    def states(prompts: list[list[int]], weights) -> jnp.ndarray:
        return jnp.asarray(answers.states(prepared, state, prompts, weights))

    def references(weights) -> jnp.ndarray:
        count = prepared.strategy.references
        if not count:
            raise UserError(
                f"{prepared.strategy.name} routes by training prompts of clients, which its Strategy does not say; set "
                "`references` to how many"
            )
        drawn = [
            held[i].prompt
            for client, held in enumerate(prepared.train)
            for i in np.random.default_rng([prepared.config.seed, client, 0xD9A]).integers(0, len(held), count)
        ]
        found = states(drawn, jnp.repeat(weights, count, axis=0))
        return found.reshape(len(prepared.train), count, -1)

    return View(embeddings, task_slots, lambda weights: states(prompts, weights), references)


def leading(prepared: Prepared, state: FederationState, weights: np.ndarray) -> tuple[np.ndarray, bool]:
    """Of each row of `weights` [row, slot] the slot with most, int [row]; and whether slots are those of clusters.

    Then the weights of all adapters of a cluster are added up, and others do not count.
    """
    strategy = prepared.strategy
    of_clusters = bank_lib.of_clusters(strategy.owners, state.bank)
    routed = strategy.has_local_clusters and len(of_clusters) > 0
    slots = of_clusters if routed else np.arange(weights.shape[1])[None]
    return weights[:, slots].sum(axis=1).argmax(axis=1), routed


def routed_right(
    prepared: Prepared, enrolment: routing.Enrolment, asked: Sequence[Question], slots: Sequence[int]
) -> dict[str, float]:
    """The share of a part's questions, by part, that went to a slot of their task; of tasks that somebody trains."""
    counts, rows, found = clusters.slot_tasks(prepared, enrolment), prepared.dataset.test, {}
    names = clusters.slot_names(prepared, counts)
    held = [task for task, of_slots in zip(prepared.partition.tasks, counts, strict=True) if task and of_slots.any()]
    for part in ("personalised", "generalisation", "newcomers"):
        here = [(rows[q.row].task, names[slot]) for q, slot in zip(asked, slots, strict=True) if q.part == part]
        right = [named == task for task, named in here if task in held]
        if right:
            found[part] = float(np.mean(right))
    return found


def evaluate_state(
    prepared: Prepared,
    state: FederationState,
    enrolment: routing.Enrolment,
    asked: Sequence[Question],
    track: Track = silent,
    known: Mapping[int, tuple[str, float]] | None = None,
) -> Evaluation:
    """Answer and score questions; each distinct one is answered once.

    `known`: the answer and loss of the base model by row, where another run has them already.
    """
    pairs, places = distinct(asked)
    known, rows = known or {}, prepared.dataset.test
    new = [(row, weights) for row, weights in pairs if any(weights) or row not in known]
    tokens, weights = [prepared.test[row] for row, _ in new], np.array([weights for _, weights in new])
    with track("answering", len(new)) as advance:
        texts = answers.answer(prepared, state, [row.prompt for row in tokens], weights, advance)
    with track("reading references", len(new)) as advance:
        losses = answers.losses(prepared, state, tokens, weights, advance)
    # Rounded here, so that a loss that another run takes over is the same.
    found = {pair: (text, round(float(loss), 6)) for pair, text, loss in zip(new, texts, losses, strict=True)}
    said = [found[pair] if pair in found else known[pair[0]] for pair in pairs]
    per_pair = [
        rouge.score(rows[row].output, text) | {"loss": loss} for (row, _), (text, loss) in zip(pairs, said, strict=True)
    ]
    scored = [per_pair[place] for place in places]
    scores = summary(asked, [rows[q.row].task for q in asked], scored)

    most, routed = leading(prepared, state, np.array([q.weights for q in asked]))
    slots = most.tolist()
    for part, share in (routed_right(prepared, enrolment, asked, slots) if routed else {}).items():
        scores[part]["routing_accuracy"] = share
    records = [
        {
            "part": q.part,
            "client": q.client,
            "row": q.row,
            "task": rows[q.row].task,
            "slot": slot if any(q.weights) else None,
            "instruction": rows[q.row].instruction,
            "reference": rows[q.row].output,
            "answer": said[place][0],
            **{metric: round(value, 6) if np.isfinite(value) else None for metric, value in score.items()},
        }
        for q, place, slot, score in zip(asked, places, slots, scored, strict=True)
    ]
    return Evaluation(scores, records)
