"""Many runs, one after the other, that take over from each other what is equal: the model, embeddings, base answers.

A finished run is never run again, so a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import jax
from rich.console import Console

from experiments import summaries
from fedrouter_jax import config as config_lib
from fedrouter_jax import formats, mesh, report, runs
from fedrouter_jax.config import Config
from fedrouter_jax.data.rows import digest
from fedrouter_jax.errors import UserError
from fedrouter_jax.experiment import rows_of
from fedrouter_jax.models import load_model
from fedrouter_jax.terminal import progress

Name = TypeVar("Name")


def at_least_one(**options: int) -> None:
    """Raise `UserError` for an option below 1."""
    for name, value in options.items():
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")


def runs_of(out: Path | None, usual: Path, runs: Path) -> Path:
    """Where a sweep's run directories lie: in `runs`, or with an `out` that is not the usual one in its folder work.

    Runs of other rows, or of another number of clients, would be in each other's way in one place.
    """
    return runs if out is None or out.resolve() == usual.resolve() else out / "work"


def rows_now(configs: Mapping[Name, Config]) -> dict[Name, str | None]:
    """The SHA-256 of each config's rows as they are; None where they are not here."""

    found: dict[tuple, str | None] = {}
    for config in configs.values():
        if (key := config_lib.rows_key(config)) not in found:
            try:
                found[key] = digest(rows_of(config))
            except UserError:
                found[key] = None  # a run will say why
    return {name: found[config_lib.rows_key(config)] for name, config in configs.items()}


def summarised(configs: Mapping[str, Config], kept: Path) -> set[str]:
    """The runs that have a summary; raises `UserError` where one is of another experiment, which would be lost."""
    check_rows(configs, kept)
    there = {name for name, config in configs.items() if summaries.known(kept / f"{name}.json", config)}
    for path in (kept / f"{name}.json" for name in configs if name not in there):
        if path.exists():
            theirs = config_lib.of_json(summaries.read(path)["config"], path)
            other = summaries.differing(theirs, summaries.portable(configs[path.stem]))
            raise UserError(f"{path} is of another experiment, with {other}; choose another --out or remove it")
    return there


def check_rows(configs: Mapping[str, Config], kept: Path) -> None:
    """Raise `UserError` where any summary in `kept` is of other rows of the same name: tables would compare the two.

    Summaries of older versions do not say theirs.
    """
    by_name = {config_lib.rows_key(summaries.portable(config))[:-1]: config for config in configs.values()}
    found = {path: summaries.read(path) for path in sorted(kept.glob("*.json"))}
    asked = {}
    for path in (path for path in found if "data" in found[path]):
        *name, seed = config_lib.rows_key(config_lib.of_json(found[path]["config"], path))
        if tuple(name) in by_name:
            asked[path] = replace(by_name[tuple(name)], seed=seed)
    for path, rows in rows_now(asked).items():
        if rows not in (None, found[path]["data"]):
            data = asked[path].data.data
            raise UserError(f"{path} is of other rows than {data} has now; choose another --out or remove it")


def sweep(configs: Mapping[str, Config], out: Path, console: Console, kept: Path | None = None) -> list[Path]:
    """Run what is not finished of `{name: config}` in `out/name`; returns the run directories in that order.

    With `kept`, a summary of each run goes there as `name.json`, and a run that has one is not run again.
    """
    rows = rows_now(configs)
    there = summarised(configs, kept) if kept else set()
    if there:
        silent = sum("data" not in summaries.read(kept / f"{name}.json") for name in there)
        older = f"; {silent} of them do not say of which rows they are" if silent else ""
        console.print(f"{len(there)} of {len(configs)} runs have a summary in {kept} and are not run again{older}")
    folders: list[Path] = []
    model = loaded = None
    for number, (name, config) in enumerate(configs.items(), 1):
        folder = out / name
        folders.append(folder)
        if name in there:
            continue
        begun_as = config_lib.load(folder / "config.json") if (folder / "config.json").exists() else config
        if other := summaries.differing(begun_as, config):
            raise UserError(f"{folder} holds a run of another config, with {other}; choose another --out or remove it")
        begun = formats.read_json(folder / "clusters.json") or {}
        if rows[name] and begun.get("data", rows[name]) != rows[name]:
            raise UserError(
                f"{folder}: the rows of {config.data.data} were others then; choose another --out or remove it"
            )
        if not (runs.finished(folder) and (folder / "report.md").exists()):
            console.rule(f"run {number} of {len(configs)}: {name}")
            wanted = (config.model, config.dtype, config.quantise, config.compute.model_parallel)
            if loaded != wanted:
                place = mesh.placing(mesh.make(config.compute.model_parallel))
                loaded, model = wanted, load_model(*wanted[:3], place)
            shared = runs.Shared(model, [other for other in folders[:-1] if other.exists()])
            with progress() as track:
                if (folder / "config.json").exists():
                    runs.proceed(folder, track, shared)
                else:
                    runs.run(config, folder, track, shared)
            report.write([folder], folder)
            jax.clear_caches()  # a process may not hold the programs of fifty runs (the kernel limits its mappings)
        if kept:
            summaries.save(folder, kept / f"{name}.json")
    return folders
