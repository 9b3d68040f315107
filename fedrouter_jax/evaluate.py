"""Scores on each client's own tasks and on the mix of all: ROUGE of greedy answers, loss of the references."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from fedrouter_jax import answers, processes, routing
from fedrouter_jax import bank as bank_lib
from fedrouter_jax.errors import UserError
from fedrouter_jax.experiment import Prepared, test_rows
from fedrouter_jax.sharing import Track, silent
from fedrouter_jax.types import Array, FederationState, View

METRICS = ("rouge1", "rouge2", "rougeL", "exact", "loss")
_UNSPACED = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"  # Thai to Chinese


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


def score(reference: str, answer: str) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) without stemming, and exact match but for case (0 or 1).

    Words are those of the rouge-score package, a to z and digits, but for references that are mostly in another script
    than Latin, or have none of these: there they are runs of letters and digits, and single characters where no spaces
    are written. A reference of signs alone is right or wrong.
    """
    exact = float(answer.strip().casefold() == reference.strip().casefold())
    letters = [sign for sign in reference if sign.isalpha() or (sign.isdecimal() and not sign.isascii())]
    others = sum("LATIN" not in unicodedata.name(letter, "") for letter in letters)
    plain = 2 * others <= len(letters) and re.search(r"[a-z0-9]", reference.lower())
    names = ["rouge1", "rouge2", "rougeL"]
    if not plain and not _Words().tokenize(reference):
        return dict.fromkeys([*names, "exact"], exact)
    found = RougeScorer(names, tokenizer=None if plain else _Words()).score(reference, answer)
    return {metric: value.fmeasure for metric, value in found.items()} | {"exact": exact}


class _Words:
    """A tokenizer as RougeScorer takes it."""

    def tokenize(self, text: str) -> list[str]:
        """Words in small letters, signs above and below letters with them."""

        words, single = [""], False  # single: the last word is a letter of a script without spaces, and complete
        for sign in unicodedata.normalize("NFC", text).casefold():
            if unicodedata.category(sign).startswith("M"):
                words[-1] += sign
                continue
            unspaced = sign.isalnum() and re.match(_UNSPACED, sign) is not None
            if single or unspaced or not sign.isalnum():
                words.append("")
            words[-1] += sign if sign.isalnum() else ""
            single = unspaced
        return [word for word in words if word]


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


def slot_tasks(prepared: Prepared, enrolment: routing.Enrolment) -> np.ndarray:
    """Rows of each task that each slot is trained on, int [task, slot]: newcomers' are not."""
    tasks, clients = prepared.partition.tasks, prepared.partition.clients
    counts, table = np.zeros((len(tasks), enrolment.clusters), int), np.asarray(enrolment.table)
    for number, held in enumerate(clients[: len(clients) - prepared.config.data.newcomers]):
        for i, label in zip(held.train, enrolment.labels[number], strict=False):
            counts[tasks.index(prepared.dataset.train[i].task), table[number, label]] += 1
    return counts


def slot_names(prepared: Prepared, counts: np.ndarray) -> list[str]:
    """The task with most of each slot's rows [task, slot]; "" for a slot that has none."""
    return [prepared.partition.tasks[rows.argmax()] if rows.any() else "" for rows in counts.T]


def clustering_accuracy(counts: np.ndarray) -> float:
    """Clustering accuracy: the share of rows on the best one-to-one matching of rows' labels [label, cluster]."""
    from scipy.optimize import linear_sum_assignment  # here, for it takes a third of a second

    rows, cols = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, cols].sum() / counts.sum())


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
    counts = slot_tasks(prepared, enrolment)
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
    trained = len(split.clients) - config.data.newcomers
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


def routed_right(
    prepared: Prepared, enrolment: routing.Enrolment, asked: Sequence[Question], most: Callable[[Question], int]
) -> dict[str, float]:
    """The share of a part's questions, by part, that went to a slot of their task; of tasks that somebody trains."""
    counts, rows, found = slot_tasks(prepared, enrolment), prepared.dataset.test, {}
    names = slot_names(prepared, counts)
    held = [task for task, of_slots in zip(prepared.partition.tasks, counts, strict=True) if task and of_slots.any()]
    for part in ("personalised", "generalisation", "newcomers"):
        right = [names[most(q)] == rows[q.row].task for q in asked if q.part == part and rows[q.row].task in held]
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
        score(rows[row].output, text) | {"loss": loss} for (row, _), (text, loss) in zip(pairs, said, strict=True)
    ]
    scored = [per_pair[place] for place in places]
    scores = summary(asked, [rows[q.row].task for q in asked], scored)

    clusters = bank_lib.of_clusters(prepared.strategy.owners, state.bank)
    routed = prepared.strategy.enrolling in ("clustering", "tasks") and len(clusters) > 0
    slots = clusters if routed else np.arange(len(asked[0].weights))[None]

    def most(q: Question) -> int:
        """The slot that has most weight, where several adapters are the clusters' that of their sum."""
        return int(np.array(q.weights)[slots].sum(axis=0).argmax())

    for part, share in (routed_right(prepared, enrolment, asked, most) if routed else {}).items():
        scores[part]["routing_accuracy"] = share
    records = [
        {
            "part": q.part,
            "client": q.client,
            "row": q.row,
            "task": rows[q.row].task,
            "slot": most(q) if any(q.weights) else None,
            "instruction": rows[q.row].instruction,
            "reference": rows[q.row].output,
            "answer": said[place][0],
            **{metric: round(value, 6) if np.isfinite(value) else None for metric, value in score.items()},
        }
        for q, place, score in zip(asked, places, scored, strict=True)
    ]
    return Evaluation(scores, records)
