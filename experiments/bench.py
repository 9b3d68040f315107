"""How fast: this project and the same flow in PyTorch and PEFT, phase by phase, side by side in one run.

    python -m experiments.bench --quick               a few minutes on two cores, synthetic rows
    python -m experiments.bench --data FLAN4          the full table on real rows
    python -m experiments.bench --data FLAN4 --gpu    the same with loads that keep a GPU busy
    python -m experiments.bench --smoke               hardly any rows, to see that everything works

The first call of each side compiles, and what it returns (embeddings, losses from the same adapter on the same rows,
answers) must be what the other sides return. Then each phase is timed in turns, ours, theirs, ours ...; figures are
medians, ratios are of useful tokens (no padding) a second. Against the machine: four floating-point operations a
parameter and useful token of training (two of reading), over the rate of a large matrix product measured beside them in
the same turn.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from experiments.measurements import keep
from fedrouter_jax.errors import UserError
from fedrouter_jax.terminal import guarded, parse


@dataclass(frozen=True)
class Bench:
    """Phases of a federation here and in PyTorch, timed in turns."""

    data: str = "synthetic"
    """Rows: the embedded synthetic ones, or a folder of real ones."""
    quick: bool = False
    """Fewer rows and one turn: minutes on two cores."""
    gpu: bool = False
    """More rows, steps of 16 and more prompts, all in bfloat16, both sides on a GPU; see `experiments.limit`, too."""
    smoke: bool = False
    """Hardly any rows and one turn: only to see that it works. Its figures mean nothing."""
    turns: int = 3
    """How often each phase is timed on either side."""
    best_effort: bool = True
    """Time the tuned PyTorch flow too, not only the published one."""
    compiled: Literal["layer", "model"] = "layer"
    """What torch.compile takes of the tuned PyTorch flow, in training on a GPU: one layer that all share, in under a
    minute, or the whole model, which took it five on an H200, and rounds a quarter less."""
    out: Path | None = None
    """Folder for bench.json, bench.md and bench.png; by default docs/bench, or runs/bench with --quick or --smoke."""


def main(options: Bench) -> None:
    """Check, time, write."""
    if options.turns < 1:
        raise UserError(f"--turns is {options.turns}; it must be at least 1")
    try:
        from experiments.bench_measure import measure
        from experiments.bench_phases import Load
    except ModuleNotFoundError as error:
        raise UserError(
            f"the bench compares with PyTorch and needs {error.name!r}: pip install -r requirements-dev.txt"
        ) from error
    small = options.quick or options.smoke
    jax.config.update("jax_compilation_cache_dir", None)  # so that first calls compile, whatever ran before
    load = Load(1024, 8, 16, 96, 48, 64, 3, rows=300) if options.gpu else Load(96, 2, 2, 96, 48, 64, 6)
    if small:
        load = Load(4, 1, 1, 8, 4, 8, 1) if options.smoke else Load(16, 1, 2, 24, 16, 64, 3)
    turns = 1 if small else options.turns
    dtype = "bfloat16" if options.gpu else "float32"
    found = measure(options.data, load, dtype, turns, options.best_effort, options.compiled, Console(stderr=True))
    out = keep("bench", found, markdown(found), options.out, small)
    figure(found).savefig(out / "bench.png", dpi=100, bbox_inches="tight")


def rates(phase: dict) -> dict[str, float]:
    """Useful tokens (or rows) a second of each side, medians."""
    return {side: useful(phase, side) / float(np.median(spent)) for side, spent in phase["seconds"].items()}


def useful(phase: dict, side: str) -> int:
    """Useful tokens or rows of a side; answers of rounded weights may end elsewhere."""
    return phase["useful"][side if side in phase["useful"] else ""]


def markdown(found: dict) -> str:
    """The table: rates of each side, ratios of ours over theirs."""
    load, dtype = found["load"], found.get("dtype", "float32")
    turns = len(next(iter(found["phases"].values()))["seconds"]["ours"])
    model = ", the whole model compiled in best effort's training" if found.get("compiled") == "model" else ""
    lines = [
        "# Speed",
        "",
        f"{found['model']}, {dtype} where nothing else is said, rows of {found['data']}; device {found['device']}, "
        f"jax {found['jax']}, torch {found['torch']} with {found['threads']} threads{model}. Median of {turns} "
        "turn(s), after a first call, which compiles (with no program kept from earlier). "
        f"{load['texts']} texts embedded; {found['lanes']} lanes x {load['steps']} steps x {load['batch']} rows; "
        f"{load['prompts']} prompts of {found['slots']} adapters, trained for {load['rounds']} rounds, at most "
        f"{load['new']} new tokens; K-Means of {load['clients']} clients.",
        "",
        "| phase | ours, a second | first call, s | published flow | ratio | best effort | ratio | best effort, bf16 | "
        "ratio |",
        "|---" * 9 + "|",
    ]
    for name, phase in found["phases"].items():
        rate = rates(phase)
        plain = "published" if "published" in rate else next((side for side in rate if not side.startswith("ours")), "")
        for side in [side for side in rate if side.startswith("ours")]:
            label = name + side.removeprefix("ours")
            cells = [f"{label} ({phase['unit']})", f"{rate[side]:,.0f}", f"{phase['first'][side]:.1f}"]
            for other in (plain, "best effort", "best effort, bf16"):
                cells += [f"{rate[other]:,.0f}", f"**{rate[side] / rate[other]:.2f}**"] if other in rate else ["", ""]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        whole(found["phases"], side) for side in found["phases"]["train a round"]["seconds"] if side[:4] == "ours"
    ]
    limit = {name: against_matrix(found, name) for name in ("train a round", "embed", "read prompts")}
    reached, share_reached, matrix = limit["train a round"]
    share = {phase: f"{100 * value:.0f} %" for phase, value in found["useful_share"].items()}
    product = {name: f"{rate / 1e9:,.0f}" for name, rate in found["products"].items()}
    lines += [
        "",
        "Ratios are of useful work a second, ours over theirs. K-Means is against scikit-learn, routing against "
        "`torch.cdist`. `embed, refined` is the embedding that FedRouter uses here by default, of the first sixth of "
        "the layers, against theirs of all: not the same computation, but the same purpose. `mixed` is `--dtype "
        "mixed`: matrices and what they are multiplied with rounded to bfloat16, all else in float32; `bf16` is their "
        f"model in bfloat16, with adapters in float32. Training in {dtype} reaches "
        f"{reached / 1e9:,.0f} GFLOP/s of useful work (4 a parameter of the blocks and token), "
        f"{100 * share_reached:.0f} % of a large matrix product's {matrix / 1e9:,.0f}, measured in the same turns; "
        f"embedding and reading prompts (2 a parameter) reach {100 * limit['embed'][1]:.0f} and "
        f"{100 * limit['read prompts'][1]:.0f} % of theirs. Useful tokens, in per cent of those computed: "
        f"{share['embed']} embedding, {share['train']} training, {share['read']} reading prompts. A product of two "
        f"matrices of {found.get('matrix_rows', 2048):,} reaches {product['ours, float32']} GFLOP/s here in float32 "
        f"and {product['ours, bfloat16']} in bfloat16, in PyTorch {product['torch, float32']} and "
        f"{product.get('torch, bfloat16', 'so few that its model was not timed in it')}.",
        "",
        "![rates](bench.png)",
        "",
    ]
    return "\n".join(lines)


def against_matrix(found: dict, name: str) -> tuple[float, float, float]:
    """Our useful FLOP/s in a phase, its share of the matrix rate of the same turn, and that rate; medians of turns."""
    phase = found["phases"][name]
    flops = found["flops_a_token"] if name == "train a round" else found["flops_a_token"] / 2
    reached = useful(phase, "ours") * flops / np.array(phase["seconds"]["ours"])
    matrix = np.array(phase["matrix_rate"])
    return float(np.median(reached)), float(np.median(reached / matrix)), float(np.median(matrix))


def whole(phases: dict, ours: str, rounds: int = 6) -> str:
    """The row of a federation: one embedding, one K-Means, some rounds, one evaluation, from the medians above."""
    medians = {
        name: {side: float(np.median(s)) for side, s in phase["seconds"].items()} for name, phase in phases.items()
    }

    def seconds(side: str, clusterer: str) -> float:
        once = medians["embed"][side] + medians["K-Means"][clusterer] + medians["routed generation"][side]
        return once + rounds * medians["train a round"][side]

    mine = seconds(ours, "ours")
    cells = [f"all of it{ours.removeprefix('ours')}, {rounds} rounds (seconds)", f"{mine:,.0f}", ""]
    for side in ("published", "best effort", "best effort, bf16"):
        if side in medians["embed"]:
            theirs = seconds(side, "scikit-learn")
            cells += [f"{theirs:,.0f}", f"**{theirs / mine:.2f}**"]
        else:
            cells += ["", ""]
    return f"| {' | '.join(cells)} |"


def figure(found: dict) -> Figure:
    """A panel a phase: useful work a second of each side; dots are the turns."""
    phases = found["phases"]
    lines = -(-len(phases) // 3)
    drawn = Figure((12, 0.5 + 2.4 * lines))
    panels = drawn.subplots(lines, 3, squeeze=False).ravel()
    for axes, (name, phase) in zip(panels, phases.items(), strict=False):
        rate = rates(phase)
        colours = ["#d55e00" if side.startswith("ours") else "#0072b2" for side in rate]
        axes.barh(list(rate), list(rate.values()), color=colours)
        for place, (side, spent) in enumerate(phase["seconds"].items()):
            turns = [useful(phase, side) / s for s in spent]
            axes.plot(turns, [place] * len(turns), "k.", markersize=4)
            axes.annotate(
                f"{rate[side]:,.0f}", (max(turns), place), (6, 0), textcoords="offset points", va="center",
                fontsize="small",
            )  # fmt: skip
        axes.set(title=f"{name}: {phase['unit']} a second", xticks=[])
        axes.margins(x=0.18)
        axes.invert_yaxis()
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    for axes in panels[len(phases) :]:
        axes.remove()
    device, threads, dtype = found["device"], found["threads"], found.get("dtype", "float32")
    drawn.suptitle(
        f"{device}, {threads} threads, {found['model'].rpartition('/')[2]} in {dtype} where nothing else is said\n"
        "useful work a second, median; dots: turns; orange: ours, blue: PyTorch (K-Means: scikit-learn)",
        fontsize="medium",
    )
    drawn.tight_layout()
    return drawn


if __name__ == "__main__":
    arguments = parse(Bench, prog="python -m experiments.bench")
    sys.exit(guarded(lambda: main(arguments)))
