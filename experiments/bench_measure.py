"""The phases of `bench_phases.py` timed in turns, ours, theirs, ours ...; and what the machine can do beside them."""

from __future__ import annotations

import tempfile
import time as clock
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import torch
from rich.console import Console

from experiments import bench_phases as phases
from experiments.bench_phases import LANES, Load, Peer, Phase
from experiments.rates import best_rate, matrix_rate, matrix_rows
from experiments.torch_baseline import flow
from fedrouter_jax import at_once, embed, experiment, peft_io
from fedrouter_jax.data import packing, tokens
from fedrouter_jax.errors import UserError
from fedrouter_jax.experiment import Prepared
from fedrouter_jax.models import load_model
from fedrouter_jax.models.load import smollm2_path


def measure(
    data: str,
    load: Load,
    dtype: str,
    turns: int,
    best_effort: bool,
    compiled: Literal["layer", "model"],
    console: Console,
) -> dict[str, Any]:
    """Every phase's seconds on every side, and the tokens it handled.

    In float32, beside it rounded to bfloat16 on either side; or in bfloat16 alone, as on a GPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if jax.device_count() > 1 or (jax.default_backend() == "gpu") != (device == "cuda"):
        raise UserError(
            f"JAX has {jax.device_count()} device(s), {jax.default_backend()}, and PyTorch computes on {device}; the "
            "bench compares one with one of a kind: install both for it, and let them see one (CUDA_VISIBLE_DEVICES)"
        )
    model = load_model(dtype=dtype)
    config = replace(phases.setting(data, load), dtype=dtype)
    prepared = experiment.prepare(config, model)
    mine = {"ours": prepared}
    halves = torch_bfloat16(device)
    if not halves:
        console.print("PyTorch multiplies in bfloat16 by far slower than in float32 here: its model is left as it is")
    if dtype == "float32":
        mine["ours, mixed"] = experiment.prepare(replace(config, dtype="mixed"))
    with tempfile.TemporaryDirectory() as folder:
        peft_io.write_adapter(Path(folder), phases.fresh(prepared), config.lora, model.base_name)
        console.print("loading the model in torch")
        theirs = flow.load(smollm2_path(), Path(folder), device, getattr(torch, dtype))
        peers = [Peer("published", flow.PUBLISHED, theirs)]
        if best_effort:
            # On a GPU as many rows at once as we take; on two cores larger batches gain nothing.
            prompts = [prepared.test[row].prompt for row in phases.asked(prepared, load)]
            rows = at_once.rows(config, model, prompts) if device == "cuda" else flow.BEST_EFFORT.rows
            best = replace(flow.BEST_EFFORT, rows=rows, compiled=compiled)
            peers.append(Peer("best effort", best, theirs))
            if dtype == "float32" and halves:
                half = flow.load(smollm2_path(), Path(folder), device, torch.bfloat16)
                peers.append(Peer("best effort, bf16", best, half))
    measured = {
        name: timed(name, phase, turns, dtype, console)
        for name, phase in (
            ("embed", phases.embedding(mine, peers, load)),
            ("K-Means", phases.clustering(load)),
            ("train a round", phases.training(mine, peers)),
            ("route", phases.nearest(load, device)),
        )
    }
    # Only now, so that the first call above is the one that compiles training.
    adapters = phases.trained(prepared, load, console)
    for name, new in (("read prompts", 1), ("routed generation", load.new)):
        measured[name] = timed(name, phases.generation(mine, adapters, peers, load, new), turns, dtype, console)
    blocks = sum(leaf.size for leaf in jax.tree.leaves(model.params["blocks"]))
    return {
        "model": model.base_name,
        "data": Path(data).name,
        "dtype": dtype,
        "device": jax.devices()[0].device_kind,
        "torch": torch.__version__,
        "jax": jax.__version__,
        "threads": torch.get_num_threads(),
        "compiled": compiled if best_effort and device == "cuda" else "nothing",
        "load": asdict(load),
        "lanes": LANES,
        "slots": len(prepared.partition.tasks),
        "flops_a_token": 4 * blocks,
        "useful_share": useful_share(prepared, load),
        "matrix_rows": matrix_rows(),
        "products": {
            f"{side}, {dtype}": rate(dtype)
            for side, rate in (("ours", matrix_rate), ("torch", partial(torch_matrix_rate, device)))
            for dtype in ("float32", "bfloat16")
            if side == "ours" or dtype == "float32" or halves
        },
        "phases": measured,
    }


def timed(name: str, phase: Phase, turns: int, dtype: str, console: Console) -> dict[str, Any]:
    """Seconds of every side's first call, which compiles and is checked, and of as many turns as asked."""
    seconds: dict[str, list[float]] = {side: [] for side in phase.sides}
    first, results, matrix = {}, {}, []
    for side, action in phase.sides.items():
        results[side], first[side] = clocked(action)
        console.print(f"{name}, {side}: {first[side]:.2f} s, the first call")
    useful = phase.useful(results)
    for _ in range(turns):
        matrix.append(matrix_rate(dtype))  # in every turn, for what a shared machine gives changes within minutes
        for side, action in phase.sides.items():
            seconds[side].append(clocked(action)[1])
            console.print(f"{name}, {side}: {seconds[side][-1]:.2f} s")
    return {"useful": useful, "unit": phase.unit, "seconds": seconds, "first": first, "matrix_rate": matrix}


def clocked(action: Callable[[], Any]) -> tuple[Any, float]:
    """What an action returns, and its seconds."""
    before = clock.perf_counter()
    found = action()
    return found, clock.perf_counter() - before


def torch_matrix_rate(device: str, dtype: str, rows: int | None = None) -> float:
    """The same of PyTorch."""
    rows = rows or matrix_rows()
    a = torch.randn((rows, rows), device=device).to(getattr(torch, dtype))
    return best_rate(lambda: (a @ a)[0, 0].item(), rows=rows)  # a number of it, for which a GPU is waited for


def torch_bfloat16(device: str) -> bool:
    """Whether PyTorch multiplies in bfloat16 at an eighth of the rate of float32 or more; without AVX-512 at a 400th.

    Told by small products: of those that others are measured by, one took a minute.
    """
    plain, half = (torch_matrix_rate(device, dtype, 256) for dtype in ("float32", "bfloat16"))
    return half > plain / 8


def useful_share(prepared: Prepared, load: Load) -> dict[str, float]:
    """The share of useful tokens in what the model sees here: embedding, a round, reading prompts."""

    most_at_once = at_once.packs(prepared.config)

    def packed(turns: list[list[int]], time: int, most: int) -> int:
        packs = [len(packing.first_fit([(length, 0) for length in here], time, 0, most)) for here in turns]
        together = packing.packs_of_a_turn(packs[:1], most_at_once)
        return time * together * sum(-(-count // together) for count in packs)

    ids = tokens.encode_texts(
        prepared.model.tokenizer, phases.texts_of(prepared, load), prepared.config.data.max_length
    )
    texts, most = [len(text) for text in ids], embed.TEXTS_PER_PACK
    asked = [prepared.test[row].prompt for row in phases.asked(prepared, load)]
    rows, prompts = at_once.rows(prepared.config, prepared.model, asked), sorted(map(len, asked), reverse=True)
    # As `generate` reads them where all answers end alike: as many as there are rows, then a quarter at a time.
    turns = [prompts[:rows], *(prompts[i : i + rows // 4] for i in range(rows, len(prompts), rows // 4))]
    time = packing.pack_length(prompts[0])
    held = [[rows] for rows in prepared.train]
    work, batch = experiment.round_inputs(prepared, held, 1)
    segments = np.asarray(batch.rows.packs.segments)
    visited = (-(-batch.count // prepared.packs) * prepared.packs).sum() * segments.shape[-1]
    return {
        "embed": sum(texts) / packed([texts], packing.fitted_length(texts, most, most_at_once), most),
        "train": float((segments > 0).sum() / visited),
        "read": sum(prompts) / packed(turns, time, rows),
    }
