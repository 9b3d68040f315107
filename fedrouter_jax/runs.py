"""The run directory: what an experiment keeps, written so that it can be killed at any moment and resumed.

    config.json      rounds.jsonl     clusters.json     embeddings.npy     checkpoints/
    scores.json      predictions.jsonl     timings.json     adapters/     router/     report.md     plots/     run.lock

A round's line is written before its checkpoint: on resume, lines past the checkpoint are dropped and done again.
Whole files appear at once (written beside, then renamed). Of several processes (`processes.py`) the first writes, but
for checkpoints, and all read. Processes that know nothing of each other are kept apart by a lock.
"""

from __future__ import annotations

import json
import shutil
import time as clock
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedrouter_jax import checkpoint, clusters, evaluate, experiment, export, files, formats, processes
from fedrouter_jax import config as config_lib
from fedrouter_jax.config import Config
from fedrouter_jax.errors import UserError, one_line
from fedrouter_jax.experiment import Prepared
from fedrouter_jax.models import Model
from fedrouter_jax.routing import Enrolment
from fedrouter_jax.sharing import Track, silent
from fedrouter_jax.types import FederationState


class Shared(NamedTuple):
    """What a run of a sweep may take over instead of computing it again: equal for runs of equal data and model."""

    model: Model | None = None  # the config's model, loaded
    runs: Sequence[Path] = ()  # other run directories; those of other data, models or seeds are passed over


ALONE = Shared()


class Loaded(NamedTuple):
    """A run as far as it got."""

    prepared: Prepared
    enrolment: Enrolment
    slot_tasks: list[str]  # of most rows of each slot, as `clusters.json` has them
    state: FederationState
    embeddings: np.ndarray | None


def check_free(out: Path, config: Config) -> None:
    """Raise `UserError` when `out` holds a run that has begun, or anything else.

    A run that was refused before it computed anything has left only its config, and gives way.
    """
    files.check_name(out, "--out")
    path = out / "config.json"
    own = {path.name, path.name + ".tmp", files.LOCK}  # a kill in the first write leaves no config yet, but its .tmp
    # In this order: another process of the same run may be making the folder.
    others = out.exists() and (not out.is_dir() or any(entry.name not in own for entry in out.iterdir()))
    if path.exists() and others:
        if config_lib.load(path) != config:
            raise UserError(
                f"{out} holds a run of another config; choose another --out, or resume it: fedrouter resume {out}"
            )
        if finished(out):
            raise UserError(f"{out} holds this very run, finished; show it: fedrouter report {out}")
        raise UserError(f"{out} holds this very run already; continue it with: fedrouter resume {out}")
    if others:
        raise UserError(f"{out} exists and is no run directory; choose another --out or empty it")


def finished(out: Path) -> bool:
    """Whether the run in `out` is at its end: seconds are written last. A report may be of an unfinished run."""
    return (out / "timings.json").exists()


def claim(out: Path, config: Config) -> None:
    """Make `out` the directory of this config; raises `UserError` when it is not free."""
    config_lib.check(config)
    check_free(out, config)
    processes.meet("nothing is written yet")
    files.write(out / "config.json", config_lib.to_json(config))
    processes.meet("the config is written")
    files.appear(out / "config.json")


def run(config: Config, out: Path, track: Track = silent, shared: Shared = ALONE) -> dict:
    """A new run to its end; returns its scores."""
    config_lib.check(config)
    check_free(out, config)  # before the lock, which would be written into a folder of something else
    with files.reserved(out):
        claim(out, config)  # checks again: another process may just have been here
        return _proceed(out, track, shared)


def proceed(out: Path, track: Track = silent, shared: Shared = ALONE) -> dict:
    """Continue the run in `out` from wherever it stands to its end; returns its scores."""
    config_lib.load(out / "config.json")  # before the lock, as in `run`
    with files.reserved(out):
        return _proceed(out, track, shared)


def _proceed(out: Path, track: Track, shared: Shared) -> dict:
    timings: dict[str, Any] = {"taken_over": []}
    resumed = any((out / name).exists() for name in ("embeddings.npy", "checkpoints"))
    with timed(timings, "total"):
        loaded = load(out, track, timings, shared)
        loaded = answering(loaded._replace(state=train(out, loaded, track)))
        if not scored(out):
            with timed(timings, "evaluate"):
                known = _of_base(shared, loaded.prepared)
                timings["taken_over"] += ["base answers"] if known else []
                result = score(loaded, True, track, known)
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in result.answers)
            files.write(out / "predictions.jsonl", lines)
            files.write(out / "scores.json", json.dumps(result.scores, indent=2) + "\n")
        if processes.first():
            export.write(out, loaded.prepared, loaded.state, loaded.slot_tasks)
    if resumed:
        del timings["total"]  # nobody knows how long the processes before this one ran
    if not (out / "timings.json").exists():
        record = {"device": str(jax.devices()[0].device_kind), **timings}
        files.write(out / "timings.json", json.dumps(record, indent=2) + "\n")
    processes.meet("all is written")
    return formats.read_json(out / "scores.json", formats.Scores)


def scored(out: Path) -> bool:
    """Whether scores are there, with as many predictions."""
    scores = formats.read_json(out / "scores.json", formats.Scores)
    return bool(scores) and len(files.lines(out / "predictions.jsonl")) == sum(part["rows"] for part in scores.values())


def answering(loaded: Loaded) -> Loaded:
    """The run as it answers: newcomers have joined, and each of several processes has it for itself."""
    prepared = experiment.alone(loaded.prepared)
    return loaded._replace(prepared=prepared, state=experiment.settle(prepared, processes.whole(loaded.state)))


@contextmanager
def timed(timings: dict[str, float], phase: str) -> Iterator[None]:
    """Note the seconds that a phase takes."""
    before = clock.perf_counter()
    yield
    timings[phase] = round(clock.perf_counter() - before, 3)


def load(out: Path, track: Track = silent, timings: dict | None = None, shared: Shared = ALONE) -> Loaded:
    """Read what is there of a run, and make what is missing up to round 0."""
    timings = {"taken_over": []} if timings is None else timings
    config = read_config(out)
    prepared = _prepared(out, lambda: experiment.prepare(config, shared.model))
    done, trained = checkpoint.latest(out / "checkpoints"), files.lines(out / "rounds.jsonl")
    if done is None and trained:
        raise UserError(
            f"{out / 'rounds.jsonl'} tells of {len(trained)} rounds, but {out / 'checkpoints'} holds none; restore it, "
            "or remove rounds.jsonl, scores.json and timings.json to train anew"
        )
    processes.meet("nothing is saved since")
    embedded = (out / "embeddings.npy").exists()
    begun = None if done is None else _restored(out, prepared)  # first, for it refuses other rows and weights
    with timed(timings, "embed"):
        embeddings = _embeddings(out, prepared, track, shared, timings)
    if embedded:
        del timings["embed"]  # they were only read
    if begun is not None:
        return begun._replace(embeddings=embeddings)
    with timed(timings, "cluster"):
        enrolment = experiment.enroll(prepared, embeddings)
    described = clusters.describe(prepared, enrolment)
    files.write(out / "clusters.json", json.dumps(described) + "\n")
    state = experiment.start(prepared, enrolment)
    checkpoint.save(out / "checkpoints", 0, state)
    return Loaded(prepared, enrolment, described["slot_tasks"], state, embeddings)


def _prepared(out: Path, prepare: Callable[[], Prepared]) -> Prepared:
    """The run's model again, and its rows where they are needed, from where they were."""
    try:
        return prepare()
    except UserError as error:
        if (out / "clusters.json").exists():  # it could be prepared once
            here = f"{out / 'config.json'} names the rows and the model of this run, from the folder {Path.cwd()} on"
            raise UserError(f"{error} ({here})") from error
        raise


def read(out: Path, routes: bool = True) -> Loaded:
    """A run as it stands, ready to route texts or only for its adapters; nothing is made or written.

    Embeddings are left out, and rows, but for methods that route by them: a run answers where its rows are not.
    """
    config = read_config(out)
    if checkpoint.latest(out / "checkpoints") is None:
        raise UserError(f"{out} holds no checkpoint, so no adapters; train it first: fedrouter resume {out}")
    dealt = clusters.partition(clusters.read(out / "clusters.json"), config)
    prepared = _prepared(out, lambda: experiment.without_rows(config, dealt))
    if routes and (prepared.strategy.references or prepared.strategy.choose is not None):
        prepared = _prepared(out, lambda: experiment.prepare(config, prepared.model))
    loaded = _restored(out, prepared)
    return answering(loaded) if routes else loaded


def read_config(out: Path) -> Config:
    """The config of a run directory, checked."""
    config = config_lib.load(out / "config.json")
    config_lib.check(config)
    begun = formats.read_json(out / "clusters.json", remedy="start a new run") or {}
    config_lib.check_begun(out, begun.get("config", {}), config)
    return config


def _restored(out: Path, prepared: Prepared) -> Loaded:
    """The run at its latest checkpoint, looked up only here: one that trains on meanwhile removes earlier ones."""
    path = out / "clusters.json"
    found = clusters.read(path)
    enrolment = clusters.enrolment(path, found, prepared)
    like = experiment.start(prepared, enrolment)
    return Loaded(prepared, enrolment, found["slot_tasks"], checkpoint.load_latest(out / "checkpoints", like), None)


def train(out: Path, loaded: Loaded, track: Track) -> FederationState:
    """The remaining rounds. The next round's batches are packed while this one trains."""
    prepared, enrolment, state = loaded.prepared, loaded.enrolment, loaded.state
    config, done = prepared.config, int(state.round)
    rows = experiment.members(prepared, enrolment)
    log = out / "rounds.jsonl"
    logged = files.lines(log)
    if len(logged) < done:
        raise UserError(
            f"{log} has {len(logged)} whole lines, but {done} rounds are trained; restore it, or move the later "
            f"folders of {out / 'checkpoints'} away to train those rounds again"
        )
    formats.read_rounds(log, done)
    files.write(log, "".join(line + "\n" for line in logged[:done]))
    last = config.rounds.rounds
    if done >= last:
        return state
    with track("training", last, done) as advance, ThreadPoolExecutor(1) as packer:
        upcoming = packer.submit(experiment.round_inputs, prepared, rows, done + 1)
        for t in range(done + 1, last + 1):
            work, batch = upcoming.result()
            if t < last:
                upcoming = packer.submit(experiment.round_inputs, prepared, rows, t + 1)
            state, record = experiment.train_round(prepared, state, work, batch)
            if t in config.evaluation.evaluate_at and t < last:
                record["scores"] = score(answering(loaded._replace(state=state)), False, track).scores
            files.append(log, json.dumps(record) + "\n")
            if t % config.compute.checkpoint_every == 0 or t == last:
                checkpoint.save(out / "checkpoints", t, state)
            advance(1, "loss not finite" if record["loss"] is None else f"loss {record['loss']:.3f}")
    return state


def score(
    loaded: Loaded, with_base: bool, track: Track, known: dict[int, tuple[str, float]] | None = None
) -> evaluate.Evaluation:
    """Evaluate; `known` are the base model's answers and losses."""
    prepared, enrolment, _, state, embeddings = loaded
    asked = evaluate.questions(prepared, state, enrolment, embeddings, with_base)
    return evaluate.evaluate_state(prepared, state, enrolment, asked, track, known)


def alike(shared: Shared, prepared: Prepared, recipe: bool) -> Iterator[Path]:
    """The runs of a sweep that asked the same model about the same rows, and (`recipe`) embedded them alike."""
    config, made_from = prepared.config, clusters.origin(prepared)
    for path in shared.runs:
        other = config_lib.load(path / "config.json")
        same = all(
            getattr(other, name) == getattr(config, name) for name in ("data", "model", "dtype", "quantise", "seed")
        )
        # Rows and weights may have been changed in between.
        same = same and made_from.items() <= (formats.read_json(path / "clusters.json") or {}).items()
        if same and (other.cluster.recipe == config.cluster.recipe or not recipe):
            yield path


def _of_base(shared: Shared, prepared: Prepared) -> dict[int, tuple[str, float]]:
    """The base model's answer and loss on each test row, from a run of the same sweep; empty where there is none."""
    for path in alike(shared, prepared, recipe=False):
        if (path / "scores.json").exists():  # written after the predictions: they are whole
            records = formats.read_lines(path / "predictions.jsonl", formats.Answer)
            found = [record for record in records if record["part"].startswith("base")]
            if all(record.get("loss") is not None for record in found):  # some may not be finite
                return {record["row"]: (record["answer"], record["loss"]) for record in found}
    return {}


def _embeddings(out: Path, prepared: Prepared, track: Track, shared: Shared, timings: dict) -> np.ndarray | None:
    """Embeddings of the run's rows, made once or taken over; None for a method that clusters no rows."""
    if prepared.strategy.enrolling != "clustering":
        return None
    path = out / "embeddings.npy"
    there = path.exists()
    others = (other / path.name for other in alike(shared, prepared, recipe=True))
    taken = None if there else next((other for other in others if other.exists()), None)
    processes.meet("all know whether embeddings are there")  # before the first writes them
    if taken is not None:
        timings["taken_over"].append("embeddings")
        if processes.first():
            with files.replaced(path) as beside:
                shutil.copyfile(taken, beside)
    elif not there:
        _embed(path, prepared, track)
    processes.meet("embeddings are there")
    files.appear(path)
    return _read_embeddings(path, prepared)


def _embed(path: Path, prepared: Prepared, track: Track) -> None:
    """Embed the rows, and write behind the embeddings what they were made from."""
    with track("embedding", len(experiment.embedded_rows(prepared))) as advance:
        found = experiment.embed_rows(prepared, advance)
    if processes.first():
        origin = {**clusters.origin(prepared), "crc32": zlib.crc32(found.tobytes())}
        with files.replaced(path) as beside, beside.open("wb") as file:
            np.save(file, found, allow_pickle=False)
            np.save(file, np.array(json.dumps(origin)))  # a second array, which who loads one does not see


def _read_embeddings(path: Path, prepared: Prepared) -> np.ndarray:
    """The embeddings in a file; raises `UserError` for those of other rows or weights, and damaged ones."""
    expected = (len(experiment.embedded_rows(prepared)), prepared.model.config.width)
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            origin = json.loads(str(np.load(file, allow_pickle=False)))
        clusters.check_origin(origin, prepared)
        if found.shape != expected:
            raise ValueError(f"shape {found.shape}, expected {expected}")
        if origin.get("crc32", zlib.crc32(found.tobytes())) != zlib.crc32(found.tobytes()):
            raise ValueError("its numbers are not those that were written")
    except Exception as error:  # NumPy reads headers as Python, and raises what that does
        raise UserError(
            f"{path}: not the embeddings of this run ({one_line(error)}); delete it, and they are made again"
        ) from None
    return found
