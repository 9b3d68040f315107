"""What grows with a federation, and what must not: time and memory by lanes, rounds, centroids and adapters.

    python -m experiments.growth               minutes on two cores; growth.json, growth.md in docs/bench
    python -m experiments.growth --smoke       seconds: small numbers, to see that it works

Lanes and rounds are those of the tiny model, where a lane costs so little that overheads would show.
"""

from __future__ import annotations

import sys
import time as clock
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.measurements import keep
from fedrouter_jax import experiment, generate, kmeans, lora
from fedrouter_jax.data import schedule
from fedrouter_jax.models import load_model
from fedrouter_jax.presets import smoke
from fedrouter_jax.terminal import guarded, parse
from fedrouter_jax.types import Work

GROUP = 8  # lanes that share packs


@dataclass(frozen=True)
class Growth:
    """Time and memory by lanes, rounds, centroids and adapters."""

    smoke: bool = False
    """Small numbers; they mean nothing."""
    out: Path | None = None
    """Folder for growth.json and growth.md; by default docs/bench, or runs/bench with --smoke."""


def main(options: Growth) -> None:
    """Measure, write, show."""
    console, small = Console(stderr=True), options.smoke
    found = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "lanes": by_lanes((8, 16) if small else (8, 64, 512, 4096), console),
        "rounds": by_rounds(12 if small else 200, console),
        "centroids": by_centroids(((1000, 8),) if small else ((10_000, 64), (100_000, 64), (1_000_000, 64)), console),
        "adapters": by_adapters(("tiny", (2, 4)) if small else ("smollm2-135m", (4, 16, 64)), console),
    }
    keep("growth", found, markdown(found), options.out, small)


def timed(action: Callable[[], Any], times: int = 3) -> float:
    """Median seconds of an action that has run once before."""
    jax.block_until_ready(action())
    spent = []
    for _ in range(times):
        before = clock.perf_counter()
        jax.block_until_ready(action())
        spent.append(clock.perf_counter() - before)
    return float(np.median(spent))


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def federation(lanes: int):
    """The smoke preset with so many lanes, which share packs in eights; its clients train many times over."""
    config = smoke()
    config = replace(config, compute=replace(config.compute, lanes_together=GROUP, groups_at_once=1))
    prepared = experiment.prepare(config)
    rows = sum(len(held.train) for held in prepared.partition.clients)
    enrolment = experiment.enroll(prepared, np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32))
    members = experiment.members(prepared, enrolment)
    filled = [(c, k) for c, held in enumerate(members) for k, rows in enumerate(held) if rows]
    chosen = np.array([filled[i % len(filled)] for i in range(lanes)], np.int32)
    work = Work(chosen[:, 0], chosen[:, 1], np.ones(lanes, np.float32))
    local = config.local
    batch = schedule.batches(work, members, 1, local.steps, local.batch, *prepared.pack, 0, GROUP)
    return prepared, experiment.start(prepared, enrolment), work, batch


def by_lanes(counts: tuple[int, ...], console: Console) -> list[dict]:
    """Seconds a lane and step, also against the fewest lanes timed just before and after, and temporary memory."""
    ready = {lanes: compiled_round(lanes) for lanes in counts}
    found = []
    for lanes, (once, sizes) in ready.items():
        turns = []
        for _ in range(3 if lanes <= 512 else 1):
            before, here, after = (act() for act in (ready[counts[0]][0], once, ready[counts[0]][0]))
            turns.append((here, 2 * here / (before + after)))
        seconds, ratio = np.median(turns, axis=0).tolist()
        found.append({"lanes": lanes, "seconds_a_lane_step": seconds, "against_fewest": ratio, **sizes})
        console.print(found[-1])
    return found


def compiled_round(lanes: int) -> tuple[Callable[[], float], dict[str, int]]:
    """What runs a round and returns its seconds a lane and step, and the round's bytes."""
    prepared, state, work, batch = federation(lanes)
    key, params = jax.random.key(0), prepared.model.params
    compiled = prepared.round.lower(state, params, work, batch, key).compile()

    def once() -> float:
        nonlocal state
        times = max(1, 16 // lanes)  # a second or more, however few lanes there are
        before = clock.perf_counter()
        for _ in range(times):
            state, _ = jax.block_until_ready(compiled(state, params, work, batch, key))
        return (clock.perf_counter() - before) / (times * lanes * prepared.config.local.steps)

    temporary = compiled.memory_analysis().temp_size_in_bytes
    return once, {"temporary_bytes": temporary, "batch_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(batch))}


def by_rounds(count: int, console: Console) -> dict:
    """Resident memory after ten rounds and after all, and the programs compiled."""
    prepared, state, work, batch = federation(GROUP)
    after = {}
    for t in range(1, count + 1):
        state, info = prepared.round(state, prepared.model.params, work, batch, jax.random.key(0))
        jax.block_until_ready(info)
        if t in (10, count):
            after[t] = resident()
    found = {"rounds": count, "bytes_after_10": after[10], "bytes_after_all": after[count],
             "programs": prepared.round._cache_size()}  # fmt: skip
    console.print(found)
    return found


def by_centroids(sizes: tuple[tuple[int, int], ...], console: Console, width: int = 576) -> list[dict]:
    """K-Means with one start of so many local centres into so many clusters, and routing all of them."""
    found = []
    for count, clusters in sizes:
        rng = np.random.default_rng(0)
        tasks = rng.normal(size=(clusters, width)).astype(np.float32)
        noise = rng.standard_normal((count, width), np.float32)
        x = jnp.asarray(tasks[rng.integers(0, clusters, count)] + np.float32(0.3) * noise)
        fits: list[kmeans.KMeans] = []

        def fit_once(x=x, clusters=clusters, fits=fits):
            fits.append(kmeans.fit(jax.random.key(0), x, clusters, restarts=1))
            return fits[-1]

        seconds = timed(fit_once, 1)
        routed = timed(lambda x=x, fits=fits: kmeans.nearest(x, fits[0].centers)[0], 1)
        found.append({"centroids": count, "clusters": clusters, "kmeans_seconds": seconds, "routing_seconds": routed})
        console.print(found[-1])
    return found


def by_adapters(asked: tuple[str, tuple[int, ...]], console: Console, rows: int = 32, new: int = 16) -> list[dict]:
    """Seconds to answer one batch whose rows use so many adapters."""
    name, counts = asked
    model, config = load_model(name), lora.LoRAConfig()
    prompts = [list(range(1, 65))] * rows
    found = []
    for count in counts:
        fresh = lora.init(jax.random.key(0), model.config, config)
        bank = lora.concatenate(jax.tree.map(lambda leaf, n=count: jnp.repeat(leaf[None], n, axis=0), fresh))
        gates = np.asarray(lora.gates(jax.nn.one_hot(jnp.arange(rows) % count, count), config))

        def answer(bank=bank, gates=gates):
            return generate.generate(model.config, model.params, prompts, bank, gates, stop=-1, new_tokens=new)

        found.append({"adapters": count, "seconds": timed(answer)})
        console.print(found[-1])
    return found


def markdown(found: dict) -> str:
    """Tables, each beside its first row."""
    lines = [
        "# Growth",
        "",
        f"Device {found['device']}, jax {found['jax']}. After a run that compiles.",
        "",
    ]
    first = found["lanes"][0]["lanes"]
    lines += [
        f"| lanes (tiny, by eights) | ms a lane-step | against {first}, in turns | temporary memory, MB | rows, MB |",
        "|---" * 5 + "|",
    ]
    for row in found["lanes"]:
        times = f"{1e3 * row['seconds_a_lane_step']:.2f} | {row['against_fewest']:.2f}"
        sizes = f"{row['temporary_bytes'] / 1e6:.1f} | {row['batch_bytes'] / 1e6:.1f}"
        lines.append(f"| {row['lanes']} | {times} | {sizes} |")
    rounds = found["rounds"]
    lines += [
        "",
        f"{rounds['rounds']} rounds of eight lanes: {rounds['bytes_after_10'] / 1e6:.1f} MB resident after ten, "
        f"{rounds['bytes_after_all'] / 1e6:.1f} MB after all "
        f"({100 * (rounds['bytes_after_all'] / rounds['bytes_after_10'] - 1):+.2f} %); {rounds['programs']} program.",
        "",
        "| local centres (width 576) | clusters | K-Means, one start, s | routing all, s |",
        "|---|---|---|---|",
    ]
    for row in found["centroids"]:
        numbers = f"{row['kmeans_seconds']:.2f} | {row['routing_seconds']:.2f}"
        lines.append(f"| {row['centroids']:,} | {row['clusters']} | {numbers} |")
    lines += ["", "| adapters in one batch of 32 rows | seconds | against the first |", "|---|---|---|"]
    first = found["adapters"][0]["seconds"]
    for row in found["adapters"]:
        lines.append(f"| {row['adapters']} | {row['seconds']:.2f} | {row['seconds'] / first:.2f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    arguments = parse(Growth, prog="python -m experiments.growth")
    sys.exit(guarded(lambda: main(arguments)))
