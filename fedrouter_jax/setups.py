"""What a fair comparison of runs needs to know of them, in words."""

from __future__ import annotations

from collections.abc import Sequence

from fedrouter_jax import method as method_lib
from fedrouter_jax.config import Config
from fedrouter_jax.records import Row, brief, cost, latest
from fedrouter_jax.strategies import STRATEGIES


def setups(rows: Sequence[Row]) -> list[str]:
    """What rows of runs have in common, and what of the rest is whose; of a single row all in one line."""
    said = {row.label: setup(row) for row in rows if not row.base}
    if len(said) < 2:
        return [f"{label}: {'; '.join(parts)}." for label, parts in said.items()]
    first = next(iter(said.values()))
    common = [part for part in first if all(part in parts for parts in said.values())]
    own = {label: [part for part in parts if part not in common] for label, parts in said.items()}
    differs = " ".join(f"{label}: {'; '.join(parts)}." for label, parts in own.items() if parts)
    return [f"Common: {'; '.join(common)}."] * bool(common) + [f"Differs: {differs}"] * bool(differs)


def setup(row: Row) -> list[str]:
    """Everything of one row of runs, a choice or two a part."""
    run, config = row.runs[0], row.runs[0].config
    data, local, lora, rounds = config.data, config.local, config.lora, config.rounds
    quantised = "" if config.quantise == "none" else f", linear layers in {config.quantise}"
    said = [
        f"model {brief(config.model)} ({config.dtype}{quantised})",
        "synthetic data" if data.data == "synthetic" else f"data {brief(data.data)}",
        f"{data.clients} clients, {data.scenario}, at most {data.train_rows} training rows each",
        f"{rounds.rounds} rounds x {local.steps} steps x batch {local.batch}",
        f"learning rate {local.learning_rate:g} to {local.min_learning_rate:g}",
        f"LoRA rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g} on {brief(lora.targets)}",
        f"averages weighted by {rounds.weighting}" if weighs(config) else "no weighted averages",
    ]
    if rounds.participation < 1:
        said.append(f"{rounds.participation:.0%} of the clients a round")
    if run.clusters and run.clusters.get("clustered"):
        said.append(f"{run.clusters['clusters']} clusters, recipe {config.cluster.recipe}")
        turns = ", turns staggered" * (rounds.turns == "staggered")
        said.append(f"local clusters a client and round: {rounds.clusters_per_round or 'all'}{turns}")
        routing = config.evaluation.personalised_routing, config.evaluation.generalisation_routing
        said.append("routing {} (personalised), {} (generalisation)".format(*routing))
    devices = sorted({str(of.timings["device"]) for of in row.runs if "device" in of.timings})
    said += [f"device {' and '.join(devices)}"] if devices else []
    rejected = sum(cost(of).get("rejected_lanes", 0) for of in row.runs)
    said += [f"lanes rejected as not finite: {rejected}"] if rejected else []
    if run.scores is None:
        at = f"the scores are of round {latest(run)[1]}" if latest(run)[0] else "no scores yet"
        said.append(f"unfinished, {at}; continue with: fedrouter resume {run.path}")
    return said


def weighs(config: Config) -> bool:
    """Whether averages went by weights; of somebody's own method, which need not be here, that is supposed."""
    return config.strategy not in STRATEGIES or method_lib.averages(method_lib.strategy(config, None))
