"""FedRouter against FedIT in minutes: `make demo`.

Both run the `demo` preset: SmolLM2-135M, four clients that hold two of four synthetic tasks each, equal optimiser
steps and equal bytes a round. `--seeds N` repeats it over N seeds; a run that is finished is not run again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from experiments.sweep import at_least_one, sweep
from fedrouter_jax import report
from fedrouter_jax.presets import demo
from fedrouter_jax.terminal import guarded, parse


@dataclass(frozen=True)
class Demo:
    """FedRouter against FedIT on synthetic tasks."""

    seeds: int = 1
    """Seeds 0 .. N-1."""
    out: Path = Path("runs/demo")
    """Folder for the run directories and the report."""


def main(options: Demo) -> None:
    """Run what is not finished yet, then compare."""
    at_least_one(seeds=options.seeds)
    console = Console()
    pairs = [(strategy, seed) for seed in range(options.seeds) for strategy in ("fedit", "fedrouter")]
    configs = {f"{strategy}-{seed}": replace(demo(), strategy=strategy, seed=seed) for strategy, seed in pairs}
    folders = sweep(configs, options.out, console)
    report.write(folders, options.out)
    report.show(folders, console)
    last = folders[-1]
    print(f"\nruns: {', '.join(map(str, folders))}\nreport: {options.out}/report.md and {options.out}/plots/")
    print(f"adapters (PEFT): {last}/adapters, router: {last}/router")
    print(f'try: .venv/bin/fedrouter route {last} "Are these two questions the same? ..."')  # never wrapped


if __name__ == "__main__":
    arguments = parse(Demo, prog="python -m experiments.demo")
    sys.exit(guarded(lambda: main(arguments)))
