"""What other tools take of a run: its adapters as PEFT folders, its prompt, and its router."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedrouter_jax import bank as bank_lib
from fedrouter_jax import config as config_lib
from fedrouter_jax import embed, files, peft_io, routing
from fedrouter_jax.data import templates
from fedrouter_jax.experiment import Prepared
from fedrouter_jax.types import FederationState, LoRA


def write(to: Path, prepared: Prepared, state: FederationState, slot_tasks: Sequence[str]) -> None:
    """`to/adapters`, and `to/router` where there is one; `slot_tasks` names the task of each slot."""
    with files.guarded(to):
        _adapters(to / "adapters", prepared, state)
        if prepared.strategy.enrolling == "clustering":
            _router(to / "router", prepared, state, slot_tasks)


def _adapters(folder: Path, prepared: Prepared, state: FederationState) -> None:
    """A PEFT folder for each slot; beside them the prompt, and what the method adds to the frozen weights.

    Where whole clients are put into clusters, also whose adapter is whose.
    """
    config, model, strategy = prepared.config, prepared.model, prepared.strategy
    bank, names = bank_lib.serving(state.bank), bank_lib.serving_names(strategy.owners, state.bank)
    for slot, name in enumerate(names):
        one = LoRA(*({module: leaf[slot] for module, leaf in part.items()} for part in bank))
        peft_io.write_adapter(folder / name, one, config.lora, model.base_name)
    before, behind = templates.around(model.tokenizer, config.data.template)
    data = {"before": before, "behind": behind, "max_length": config.data.max_length}
    peft_io.write_json(folder / "prompt.json", {**data, "max_response": config.data.max_response})
    if config_lib.told_slots(config, strategy):
        chosen = enumerate(np.asarray(state.table)[:, 0].tolist())
        peft_io.write_json(folder / "clients.json", {str(client): names[slot] for client, slot in chosen})
    if strategy.base is not None:
        shifted = strategy.base(state, model.params)
        peft_io.write_shift(folder, model.params, shifted, config.lora.targets)


def _router(folder: Path, prepared: Prepared, state: FederationState, slot_tasks: Sequence[str]) -> None:
    config, model = prepared.config, prepared.model
    recipe = routing.RECIPES[config.cluster.recipe]
    description = {
        "base_model": model.base_name,
        "base_fingerprint": model.fingerprint,
        "dtype": config.dtype,
        "quantise": config.quantise,
        "recipe": config.cluster.recipe,
        "layers": embed.blocks(model.config, recipe.depth),
        "final_norm": recipe.depth is None,
        "pooling": "mean over tokens" + (f" but the first {recipe.skip}" if recipe.skip else ""),
        "skip": recipe.skip,
        "text": "the bare instruction, no template",
        "max_length": config.data.max_length,
        "metric": "euclidean",
        "adapters": bank_lib.serving_names(prepared.strategy.owners, state.bank),
        "tasks": list(slot_tasks),
    }
    peft_io.write_router(folder, state.memory, description)
