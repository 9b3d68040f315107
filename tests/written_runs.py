"""Run directories written by hand, for reports and plots."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedrouter_jax import config as config_lib
from fedrouter_jax import evaluate, records
from fedrouter_jax.config import Config, DataConfig
from fedrouter_jax.data.schedule import RoundConfig
from fedrouter_jax.presets import smoke

TASKS, CLIENTS, ROWS, WIDTH = ["count", "reverse", "sort|odd"], 4, 12, 6
BASE_SCORES = {"base": 0.1, "base_generalisation": 0.1}
CONFIG = Config(model="tiny", data=DataConfig(clients=CLIENTS), rounds=RoundConfig(rounds=3))


def make_run(path: Path, config: Config = CONFIG, done: int = 3, taken_at: tuple[int, ...] = (), **changes) -> Path:
    """A run directory as `runs` writes it, with random numbers drawn from the config's seed."""
    config = replace(config, **changes)
    path.mkdir(parents=True)
    (path / "config.json").write_text(config_lib.to_json(config), encoding="utf-8")
    rng = np.random.default_rng([config.seed, *config.strategy.encode()])
    clustered = config.strategy == "fedrouter"
    clients = []
    for number in range(CLIENTS):
        local = [0, 1] * (ROWS // 2)
        held = [number % 3, (number + 1) % 3]
        names = [TASKS[held[k]] for k in local]
        slots = [held[k] if clustered else 0 for k in local]
        local = local if clustered else [0] * ROWS
        clients.append({"client": number, "rows": list(range(ROWS)), "tasks": names, "local": local, "global": slots})
    write_json(
        path / "clusters.json",
        {
            "tasks": TASKS,
            "clustered": clustered,
            "recipe": config.cluster.recipe if clustered else None,
            "clusters": 3,  # of a method that clusters nothing, too: as many as there are tasks
            "table": [[c % 3, (c + 1) % 3] for c in range(CLIENTS)] if clustered else [[0]] * CLIENTS,
            "slot_tasks": TASKS if clustered else [TASKS[0], "", ""],
            "accuracy": {"local": 0.875, "global": 0.75} if clustered else None,
            "silhouettes": {},
            "bytes_up": 1_000 if clustered else 0,
            "bytes_down": 2_000 if clustered else 0,
            "clients": clients,
        },
    )
    if clustered:
        np.save(path / "embeddings.npy", rng.normal(size=(CLIENTS * ROWS + 9, WIDTH)).astype(np.float32))
    with (path / "rounds.jsonl").open("w", encoding="utf-8") as file:
        for t in range(1, done + 1):
            record = make_round(t, rng, 2 if clustered else 1)
            if t in taken_at:
                record["scores"] = make_scores(rng, False, clustered)[0]
            file.write(json.dumps(record) + "\n")
    if done == config.rounds.rounds:
        scores, answers = make_scores(rng, True, clustered)
        write_json(path / "scores.json", scores)
        (path / "predictions.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers), "utf-8")
        write_json(path / "timings.json", {"device": "cpu", "total": 9.5, "embed": 1.0})
    return path


def make_round(t: int, rng, held: int = 1) -> dict:
    """A line of rounds.jsonl, of clients that train the clusters they have `held` in turn."""
    lanes = [
        {"client": c, "cluster": t % held, "weight": 6.0, "loss": rng.uniform(1, 2, 2).tolist()} for c in range(CLIENTS)
    ]
    return {
        "round": t,
        "loss": float(np.mean([lane["loss"] for lane in lanes])),
        "learning_rate": 1e-3,
        "seconds": 1.25,
        "bytes_up": 40_000,
        "bytes_down": 50_000,
        "optimiser_steps_per_client": 4.0 if t == 3 else 10.0,
        "tokens": 100,
        "lanes": lanes,
    }


def make_scores(rng, with_base: bool, clustered: bool) -> tuple[dict, list[dict]]:
    """Scores and answers in the form that evaluation gives them."""
    parts = [*records.PARTS, *(records.BASE_PARTS if with_base else ())]
    asked = [evaluate.Question(part, c, row, (1.0,)) for part in parts for c in range(CLIENTS) for row in range(3)]
    found = [{metric: float(rng.uniform(0.2, 0.9)) for metric in evaluate.METRICS} for _ in asked]
    scores = evaluate.summary(asked, [TASKS[q.row] for q in asked], found)
    for part in records.PARTS if clustered else ():
        scores[part]["routing_accuracy"] = 0.625
    texts = {"instruction": "Say <b> " + "word " * 60, "reference": "yes | no", "answer": ""}
    answers = [
        {"part": q.part, "client": q.client, "row": q.row, "task": TASKS[q.row], "slot": 0, **texts, **score}
        for q, score in zip(asked, found, strict=True)
    ]
    return scores, answers


def change_json(path: Path, **changes) -> None:
    """Other values in a JSON file."""
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def write_json(path: Path, value: dict) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value), encoding="utf-8")


def make_summary(strategy: str, seed: int, score: float, scenario: str = "dual") -> dict:
    """A summary with one score everywhere."""
    config = replace(smoke(), strategy=strategy, seed=seed)
    config = replace(config, data=replace(config.data, scenario=scenario))
    parts = {"personalised": score, "generalisation": score / 2} | BASE_SCORES
    return {
        "config": {key: value for key, value in json.loads(config_lib.to_json(config)).items() if key != "format"},
        "scores": {part: {"rouge1": {"mean": value, "per_task": {"qqp": value}}} for part, value in parts.items()},
        "cost": {
            "optimiser_steps_per_client": 2.0,
            "tokens": 1000,
            "bytes_up": 3e6,
            "bytes_down": 4.5e6,
            "seconds_training": 7.0,
        },
        "accuracy": {},
        "device": "cpu",
    }


def scores_of(path: Path) -> dict:
    """What a run's scores.json holds."""
    return json.loads((path / "scores.json").read_text(encoding="utf-8"))
