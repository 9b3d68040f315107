"""Scores: ROUGE of greedy answers, on each client's own tasks and on the mix of all tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

METRICS = ("rouge1", "rouge2", "rougeL")


class Question(NamedTuple):
    """One test row asked of one client."""

    part: str  # "base", "base_generalisation", "personalised" or "generalisation"
    client: int
    row: int  # index into the test rows
    weights: tuple[float, ...]  # over slots; all zero: the base model


def rouge(reference: str, answer: str) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), without stemming."""
    found = RougeScorer(list(METRICS), use_stemmer=False).score(reference, answer)
    return {metric: found[metric].fmeasure for metric in METRICS}


def distinct(questions: Sequence[Question]) -> tuple[list[tuple[int, tuple[float, ...]]], list[int]]:
    """The distinct (row, weights) among questions, and for each question its index there: each is answered once."""
    index: dict[tuple[int, tuple[float, ...]], int] = {}
    places = [index.setdefault((q.row, q.weights), len(index)) for q in questions]
    return list(index), places


def summary(questions: Sequence[Question], tasks: Sequence[str], scores: Sequence[dict[str, float]]) -> dict[str, dict]:
    """`{part: {metric: {"mean", "per_task", "per_client"}, "rows"}}`.

    A client's score is the mean over its rows; `mean` is the mean over clients; `per_task` the mean over the rows of a
    task (`tasks[i]` is that of question i).
    """
    parts: dict[str, dict] = {}
    for part in dict.fromkeys(q.part for q in questions):
        here = [i for i, q in enumerate(questions) if q.part == part]
        parts[part] = {"rows": len(here)}
        for metric in METRICS:
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
