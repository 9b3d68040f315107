"""Routed answers from a run directory: which adapter a new text goes to, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fedrouter_jax import answers, clusters, evaluate, experiment, rouge, routing, runs
from fedrouter_jax import bank as bank_lib
from fedrouter_jax.data import sources, tokens
from fedrouter_jax.data.rows import Row
from fedrouter_jax.errors import UserError
from fedrouter_jax.sharing import Track, silent
from fedrouter_jax.types import OWNERSHIP


def number_of(run: Path, client: int | str) -> int:
    """A client's number, from text by its name first; raises `UserError` where there is none such."""
    clients = clusters.read(run / "clusters.json")["clients"]
    names = [held["name"] for held in clients if "name" in held]
    if client in names:
        return names.index(client)
    if str(client).isdecimal() and int(client) < len(clients):
        return int(client)
    named = f", by name {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else ""
    raise UserError(f"--client {client} is not in this run; its clients are 0 to {len(clients) - 1}{named}")


def route(
    run: Path,
    texts: Sequence[str],
    client: int | str | None = None,
    track: Track = silent,
    references: Sequence[str] = (),
) -> list[dict]:
    """For each text `{"text", "cut", "adapter", "slot", "task", "distances", "answer", "round"}`.

    `round`: how many rounds the adapters have trained. `cut`: the text is too long for the run and lost its end.
    `client` routes among that client's own clusters (or to its own adapter), by its number or the name it came with;
    None among all. `adapter` names all that count, with a weight where that is not 1; `slot` is the first of most
    weight. `distances` are to all centroids, empty for strategies without a router. `references` are the right answers,
    where they are known ("" for one that is not): to those texts `{"reference"}` and the scores of `rouge.score` are
    added.
    """
    if not texts:
        raise UserError(
            f'no text to route; give one or more in quotes, fedrouter route {run} "Summarise: ...", or a file by --rows'
        )
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise UserError(f"text {number} to route is empty; give an instruction in quotes")
        if text != text.encode(errors="ignore").decode():
            raise UserError(f"text {number} to route holds bytes that are not UTF-8; give it in UTF-8")
    loaded = runs.read(run)
    prepared, state = loaded.prepared, loaded.state
    data = prepared.config.data
    client = None if client is None else number_of(run, client)
    owned = any(OWNERSHIP[owner].slot_per == "client" for owner in jax.tree.leaves(prepared.strategy.owners))
    personal = owned or prepared.strategy.regroup or prepared.strategy.choose
    if client is None and personal:
        raise UserError(f"the answer depends on the client in a {prepared.strategy.name} run; say whose with --client")
    if prepared.strategy.enrolling == "tasks":
        raise UserError("an oracle is told the task of each row and routes no new text; use a fedrouter run")
    clients = jnp.full(len(texts), client or 0, jnp.int32)
    rows = [Row(text, "", "") for text in texts]
    encoded = tokens.encode(
        prepared.model.tokenizer, rows, data.template, data.max_length, data.max_response, to_answer=True
    )
    tokens.check(encoded, prepared.model.config.vocab_size, prepared.model.name)
    embeddings = distances = None
    if prepared.strategy.enrolling == "clustering":
        with track("embedding", len(texts)) as advance:
            embeddings = jnp.asarray(experiment.embed_texts(prepared, texts, advance))
        distances = np.asarray(routing.nearest(state.memory, embeddings)[1])
    mode = "global" if client is None else "local"
    prompts = [row.prompt for row in encoded]
    view = evaluate.view(prepared, state, embeddings, None, prompts)
    weights = evaluate.routing_weights(prepared, state, clients, view, mode)
    with track("answering", len(texts)) as advance:
        said = answers.answer(prepared, state, prompts, weights, advance)
    most, routed = evaluate.leading(prepared, state, weights)
    names = bank_lib.serving_names(prepared.strategy.owners, state.bank)
    return [
        {
            "text": text,
            "cut": encoded[i].truncated,
            "adapter": " + ".join(_named(names[place], opened[place]) for place in np.flatnonzero(opened)),
            "slot": slot,
            "task": loaded.slot_tasks[slot] if routed else "",
            "distances": [] if distances is None else [float(value) for value in distances[i]],
            "answer": said[i],
            "round": int(state.round),
            **scored(references[i] if references else "", said[i]),
        }
        for i, (text, opened, slot) in enumerate(zip(texts, weights, most.tolist(), strict=True))
    ]


def scored(reference: str, answer: str) -> dict:
    """A right answer and how near an answer comes to it; nothing where it is not known."""
    return {"reference": reference, **rouge.score(reference, answer)} if reference.strip() else {}


def questions_of(path: Path, run: Path) -> tuple[Row, ...]:
    """The rows of a file, in the columns where the run had them, answers where there are any."""
    return sources.read_questions(path, sources.columns(runs.read_config(run).data.columns))


def notes(run: Path, answers: Sequence[dict]) -> list[str]:
    """What should be known of the answers of `route`: which texts were cut, and how near they come to known ones."""
    lines = []
    if cut := [number for number, answer in enumerate(answers, start=1) if answer["cut"]]:
        length = runs.read_config(run).data.max_length
        shown = ", ".join(map(str, cut[:10])) + (f" and {len(cut) - 10} more" if len(cut) > 10 else "")
        lines.append(f"longer than --max-length {length}, so cut at its end: text {shown}")
    if known := [answer for answer in answers if "reference" in answer]:
        names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "exact": "exact match"}
        means = (f"{name} {np.mean([answer[key] for answer in known]):.3f}" for key, name in names.items())
        lines.append(f"beside {len(known)} known answers: {', '.join(means)}")
    return lines


def _named(name: str, weight: float) -> str:
    return name if weight == 1 else f"{name} ({weight:.2f})"
