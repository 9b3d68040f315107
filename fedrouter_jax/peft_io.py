"""Adapters and the router as files that other tools load: PEFT folders, safetensors, JSON. Never pickle.

A PEFT folder stores `lora_A` as [rank, in] and `lora_B` as [out, rank], transposed from here, one tensor a layer.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedrouter_jax import files
from fedrouter_jax.errors import UserError
from fedrouter_jax.lora import LoRAConfig
from fedrouter_jax.models import DecoderConfig, module_shapes
from fedrouter_jax.routing import Router
from fedrouter_jax.types import LoRA, PyTree

BLOCK = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
         "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}  # fmt: skip

_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal")


def tensor_name(layer: int, module: str, side: str) -> str:
    """PEFT's key of one tensor; `side` is "A" or "B"."""
    return f"base_model.model.model.layers.{layer}.{BLOCK[module]}.{module}.lora_{side}.weight"


def write_adapter(folder: Path, lora: LoRA, config: LoRAConfig, base_name: str) -> None:
    """One adapter (leaves [layer, in, rank] and [layer, rank, out]) as a PEFT folder for the model `base_name`."""
    tensors = {
        tensor_name(layer, module, side): np.ascontiguousarray(np.asarray(stacked[layer]).T)
        for side, leaves in (("A", lora.a), ("B", lora.b))
        for module, stacked in leaves.items()
        for layer in range(stacked.shape[0])
    }
    _write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    if lora.gate:  # nothing that PEFT knows
        _write_tensors(folder / "gate.safetensors", {module: np.asarray(gate) for module, gate in lora.gate.items()})
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(config.targets),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", description)


def write_shift(folder: Path, params: PyTree) -> None:
    """The shift of frozen weights: `base_shift.safetensors`, [out, in] by the names of transformers."""
    tensors = {}
    moved = {name: leaf["shift"] for name, leaf in params["blocks"].items() if name in BLOCK and "shift" in leaf}
    for module, shift in moved.items():
        for layer, delta in enumerate(np.asarray(shift)):
            tensors[f"model.layers.{layer}.{BLOCK[module]}.{module}.weight"] = np.ascontiguousarray(delta.T)
    _write_tensors(folder / "base_shift.safetensors", tensors)


def read_adapter(folder: Path, decoder: DecoderConfig) -> tuple[LoRA, LoRAConfig]:
    """A PEFT folder as float32 LoRA of this decoder. Raises `UserError` for what this project cannot represent."""
    raw = _read_json(folder / "adapter_config.json")
    if not isinstance(raw, dict):
        raise UserError(f"{folder}/adapter_config.json: JSON of type {type(raw).__name__}; expected an object")
    unsupported = [key for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern",
                                   "layers_to_transform", "layer_replication", "alora_invocation_tokens")
                   if raw.get(key)]  # fmt: skip
    if raw.get("init_lora_weights") not in _PLAIN_INITS:  # the others change the base
        unsupported.append(f"init_lora_weights {raw['init_lora_weights']!r}")
    if raw.get("peft_type") != "LORA" or unsupported or raw.get("bias", "none") != "none":
        odd = unsupported[0] if unsupported else f"peft_type {raw.get('peft_type')!r}, bias {raw.get('bias')!r}"
        raise UserError(f"{folder}: an adapter with {odd} is not plain LoRA; export it merged to plain LoRA first")
    targets = raw.get("target_modules")
    shapes = module_shapes(decoder)
    if not isinstance(targets, list) or not targets or any(target not in list(shapes) for target in targets):
        raise UserError(f"{folder}: target_modules is {targets!r}; expected a list among {', '.join(shapes)}")
    try:
        numbers = int(raw["r"]), float(raw["lora_alpha"]), float(raw.get("lora_dropout", 0.0))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/adapter_config.json lacks or garbles a number of LoRA: {error}") from None
    config = LoRAConfig(*numbers, tuple(sorted(targets)))
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}/adapter_model.safetensors: not readable ({error}); copy it again") from None

    def stack(module: str, side: str, shape: tuple[int, int]) -> np.ndarray:
        layers = []
        for layer in range(decoder.layers):
            name = tensor_name(layer, module, side)
            if name not in tensors or tensors[name].shape != shape:
                found = f"of shape {tensors[name].shape}" if name in tensors else "absent"
                raise UserError(f"{folder}: tensor {name} is {found}, expected {shape}; is it of another base model?")
            layers.append(tensors.pop(name).T.astype(np.float32))
        return jnp.asarray(np.stack(layers))

    a = {module: stack(module, "A", (config.rank, shapes[module][0])) for module in config.targets}
    b = {module: stack(module, "B", (shapes[module][1], config.rank)) for module in config.targets}
    if tensors:
        raise UserError(f"{folder}: tensor {next(iter(tensors))} is unknown here; is it of another base model?")
    return LoRA(a, b), config


def write_router(folder: Path, router: Router, description: dict) -> None:
    """Centroids and standardisation (float32 safetensors), and `router.json`: how a text becomes an embedding."""
    tensors = {name: np.asarray(value, np.float32) for name, value in router._asdict().items() if name != "unit"}
    _write_tensors(folder / "router.safetensors", tensors)
    write_json(folder / "router.json", {**description, "unit_length": bool(router.unit)})


def read_router(folder: Path) -> tuple[Router, dict]:
    """The router and its description, as `write_router` wrote them."""
    description = _read_json(folder / "router.json")
    try:
        tensors = load_file(folder / "router.safetensors")
        router = Router(**{name: jnp.asarray(tensors[name]) for name in ("centroids", "mean", "deviation")},
                        unit=jnp.asarray(description["unit_length"]))  # fmt: skip
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{folder}: no complete router ({error}); export the run again") from None
    return router, description


def _write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. The library's own `save_file` leaves a nameless one behind where it is killed."""
    with files.replaced(path) as beside:
        beside.write_bytes(save(tensors, metadata))


def write_json(path: Path, value: dict) -> None:
    """A small JSON file."""
    files.write(path, json.dumps(value, indent=2) + "\n")


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); expected a file that export or PEFT wrote") from None
