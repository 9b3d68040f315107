"""What other tools take of a run: its adapters as PEFT folders, its prompt, and its router."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedrouter_jax import bank as bank_lib
from fedrouter_jax import embed, peft_io, routing
from fedrouter_jax import method as method_lib
from fedrouter_jax.data import schedule, templates
from fedrouter_jax.experiment import Prepared
from fedrouter_jax.types import FederationState, LoRA


def write(to: Path, prepared: Prepared, state: FederationState, slot_tasks: Sequence[str]) -> None:
    """`to/adapters`, and `to/router` where there is one; `slot_tasks` names the task of each slot."""
    _adapters(to / "adapters", prepared, state)
    if prepared.strategy.enrolling == "clustering":
        _router(to / "router", prepared, state, slot_tasks)


def _adapters(folder: Path, prepared: Prepared, state: FederationState) -> None:
    """A PEFT folder for each slot; beside them the prompt, and what the method adds to the frozen weights.

    Where whole clients are put into clusters, also whose adapter is whose; not with FedLEASE, whose experts all answer.
    """
    config, model, strategy = prepared.config, prepared.model, prepared.strategy
    bank, names = bank_lib.serving(state.bank), bank_lib.serving_names(strategy.owners, state.bank)
    for slot, name in enumerate(names):
        one = LoRA(*({module: leaf[slot] for module, leaf in part.items()} for part in bank))
        peft_io.write_adapter(folder / name, one, config.lora, model.base_name)
    before, behind = templates.around(model.tokenizer, config.data.template)
    data = {"before": before, "behind": behind, "max_length": config.data.max_length}
    peft_io.write_json(folder / "prompt.json", {**data, "max_response": config.data.max_response})
    if method_lib.needs_cluster_count(strategy):
        table, clusters = np.asarray(state.table), bank_lib.of_clusters(strategy.owners, state.bank)
        known = range(len(table))
        if strategy.choose is not None:  # those whom the last round did not draw choose by their rows when they answer
            drawn = schedule.drawn(config.data.founders, int(state.round), config.rounds.participation, config.seed)
            known = drawn.tolist()
        whose = {str(client): _joined(names, clusters[:, table[client, 0]]) for client in known}
        peft_io.write_json(folder / "clients.json", whose)
    if strategy.base is not None:
        peft_io.write_shift(folder, strategy.base(state, model.params))


def _joined(names: Sequence[str], slots: np.ndarray) -> str:
    """The adapters of a cluster, nearly always one."""
    return " + ".join(names[slot] for slot in slots)


def _router(folder: Path, prepared: Prepared, state: FederationState, slot_tasks: Sequence[str]) -> None:
    config, model = prepared.config, prepared.model
    recipe, owners = routing.RECIPES[config.cluster.recipe], prepared.strategy.owners
    names = bank_lib.serving_names(owners, state.bank)
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
        "adapters": [_joined(names, slots) for slots in bank_lib.of_clusters(owners, state.bank).T],
        "tasks": list(slot_tasks),
        "held": sorted({*np.asarray(state.table).ravel().tolist()} - {-1}),
    }
    peft_io.write_router(folder, state.memory, description)
