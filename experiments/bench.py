"""How fast: this project and the same flow in PyTorch and PEFT, phase by phase, side by side in one run.

    python -m experiments.bench --quick               a few minutes on two cores, synthetic rows
    python -m experiments.bench --data FLAN4          the full table on real rows
    python -m experiments.bench --smoke               the tiny model, to see that everything works

First both sides must have the same losses from the same adapter on the same rows. Then each phase is timed in turns,
ours, theirs, ours ..., after a run of each that compiles; figures are medians, ratios are of useful tokens (no padding)
a second. Against the machine: four floating-point operations a parameter and useful token of training, over the rate of
a large matrix product measured in the same run.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time as clock
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from fedrouter_jax import experiment, generate, kmeans, lora, peft_io, runs
from fedrouter_jax.cli import guarded, keep_programs
from fedrouter_jax.config import Config
from fedrouter_jax.data import schedule, tokens
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import load_model
from fedrouter_jax.models.load import smollm2_path
from fedrouter_jax.presets import demo

LANES, SLOTS = 8, 4
POINTS, WIDTH = 96, 576  # K-Means: rows of a client


@dataclass(frozen=True)
class Bench:
    """Phases of a federation here and in PyTorch, timed in turns."""

    data: str = "synthetic"
    """Rows: the embedded synthetic ones, or a folder of real ones."""
    quick: bool = False
    """Fewer rows and one turn: minutes on two cores."""
    smoke: bool = False
    """Hardly any rows and one turn: only to see that it works. Its figures mean nothing."""
    turns: int = 3
    """How often each phase is timed on either side."""
    best_effort: bool = True
    """Time the tuned PyTorch flow too, not only the published one."""
    out: Path | None = None
    """Folder for bench.json, bench.md and bench.png; by default docs/bench, or runs/bench with --quick or --smoke."""


@dataclass(frozen=True)
class Load:
    """How much work a phase is."""

    texts: int  # to embed
    steps: int  # of each lane
    batch: int  # rows of a step
    prompts: int  # to answer
    new: int  # tokens of an answer
    clients: int  # of K-Means


def main(options: Bench) -> None:
    """Check, time, write."""
    keep_programs()
    if options.turns < 1:
        raise UserError(f"--turns is {options.turns}; it must be at least 1")
    small = options.quick or options.smoke
    load = Load(4, 1, 1, 8, 4, 8) if options.smoke else Load(32, 1, 2, 16, 16, 64) if options.quick else Load(
        128, 4, 2, 64, 32, 64
    )  # fmt: skip
    found = measure(replace(options, turns=1 if small else options.turns), load, Console(stderr=True))
    out = options.out or Path("runs/bench" if small else "docs/bench")
    runs.write(out / "bench.json", json.dumps(found, indent=1) + "\n")
    runs.write(out / "bench.md", markdown(found))
    figure(found).savefig(out / "bench.png", dpi=100, bbox_inches="tight")
    Console().print(Markdown((out / "bench.md").read_text(encoding="utf-8")))


def measure(options: Bench, load: Load, console: Console) -> dict[str, Any]:
    """Every phase's seconds on every side, and the tokens it handled."""
    import torch

    from experiments.torch_baseline import flow

    model = load_model()
    config = setting(options, load)
    prepared = experiment.prepare(config, model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        fresh = lora.init(jax.random.key(0), adapter_modules(prepared), model.config.layers, config.lora.rank)
        peft_io.write_adapter(Path(folder), fresh, config.lora, model.base_name)
        console.print("loading the model in torch")
        theirs = flow.load(smollm2_path(), Path(folder), device, torch.float32)
    flows = [flow.PUBLISHED, *([flow.BEST_EFFORT] if options.best_effort else [])]
    phases = {
        "embed": embedding(prepared, theirs, flows, load, flow),
        "train a round": training(prepared, theirs, flows, flow),
        "routed generation": generation(prepared, theirs, flows, load, flow),
        "K-Means": clustering(load),
    }
    measured = {}
    for name, (useful, sides) in phases.items():
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(options.turns + 1):
            for side, action in sides.items():
                before = clock.perf_counter()
                action()
                spent = clock.perf_counter() - before
                console.print(f"{name}, {side}: {spent:.2f} s{'' if turn else ' (first run, not counted)'}")
                if turn:
                    seconds[side].append(spent)
        measured[name] = {"useful": useful, "unit": "rows" if name == "K-Means" else "tokens", "seconds": seconds}
    blocks = sum(leaf.size for leaf in jax.tree.leaves(model.params["blocks"]))
    return {
        "model": model.base_name,
        "data": Path(options.data).name,
        "device": jax.devices()[0].device_kind,
        "torch": torch.__version__,
        "jax": jax.__version__,
        "threads": torch.get_num_threads(),
        "load": load.__dict__,
        "flops_a_token": 4 * blocks,
        "matrix_rate": matrix_rate(),
        "packing": packing_share(prepared),
        "phases": measured,
    }


def setting(options: Bench, load: Load) -> Config:
    """Eight clients that hold two tasks each; no dropout, so that both sides compute the same."""
    config = demo()
    real = options.data != "synthetic"
    data = replace(
        config.data, data=options.data, clients=LANES, test_rows=load.prompts, mix_rows=load.prompts,
        train_rows=48, max_length=320 if real else 192, max_response=48 if real else 24,
    )  # fmt: skip
    return replace(
        config,
        data=data,
        lora=replace(config.lora, dropout=0.0),
        local=replace(config.local, steps=load.steps, batch=load.batch),
        cluster=replace(config.cluster, recipe="paper"),
    )


def adapter_modules(prepared) -> dict[str, tuple[int, int]]:
    """Shapes of the modules that carry an adapter."""
    from fedrouter_jax.models import module_shapes

    shapes = module_shapes(prepared.model.config)
    return {module: shapes[module] for module in prepared.config.lora.targets}


def embedding(prepared, theirs, flows, load: Load, flow):
    """Mean states of the last layer of some texts."""
    texts = [prepared.dataset.train[i].instruction for held in prepared.partition.clients for i in held.train]
    texts = texts[:: max(1, len(texts) // load.texts)][: load.texts]
    ids = tokens.encode_texts(prepared.model.tokenizer, texts, prepared.config.data.max_length)
    pad = prepared.model.tokenizer.pad_token_id
    ours, other = experiment.embed_texts(prepared, texts), flow.embed(theirs, ids, pad, flows[-1])
    gap = float(np.abs(ours - other).max() / np.abs(other).max())
    if gap > 1e-3:
        raise UserError(f"the embeddings of both sides differ by {gap:.1e} of the largest; nothing is timed")
    sides: dict[str, Callable] = {"ours": lambda: experiment.embed_texts(prepared, texts)}
    sides |= {each.name: lambda each=each: flow.embed(theirs, ids, pad, each) for each in flows}
    return sum(map(len, ids)), sides


def training(prepared, theirs, flows, flow):
    """A round of eight lanes on four slots, two lanes to a slot."""
    import torch

    config, pad = prepared.config, prepared.model.tokenizer.pad_token_id
    labels = [np.arange(len(held)) % 2 for held in prepared.train]
    table = jnp.asarray([[c % SLOTS, (c + 1) % SLOTS] for c in range(LANES)], jnp.int32)
    width = prepared.model.config.width
    router = experiment.routing.Router(jnp.zeros((SLOTS, width)), jnp.zeros(width), jnp.ones(width), jnp.asarray(False))
    padded = np.full((LANES, max(map(len, labels))), -1, np.int32)
    for row, found in zip(padded, labels, strict=True):
        row[: len(found)] = found
    enrolment = experiment.routing.Enrolment(table, SLOTS, router, padded, {})
    members = experiment.members(prepared, enrolment)
    work, batch = experiment.round_inputs(prepared, members, 1)
    steps, size = config.local.steps, config.local.batch
    lanes = []
    for c, k, weight in zip(work.client, work.cluster, work.weight, strict=True):
        rows = members[c][k]
        order = schedule.draw(len(rows), steps * size, np.random.default_rng([config.seed, 1, int(c), int(k)]))
        drawn = [[rows[i] for i in order[step * size :][:size]] for step in range(steps)]
        lanes.append((int(table[c, k]), float(weight), drawn))
    given = {name: leaf.detach().clone() for name, leaf in flow.get_peft_model_state_dict(theirs).items()}
    rate = float(experiment.client.learning_rate(config.local, config.rounds.rounds, 1))

    def ours():
        state = experiment.start(prepared, enrolment)
        return experiment.train_round(prepared, state, work, batch)[1]

    compiled: dict[str, Any] = {}

    def other(each):
        if each.name not in compiled:
            # On a CPU compiling the backward pass takes longer than this whole bench.
            here = each.compiled and theirs.device.type == "cuda"
            compiled[each.name] = torch.compile(theirs, dynamic=True) if here else theirs
        return flow.train_round(compiled[each.name], [given] * SLOTS, lanes, rate, pad, each)[1]

    mine = np.array([lane["loss"] for lane in ours()["lanes"]])
    gap = float(np.abs(mine - np.array(other(flows[0]))).max())
    if gap > 1e-2:
        raise UserError(f"the losses of both sides differ by {gap:.1e}; nothing is timed")
    useful = sum(row.length for _, _, drawn in lanes for rows in drawn for row in rows)
    return useful, {"ours": ours} | {each.name: lambda each=each: other(each) for each in flows}


def generation(prepared, theirs, flows, load: Load, flow):
    """Answers of four adapters to prompts that go to them in turn. Useful are the tokens read and written."""
    config, tokenizer = prepared.config, prepared.model.tokenizer
    prompts = [row.prompt for row in prepared.test.values()][: load.prompts]
    slots = [i % SLOTS for i in range(len(prompts))]
    fresh = lora.init(jax.random.key(0), adapter_modules(prepared), prepared.model.config.layers, config.lora.rank)
    names = sorted(fresh.b)
    adapters = [
        fresh._replace(b={m: 0.02 * jax.random.normal(jax.random.key(10 * s + names.index(m)), fresh.b[m].shape)
                          for m in names})
        for s in range(SLOTS)
    ]  # fmt: skip
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    gates = np.asarray(lora.gates(jax.nn.one_hot(jnp.asarray(slots), SLOTS), config.lora))
    theirs_bank = [in_torch(adapter, theirs.device) for adapter in adapters]

    def ours():
        return generate.generate(
            prepared.model.config, prepared.model.params, prompts, lora.concatenate(stacked), gates,
            stop=tokenizer.eos_token_id, new_tokens=load.new, rows_at_once=config.compute.rows_at_once,
        )  # fmt: skip

    def other(each):
        return flow.generate(
            theirs, theirs_bank, slots, prompts, tokenizer.pad_token_id, tokenizer.eos_token_id, load.new, each
        )

    found, expected = ours(), other(flows[-1])
    same = np.mean([a == b for a, b in zip(found, expected, strict=True)])
    if same < 0.75:  # greedy answers of equal models part ways where two tokens are as likely
        raise UserError(f"only {same:.0%} of the answers of both sides agree; nothing is timed")
    useful = sum(map(len, prompts)) + sum(len(answer) + 1 for answer in expected)
    return useful, {"ours": ours} | {each.name: lambda each=each: other(each) for each in flows}


def in_torch(adapter, device) -> dict:
    """An adapter as a PEFT state dict."""
    import torch

    return {
        peft_io.tensor_name(layer, module, side): torch.tensor(np.asarray(stacked[layer]).T.copy(), device=device)
        for side, leaves in (("A", adapter.a), ("B", adapter.b))
        for module, stacked in leaves.items()
        for layer in range(stacked.shape[0])
    }


def clustering(load: Load):
    """K-Means with ten starts of every client's rows: all clients in one program, against one after the other."""
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(load.clients, SLOTS, WIDTH))
    rows = centres[:, rng.integers(0, SLOTS, POINTS)] + 0.5 * rng.normal(size=(load.clients, POINTS, WIDTH))
    rows = rows.astype(np.float32)
    keys = jax.random.split(jax.random.key(0), load.clients)
    fit = jax.jit(jax.vmap(lambda key, x: kmeans.fit(key, x, SLOTS, restarts=10).inertia))

    def ours():
        return np.asarray(fit(keys, rows))

    def theirs():
        return np.array([KMeans(SLOTS, n_init=10, random_state=0).fit(x).inertia_ for x in rows])

    if not np.allclose(ours(), theirs(), rtol=1e-2):
        raise UserError("the K-Means of both sides reach different inertias; nothing is timed")
    return load.clients * POINTS, {"ours": ours, "scikit-learn": theirs}


def matrix_rate(size: int = 2048, times: int = 5) -> float:
    """FLOP/s of a large matrix product in the type that training uses; the best of several."""
    product = jax.jit(lambda a, b: a @ b)
    a = b = jnp.ones((size, size))
    product(a, b).block_until_ready()
    best = np.inf
    for _ in range(times):
        before = clock.perf_counter()
        product(a, b).block_until_ready()
        best = min(best, clock.perf_counter() - before)
    return 2 * size**3 / best


def packing_share(prepared) -> float:
    """The share of useful tokens in the packs that a round visits."""
    held = [[rows] for rows in prepared.train]
    work, batch = experiment.round_inputs(prepared, held, 1)
    segments = np.asarray(batch.rows.packs.segments)
    visited = batch.count.sum() * segments.shape[-1]
    return float((segments > 0).sum() / visited)


def rates(phase: dict) -> dict[str, float]:
    """Useful tokens (or rows) a second of each side, medians."""
    return {side: phase["useful"] / float(np.median(spent)) for side, spent in phase["seconds"].items()}


def markdown(found: dict) -> str:
    """The table: rates of each side, ratios of ours over theirs."""
    load = found["load"]
    turns = len(next(iter(found["phases"].values()))["seconds"]["ours"])
    lines = [
        "# Speed",
        "",
        f"{found['model']}, float32, rows of {found['data']}; device {found['device']}, jax {found['jax']}, torch "
        f"{found['torch']} with {found['threads']} threads. Median of {turns} turn(s), after one that compiles. "
        f"{load['texts']} texts embedded; {LANES} lanes x {load['steps']} steps x {load['batch']} rows; "
        f"{load['prompts']} prompts of {SLOTS} adapters, at most {load['new']} new tokens; K-Means of "
        f"{load['clients']} clients.",
        "",
        "| phase | ours, a second | published flow | ratio | best effort | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, phase in found["phases"].items():
        rate = rates(phase)
        cells = [f"{name} ({phase['unit']})", f"{rate['ours']:,.0f}"]
        for side in ("published", "best effort"):
            side = "scikit-learn" if name == "K-Means" and side == "published" else side
            cells += [f"{rate[side]:,.0f}", f"**{rate['ours'] / rate[side]:.2f}**"] if side in rate else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    reached = rates(found["phases"]["train a round"])["ours"] * found["flops_a_token"]
    lines += [
        "",
        f"Training reaches {reached / 1e9:,.0f} GFLOP/s of useful work (4 a parameter of the blocks and token), "
        f"{100 * reached / found['matrix_rate']:.0f} % of a large matrix product's {found['matrix_rate'] / 1e9:,.0f} "
        f"here. Of the tokens in the packs of a round {100 * found['packing']:.0f} % are useful. K-Means is against "
        "scikit-learn.",
        "",
        "![rates](bench.png)",
        "",
    ]
    return "\n".join(lines)


def figure(found: dict) -> Figure:
    """A panel a phase: useful work a second of each side."""
    drawn = Figure((3.2 * len(found["phases"]), 3))
    for axes, (name, phase) in zip(drawn.subplots(1, len(found["phases"])), found["phases"].items(), strict=True):
        rate = rates(phase)
        axes.bar(list(rate), list(rate.values()), color=["#d55e00", *["#0072b2"] * (len(rate) - 1)])
        for place, (side, spent) in enumerate(phase["seconds"].items()):
            axes.plot([place] * len(spent), [phase["useful"] / s for s in spent], "k.", markersize=4)
            del side
        axes.set(title=name, ylabel=f"{phase['unit']} a second")
        axes.tick_params(axis="x", labelrotation=20)
    drawn.tight_layout()
    return drawn


if __name__ == "__main__":
    arguments = tyro.cli(Bench, prog="python -m experiments.bench")
    sys.exit(guarded(lambda: main(arguments)))
