"""What a frozen base in fewer bits costs: bytes, loss on real answers, ROUGE.

    python -m experiments.precision --data ../shared/data/flan4      minutes on two cores
    python -m experiments.precision --smoke                          the tiny model on synthetic rows

No training: the base model as it came reads and answers test rows of all tasks. What a federation on such a base
reaches is the study `precision` (`experiments/studies.py`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from experiments.measurements import keep
from experiments.sweep import at_least_one
from fedrouter_jax import experiment, generate, likelihood, rouge
from fedrouter_jax.config import Config
from fedrouter_jax.memory import nbytes
from fedrouter_jax.models import load_model
from fedrouter_jax.presets import flan4_cpu, smoke
from fedrouter_jax.terminal import guarded, parse

# Name: the type of computation, and how kernels are stored.
PRECISIONS = {
    "float32": ("float32", "none"),
    "mixed": ("mixed", "none"),
    "bfloat16": ("bfloat16", "none"),
    "int8": ("float32", "int8"),
    "nf4": ("float32", "nf4"),
}


@dataclass(frozen=True)
class Precision:
    """Bytes, loss and ROUGE of the base model in several precisions."""

    data: str = "flan4"
    """Folder of the real rows."""
    rows: int = 64
    """Test rows, of all tasks."""
    smoke: bool = False
    """The tiny random model on synthetic rows."""
    out: Path | None = None
    """Folder for precision.json and precision.md; by default docs/bench, or runs/bench with --smoke."""


def main(options: Precision) -> None:
    """Measure, write, show."""
    at_least_one(rows=options.rows)
    config = smoke() if options.smoke else flan4_cpu("dual")
    data = replace(config.data, test_rows=options.rows, mix_rows=options.rows)
    config = replace(config, data=data if options.smoke else replace(data, data=options.data))
    console, found = Console(stderr=True), {}
    for name, (dtype, quantise) in PRECISIONS.items():
        rows, found[name] = measure(replace(config, dtype=dtype, quantise=quantise))
        console.print(name, found[name])
        jax.clear_caches()
    made = {"model": config.model, "data": Path(config.data.data).name, "rows": rows,
            "device": jax.devices()[0].device_kind, "jax": jax.__version__, "precisions": found}  # fmt: skip
    keep("precision", made, markdown(made), options.out, options.smoke)


def measure(config: Config) -> tuple[int, dict[str, float]]:
    """How many rows; bytes of all parameters and of the blocks, mean loss a response token, mean ROUGE-1 of answers."""
    model = load_model(config.model, config.dtype, config.quantise)
    prepared = experiment.prepare(config, model)
    chosen = sorted(prepared.partition.mix)
    rows = [prepared.test[i] for i in chosen]
    losses = likelihood.losses(model.config, model.params, rows, None, None)
    answers = generate.generate(
        model.config, model.params, [row.prompt for row in rows], None, None,
        stop=model.tokenizer.eos_token_id, new_tokens=config.data.max_response,
    )  # fmt: skip
    texts = model.tokenizer.batch_decode(answers, skip_special_tokens=True)
    references = [prepared.dataset.test[i].output for i in chosen]
    scores = [rouge.score(want, text.strip())["rouge1"] for want, text in zip(references, texts, strict=True)]
    return len(rows), {
        "bytes": nbytes(model.params),
        "block_bytes": nbytes(model.params["blocks"]),
        "loss": float(np.average(losses, weights=[len(row.response) for row in rows])),
        "rouge1": float(np.mean(scores)),
    }


def markdown(found: dict) -> str:
    """A row a precision, beside float32."""
    lines = ["# Precision of the frozen base", "", f"{found['model']} as it came, {found['rows']} test rows of "
             f"{found['data']}; device {found['device']}, jax {found['jax']}. Embedding and head stay in the type of "
             "computation.", ""]  # fmt: skip
    lines += ["| base | all parameters, MB | blocks, MB | loss a response token | ROUGE-1 |", "|---" * 5 + "|"]
    for name, row in found["precisions"].items():
        sizes = f"{row['bytes'] / 1e6:.0f} | {row['block_bytes'] / 1e6:.0f}"
        lines.append(f"| {name} | {sizes} | {row['loss']:.3f} | {row['rouge1']:.3f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    arguments = parse(Precision, prog="python -m experiments.precision")
    sys.exit(guarded(lambda: main(arguments)))
