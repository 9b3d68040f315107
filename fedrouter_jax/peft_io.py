"""Adapters and the router as files that other tools load: PEFT folders, safetensors, JSON. Never pickle.

A PEFT folder stores `lora_A` as [rank, in] and `lora_B` as [out, rank], transposed from here, one tensor a layer.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from fedrouter_jax import files
from fedrouter_jax.lora import LoRAConfig
from fedrouter_jax.routing import Router
from fedrouter_jax.types import LoRA, PyTree

BLOCK = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
         "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}  # fmt: skip


def tensor_name(layer: int, module: str, side: str) -> str:
    """PEFT's key of one tensor; `side` is "A" or "B"."""
    return f"base_model.model.model.layers.{layer}.{BLOCK[module]}.{module}.lora_{side}.weight"


def tensors(lora: LoRA) -> dict[str, np.ndarray]:
    """An adapter (leaves [layer, in, rank] and [layer, rank, out]) as PEFT has it, [rank, in] and [out, rank]."""
    return {
        tensor_name(layer, module, side): np.ascontiguousarray(np.asarray(stacked[layer]).T)
        for side, leaves in (("A", lora.a), ("B", lora.b))
        for module, stacked in leaves.items()
        for layer in range(stacked.shape[0])
    }


def write_adapter(folder: Path, lora: LoRA, config: LoRAConfig, base_name: str) -> None:
    """One adapter (as in `tensors`) as a PEFT folder for the model `base_name`."""
    _write_tensors(folder / "adapter_model.safetensors", tensors(lora), {"format": "pt"})
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


def write_router(folder: Path, router: Router, description: dict) -> None:
    """Centroids and standardisation (float32 safetensors), and `router.json`: how a text becomes an embedding."""
    tensors = {name: np.asarray(value, np.float32) for name, value in router._asdict().items() if name != "unit"}
    _write_tensors(folder / "router.safetensors", tensors)
    write_json(folder / "router.json", {**description, "unit_length": bool(router.unit)})


def _write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. The library's own `save_file` leaves a nameless one behind where it is killed."""
    with files.replaced(path) as beside:
        beside.write_bytes(save(tensors, metadata))


def write_json(path: Path, value: dict) -> None:
    """A small JSON file."""
    files.write(path, json.dumps(value, indent=2) + "\n")
