"""The method of a config: its strategy, whether that can work as configured, and what it asks of a run."""

from __future__ import annotations

import itertools

import jax
import numpy as np

from fedrouter_jax import server as server_lib
from fedrouter_jax import strategies
from fedrouter_jax.config import Config
from fedrouter_jax.data.schedule import taking_part
from fedrouter_jax.errors import UserError
from fedrouter_jax.strategies import feddpa
from fedrouter_jax.types import OWNERSHIP, LoRA, Owner, Phase, PyTree, Strategy

_LOOKED_AT = 100  # rounds whose phases are looked at, where there are more


def strategy(config: Config, clusters: int | None) -> Strategy:
    """The configured strategy; `clusters` is n_g, None where it is yet to be found."""
    weight_on = {"weight_on": config.evaluation.instance_weight}
    options = {
        "feddpa-t": weight_on,
        "feddpa-f": {"together": feddpa.shared_rounds(config.rounds.rounds), **weight_on},
        "fedex": {"scale": config.lora.scale},
        "flora": {"scale": config.lora.scale, "seed": config.seed},
        "scaffold": {"clients": config.data.founders},
        "fedlease": {"experts": clusters or config.cluster.max_clusters},
        "fedrouter-warm": {"together": config.rounds.rounds // 3},
    }
    told = {} if config.strategy in strategies.STRATEGIES else {"config": config}
    return strategies.find(config.strategy)(**options.get(config.strategy, told))


def phases_by_round(strategy: Strategy, rounds: int) -> list[tuple[Phase, ...]]:
    """The phases of a run's rounds, in order; of very many rounds some, the first two and the last among them."""
    some = np.linspace(1, rounds, min(rounds, _LOOKED_AT)).round().astype(int).tolist()
    return [strategy.phases(t, rounds) for t in sorted({*some, min(2, rounds)})]


def check(config: Config, strategy: Strategy) -> None:
    """Raise `UserError` where a method cannot work as configured."""
    if (strategy.of_products or strategy.base is not None) and config.rounds.server != "average":
        raise UserError(
            f"--server is {config.rounds.server}, whose steps are of A and B apart, but {strategy.name} averages their "
            "products, or moves the frozen weights; use --server average"
        )
    if not isinstance(strategy.owners, dict):
        raise UserError(
            f"{strategy.name}: owners are {strategy.owners!r}; expected a dict of named adapters, such as "
            '{"main": "shared"}'
        )
    names = set(strategy.owners)
    for name, parts in strategy.owners.items():
        found = set(jax.tree.leaves(parts))
        strange = sorted(found - set(OWNERSHIP))
        if strange:
            raise UserError(
                f"{strategy.name}: the owner of {name!r} is {strange[0]!r}; choose among {', '.join(OWNERSHIP)}"
            )
        if {OWNERSHIP[owner].slot_per for owner in found} >= {"cluster", "client"}:
            raise UserError(
                f"{strategy.name}: {' and '.join(sorted(found))} own the parts of {name!r}, and their slots do not "
                "pair; give one part to all (shared), or both to the same"
            )
    if needs_cluster_count(strategy) and config.cluster.global_clusters == 0:
        raise UserError(
            f"--global-clusters is 0, chosen by silhouette, but {strategy.name} clusters no rows; give the number of "
            "its slots"
        )
    by_round = phases_by_round(strategy, config.rounds.rounds)
    for train, weights in itertools.chain(*by_round):
        told = set(train) if isinstance(train, dict) else names
        if strategy.optimiser is not None:  # what it is given beside adapters has no owner
            told &= names
        if told != names or not names >= set(weights) > set():
            raise UserError(
                f"{strategy.name}: a phase tells of {', '.join(sorted({*told, *weights}))}, but the adapters are "
                f"{', '.join(sorted(names))}; name all of them in `train`, and those of the forward pass in `weights` "
                "(without `phases` there is one, main)"
            )
        for name, part in itertools.product(strategy.owners, LoRA._fields):
            if owner := _lost(_part(strategy.owners, name, part), _part(train, name, part)):
                raise UserError(
                    f"{strategy.name}: a phase moves {part} of {name!r}, whose owner is {owner}, so nobody would "
                    f"keep it; say {part}=False of it in `train`"
                )
    if config.local.steps < len(by_round[0]):
        raise UserError(
            f"--steps is {config.local.steps}; {strategy.name} shares them among {len(by_round[0])} phases of a round"
        )


def check_unlabelled(config: Config, strategy: Strategy, name: str) -> None:
    """Raises `UserError` for a method that needs what only labels of tasks say."""
    if strategy.enrolling == "tasks":
        raise UserError(
            f"{strategy.name} goes by the tasks of rows, but those of {name} have none; map their column with "
            "--columns task=NAME, or choose another --strategy"
        )
    modes = (config.evaluation.personalised_routing, config.evaluation.generalisation_routing)
    if strategy.enrolling == "clustering" and "oracle" in modes:
        raise UserError(f"oracle routing goes by the tasks of rows, but those of {name} have none; choose another")
    if needs_cluster_count(strategy) and config.cluster.global_clusters is None:
        raise UserError(
            f"{strategy.name} has as many slots as there are tasks, but the rows of {name} have none; give "
            "--global-clusters"
        )


def _part(tree: PyTree, name: str, part: str) -> PyTree:
    """What a prefix tree of adapters says of one part of one of them."""
    of = tree[name] if isinstance(tree, dict) else tree
    return getattr(of, part) if isinstance(of, LoRA) else of


def _lost(owners: PyTree, moves: PyTree) -> Owner | None:
    """An owner, in prefix trees of one part, of what moves though lanes do not write it; None: there is none."""
    if isinstance(owners, dict) and isinstance(moves, dict):  # module by module
        return next(filter(None, (_lost(owners[module], moves[module]) for module in owners)), None)
    still = [owner for owner in jax.tree.leaves(owners) if not OWNERSHIP[owner].trained]
    return still[0] if still and any(np.any(move) for move in jax.tree.leaves(moves)) else None


def averages(strategy: Strategy) -> bool:
    """Whether lanes are averaged by their weights."""
    return server_lib.moves(strategy.owners) and not strategy.pooled


def has_cluster_slots(strategy: Strategy) -> bool:
    """Whether adapters are the clusters'."""
    return any(OWNERSHIP[owner].slot_per == "cluster" for owner in jax.tree.leaves(strategy.owners))


def needs_cluster_count(strategy: Strategy) -> bool:
    """Whether a method must be told how many clusters there are: it has slots for them, and no rows that say."""
    return has_cluster_slots(strategy) and not strategy.has_local_clusters and not strategy.finds_slots


def steps_of_a_lane(config: Config, strategy: Strategy) -> int:
    """Optimiser steps of a lane in a round: those of all clients that take part where their rows are pooled."""
    return config.local.steps * (_taking_part(config) if strategy.pooled else 1)


def lanes_of_a_round(config: Config, strategy: Strategy, held: int) -> int:
    """Lanes of a round where clients hold so many clusters; one where their rows are pooled."""
    each = min(config.rounds.clusters_per_round or held, held) if strategy.has_local_clusters else 1
    return 1 if strategy.pooled else _taking_part(config) * each


def _taking_part(config: Config) -> int:
    return taking_part(config.data.founders, config.rounds.participation)
