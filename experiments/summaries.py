"""A finished run as one small JSON file: what tables and figures are made from, and what is committed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from fedrouter_jax import config as config_lib
from fedrouter_jax import files, formats, records
from fedrouter_jax.config import Config
from fedrouter_jax.errors import UserError


def of(folder: Path) -> dict:
    """Config, scores (not of single rows), cost and accuracy of a finished run. The path of the data is shortened.

    Where clients were put into groups while they trained, `table` has the last ones: [client][0] -> slot. `data` and
    `model` are the SHA-256 of the rows and the weights.
    """
    run = records.read(folder)
    regrouped = [record["table"] for record in run.rounds if "table" in record]
    return {
        "config": asdict(portable(run.config)),
        "scores": run.scores,
        "cost": records.cost(run) | {"tokens": sum(record["tokens"] for record in run.rounds)},
        "accuracy": records.accuracy(run),
        "device": run.timings.get("device"),
        "taken_over": run.timings.get("taken_over", []),
        **{name: run.clusters[name] for name in ("data", "model") if name in run.clusters},
        **({"table": regrouped[-1]} if regrouped else {}),
    }


def save(folder: Path, to: Path) -> None:
    """The summary of a run as a file."""
    files.write(to, json.dumps(of(folder), indent=1) + "\n")


def known(path: Path, config: Config) -> bool:
    """Whether a file is the summary of just this experiment, wherever the data lay and however it was computed."""
    return path.exists() and not differing(config_lib.of_json(read(path)["config"], path), portable(config))


def differing(theirs: Config, ours: Config) -> str:
    """A choice in which two experiments differ, in words; empty where only how they are computed does."""
    found, wanted = (config_lib.choices(c) | {"data": c.data.data, "model": c.model} for c in (theirs, ours))
    other = (key for key in wanted if found[key] != wanted[key])
    return next((f"{key} {found[key]!r}, where {wanted[key]!r} is asked for" for key in other), "")


def portable(config: Config) -> Config:
    """The config with its data by name, wherever they lie on this machine."""
    return replace(config, data=replace(config.data, data=Path(config.data.data).name))


def load(folder: Path) -> dict[str, dict]:
    """All summaries in a folder, by name; raises `UserError` where two are of other rows of one name.

    Those of older versions do not say of which rows they are.
    """
    found = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    firsts: dict[tuple, str] = {}
    for name, summary in found.items():
        # `config.rows_key`, of configs that may have fields of older versions.
        data, seed = summary["config"]["data"], summary["config"]["seed"]
        if "data" in summary:
            first = firsts.setdefault(
                (data["data"], str(data.get("columns")), data.get("validation", False), seed), name
            )
            if found[first]["data"] != summary["data"]:
                raise UserError(
                    f"{folder}: {first} and {name} are of other rows of one name, {data['data']}; remove those of one"
                )
    return found


def read(path: Path) -> dict:
    """One summary; raises `UserError` for a file that is none."""
    found = formats.read_json(path, remedy="remove it")
    lacking = sorted({"config", "scores", "cost", "accuracy", "device"} - set(found))
    if lacking:
        raise UserError(f"{path} is no summary of a run: it has no {lacking[0]!r}; restore the file or remove it")
    return found


def configs(found: Mapping[str, dict], folder: Path) -> dict[str, Config]:
    """The configs of summaries in a folder, by name."""
    paths = {name: folder / f"{name}.json" for name in found}
    return {name: config_lib.of_json(summary["config"], paths[name]) for name, summary in found.items()}


def score(summary: Mapping, part: str, metric: str = "rouge1") -> float:
    """A score of a run."""
    return summary["scores"][part][metric]["mean"]
