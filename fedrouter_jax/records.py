"""What run directories say: read them, group them by seed, look up their scores and costs. No model, no data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedrouter_jax import config as config_lib
from fedrouter_jax import formats, idle
from fedrouter_jax import method as method_lib
from fedrouter_jax.config import ComputeConfig, Config, DataConfig
from fedrouter_jax.errors import UserError
from fedrouter_jax.strategies import STRATEGIES

PARTS = ("personalised", "generalisation", "newcomers")  # the last only where clients joined after training
BASE_PARTS = ("base", "base_generalisation", "base_newcomers")


class Run(NamedTuple):
    """What a run directory holds, as far as the run got."""

    path: Path
    config: Config
    rounds: list[dict]  # the complete lines of rounds.jsonl
    clusters: dict | None
    scores: dict | None  # None: unfinished
    timings: dict


class Row(NamedTuple):
    """One row of the tables: runs whose results differ by their seed alone, or the base model under them."""

    label: str
    runs: list[Run]
    parts: tuple[str, ...]  # names of its parts in the scores, as in `PARTS`

    @property
    def base(self) -> bool:
        """Whether this is the model without adapters."""
        return self.parts == BASE_PARTS


def read_all(paths: Sequence[Path]) -> list[Run]:
    """Each run once, in the order given."""
    return [read(path) for path in {Path(path).resolve(): Path(path) for path in paths}.values()]


def begun(path: Path) -> bool:
    """Whether a run has anything to tell: one that was refused when its rows were read has its config alone."""
    return any((path / name).exists() for name in ("clusters.json", "rounds.jsonl"))


def read(path: Path) -> Run:
    """One run directory; raises `UserError` that names what it cannot read."""
    config = config_lib.load(path / "config.json")
    rounds = formats.read_rounds(path / "rounds.jsonl")
    clusters = formats.read_clusters(path / "clusters.json")
    config_lib.check_begun(path, (clusters or {}).get("config", {}), config)
    held = [len(row) for row in (clusters or {}).get("table", ())]
    for lane in (lane for record in rounds for lane in record["lanes"]):
        if clusters and not (0 <= lane["client"] < len(held) and 0 <= lane["cluster"] < held[lane["client"]]):
            raise UserError(
                f"{path / 'rounds.jsonl'}: a lane is of client {lane['client']} and cluster {lane['cluster']}, which "
                "clusters.json does not have; restore the files, or start a new run"
            )
    scores = formats.read_json(path / "scores.json", formats.Scores)
    timings = formats.read_json(path / "timings.json", formats.Timings)
    return Run(path, config, rounds, clusters, scores, timings or {})


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Base models first, one for each model and data; then the runs, those whose seeds alone set them apart together.

    What changes only speed and memory does not, unless finished runs are there that differ in nothing else.
    """
    _check_origins(runs)
    alike = {run.path: replace(run.config, compute=ComputeConfig()) for run in runs}
    times = Counter(alike[run.path] for run in runs if run.scores is not None)
    twice = {replace(config, seed=0) for config, count in times.items() if count > 1}
    configs = {run.path: run.config if replace(alike[run.path], seed=0) in twice else alike[run.path] for run in runs}
    choices = [_choices(config) for config in configs.values()]
    varying = {name for found in choices for name, value in found.items() if value != choices[0][name]}
    of_base = {"model", "dtype", "quantise", *(field.name for field in fields(DataConfig))}
    bases: dict[Any, dict[int, Run]] = {}
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        if run.scores and BASE_PARTS[0] in run.scores:
            bases.setdefault(setting(run), {}).setdefault(run.config.seed, run)  # all runs of a seed have the same one
        # An unfinished run stands alone: its scores are of an earlier round.
        groups.setdefault((replace(configs[run.path], seed=0), run.scores is None and run.path), []).append(run)
    rows = []
    for of in bases.values():
        chosen = [of[seed] for seed in sorted(of)]
        rows.append(Row(_label("base model", chosen[0].path, configs, varying & of_base), chosen, BASE_PARTS))
    for same in groups.values():
        seeds: dict[int, Run] = {}
        for run in same:
            other = seeds.setdefault(run.config.seed, run)
            if other is not run:
                raise UserError(
                    f"{other.path} and {run.path} are one run twice (equal configs, seed {run.config.seed}), which "
                    "tells nothing of the spread; name one of them"
                )
        first = same[0]
        label = _label(first.config.strategy, first.path, configs, varying)
        if first.scores is None:
            label += f" (unfinished: {len(first.rounds)} of {first.config.rounds.rounds} rounds)"
        rows.append(Row(label, sorted(same, key=lambda run: run.config.seed), PARTS))
    labels = [row.label for row in rows]
    # Folders of one name in different places.
    return [
        row._replace(label=f"{row.label}, {row.runs[0].path}") if labels.count(row.label) > 1 else row for row in rows
    ]


def _check_origins(runs: Sequence[Run]) -> None:
    """Raise `UserError` for runs whose rows or weights have one name and were others."""
    kinds = {"data": "rows", "model": "weights", "described": "configuration or tokenizer"}
    known: dict[tuple, Run] = {}
    for run in runs:
        found, model = run.clusters or {}, (run.config.model,)
        names = {"data": config_lib.rows_key(run.config), "model": model, "described": model}
        for key, named in names.items():
            if key not in found:  # runs of before do not tell
                continue
            other = known.setdefault((key, *named), run)
            if other.clusters[key] != found[key]:
                raise UserError(
                    f"{other.path} and {run.path} name the same {kinds[key]}, {named[0]}, but these were others then, "
                    "so their scores do not compare; report them apart"
                )


def setting(run: Run) -> tuple:
    """Scores compare within a setting: the same model and the same rows on the same clients."""
    return run.config.model, run.config.dtype, run.config.quantise, run.config.data


def budget(run: Run) -> tuple[int, int, int, int]:
    """Rounds, steps, rows of a step, and how many clusters of a client train in a round (0: all that it holds)."""
    config = run.config
    # Somebody's own method need not be here.
    several = config.strategy in STRATEGIES and method_lib.strategy(config, None).has_local_clusters
    each = config.rounds.clusters_per_round if several else 1
    return config.rounds.rounds, config.local.steps, config.local.batch, each


def _choices(config: Config) -> dict[str, Any]:
    """Every choice by its name, without those that have a column of their own."""
    flat: dict[str, Any] = {}
    for name, value in asdict(config).items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return {name: value for name, value in flat.items() if name not in ("strategy", "seed", "scenario")}


def _label(name: str, path: Path, configs: dict[Path, Config], varying: set[str]) -> str:
    """A name and what sets it apart: model and data, then one or two choices, or the directory where they are more.

    Turns are told of where the server orders them: most methods have none.
    """
    choices = _choices(configs[path])
    others = [key for key in choices if key in varying - {"model", "data"}]
    told = [key for key in others if key != "turns" or choices[key] != "own"]
    shown = [key for key in ("model", "data") if key in varying] + (told if len(others) <= 2 else [])
    apart = [f"{key} {brief(choices[key])}" for key in shown] + ([path.resolve().name] if len(others) > 2 else [])
    return f"{name} ({', '.join(apart)})" if apart else name


def brief(value: Any) -> str:
    """A choice as shown; of an absolute path only the last part."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)


def latest(run: Run) -> tuple[dict, int]:
    """The final scores, else the last intermediate ones, and their round."""
    if run.scores is not None:
        return run.scores, run.config.rounds.rounds
    taken = [(record["scores"], record["round"]) for record in run.rounds if "scores" in record]
    return taken[-1] if taken else ({}, len(run.rounds))


def scores(row: Row, part: int, *path: str) -> list[float]:
    """A score of each run that has it; `part` is a place in `PARTS`; `path` such as "rouge1", "mean"."""
    return [*by_seed(row, part, *path).values()]


def by_seed(row: Row, part: int, *path: str) -> dict[int, float]:
    """The same by the seeds of the runs."""
    found: dict[int, Any] = {run.config.seed: latest(run)[0].get(row.parts[part]) for run in row.runs}
    for key in path:
        found = {seed: entry.get(key) if isinstance(entry, dict) else None for seed, entry in found.items()}
    return {seed: float(value) for seed, value in found.items() if value is not None}


def cost(run: Run) -> dict[str, float]:
    """Bytes sent, optimiser steps a client and round, seconds, lanes rejected: what of it is known."""
    found: dict[str, float] = {}
    for name in ("bytes_up", "bytes_down"):
        found[name] = sum(record[name] for record in run.rounds) + (run.clusters or {}).get(name, 0)
    if run.rounds:
        found["optimiser_steps_per_client"] = float(np.mean([r["optimiser_steps_per_client"] for r in run.rounds]))
        found["seconds_training"] = sum(record["seconds"] for record in run.rounds)
        found["rejected_lanes"] = sum("rejected" in lane for record in run.rounds for lane in record["lanes"])
    # Of a run that took work over from another the rest says nothing.
    whole = "total" in run.timings and not run.timings.get("taken_over")
    return found | ({"seconds_total": run.timings["total"]} if whole else {})


def notes(run: Run) -> list[str]:
    """What the user of a finished run should know, a sentence each."""
    found, config = [], run.config
    total, held = run.clusters["clusters"], {slot for row in run.clusters["table"] for slot in row}
    nobody = total - len(held - {-1})
    if nobody and run.clusters["clustered"]:
        found.append(
            f"{nobody} of {total} global clusters hold no rows of any client, and no text is routed there; give fewer "
            "--global-clusters, or more --local-clusters"
        )
    if method_lib.needs_cluster_count(method_lib.strategy(config, total)) and total >= config.data.founders > 1:
        found.append(
            f"{total} groups for {config.data.founders} clients: hardly two of them share one, so little is averaged; "
            "give fewer --global-clusters, or more --clients"
        )
    if config.model == "tiny":
        found.append("the model is random, so the scores mean nothing; this run shows that all works")
    if config.rounds.server in ("adagrad", "adam", "yogi") and config.rounds.server_rate > 0.1:
        found.append(
            f"--server {config.rounds.server} moves each number of an adapter by up to about --server-rate a round: "
            f"{config.rounds.server_rate:g} is far; give about 0.01"
        )
    found += [f"without effect here: {option}" for option in idle.options(config)]
    rows = sum(len(client["rows"]) for client in run.clusters["clients"])
    there = run.clusters.get("training_rows", rows)
    if rows < there and config.data.data != "synthetic":
        full = any(len(client["rows"]) == config.data.train_rows for client in run.clusters["clients"])
        most = f", at most {config.data.train_rows} each (--train-rows)" * full
        found.append(f"clients hold {rows} of {there} training rows{most}; the rest is left out")
    cut = run.clusters.get("cut_rows", 0)
    if cut:
        found.append(
            f"{cut} of {rows} training rows lost their end, for they are longer than --max-length "
            f"{config.data.max_length} or --max-response {config.data.max_response} tokens"
        )
    if config.data.validation:
        found.append("scores are of training rows that were held out (--validation); no test row was asked")
    seen = run.clusters.get("seen_rows", 0)
    if seen:
        found.append(
            f"{seen} of {run.clusters['test_rows']} test rows have an instruction that is among the training rows, too"
        )
    missed = len(run.clusters.get("never_trained", ()))
    if missed:
        found.append(f"too few rounds: {missed} local clusters were never trained; raise --rounds")
    rejected = int(cost(run).get("rejected_lanes", 0))
    if rejected:
        lanes = sum(len(record["lanes"]) for record in run.rounds)
        found.append(f"{rejected} of {lanes} lanes were left out, for they were not finite; lower --learning-rate")
    return found


def accuracy(run: Run) -> dict[str, float]:
    """Clustering accuracy of training rows, "local" and "global"; empty where nothing is clustered."""
    return (run.clusters or {}).get("accuracy") or {}


def tasks_of(rows: Sequence[Row], part: int) -> list[str]:
    """The tasks that a part has scores of; rows without a label belong to none."""
    found = [latest(run)[0].get(row.parts[part], {}) for row in rows for run in row.runs]
    return sorted({task for entry in found for task in entry.get("rouge1", {}).get("per_task", {}) if task})


def several_scenarios(rows: Sequence[Row]) -> bool:
    """Whether rows have to say of which scenario they are."""
    return len({row.runs[0].config.data.scenario for row in rows}) > 1


def names(rows: Sequence[Row]) -> list[str]:
    """The rows' labels, with the scenario where there are several, and how many seeds stand behind them."""
    several = several_scenarios(rows)
    scenario = [f", {row.runs[0].config.data.scenario}" if several else "" for row in rows]
    seeds = [f", {len(row.runs)} seeds" if len(row.runs) > 1 else "" for row in rows]
    return [row.label + where + count for row, where, count in zip(rows, scenario, seeds, strict=True)]


def ranges(seeds: Sequence[int]) -> str:
    """Seeds in their order, three and more in a row as "0-4"."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts)
