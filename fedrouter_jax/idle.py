"""Options that were set and change nothing."""

from __future__ import annotations

from fedrouter_jax import method as method_lib
from fedrouter_jax import server as server_lib
from fedrouter_jax.config import Config


def options(config: Config) -> list[str]:
    """The options that were set to something and change nothing in this run."""
    default, method, name = Config(), method_lib.strategy(config, None), config.strategy
    clusters = method.enrolling == "clustering"
    lanes = method.has_local_clusters
    slots = method_lib.has_cluster_slots(method) and method.enrolling != "tasks"

    def changed(section: str, field: str) -> bool:
        return getattr(getattr(config, section), field) != getattr(getattr(default, section), field)

    no_rows = f"({name} clusters no rows)"
    set_for_nothing = {
        "--server-rate (--server average has none)": changed("rounds", "server_rate")
        and config.rounds.server == "average",
        f"--server ({name} averages nothing there)": changed("rounds", "server")
        and not server_lib.moves(method.owners),
        "--mixture-alpha (of --scenario dirichlet)": changed("data", "mixture_alpha")
        and config.data.scenario != "dirichlet",
        "--shift (a multiple of --clients)": config.data.shift and config.data.shift % config.data.clients == 0,
        f"--local-clusters {no_rows}": config.cluster.local_clusters and not clusters,
        f"--global-clusters {no_rows}": config.cluster.global_clusters and not (clusters or slots),
        f"--max-clusters {no_rows}": changed("cluster", "max_clusters") and not (clusters or method.finds_slots),
        "--max-clusters (the numbers of clusters are given)": changed("cluster", "max_clusters")
        and config.cluster.global_clusters
        and (method.finds_slots or (clusters and config.cluster.local_clusters)),
        f"--recipe {no_rows}": changed("cluster", "recipe") and not clusters,
        "--learning-rate (one round has --min-learning-rate)": changed("local", "learning_rate")
        and config.rounds.rounds == 1,
        f"--turns {no_rows}": changed("rounds", "turns") and not lanes,
        f"--personalised-routing {no_rows}": changed("evaluation", "personalised_routing") and not clusters,
        f"--generalisation-routing {no_rows}": changed("evaluation", "generalisation_routing") and not clusters,
        f"--clusters-per-round {no_rows}": changed("rounds", "clusters_per_round") and not lanes,
        f"--weighting ({name} weighs nothing)": changed("rounds", "weighting") and not method_lib.averages(method),
        f"--weighting client {no_rows}": config.rounds.weighting == "client"
        and method_lib.averages(method)
        and not lanes,
        "--evaluate-at (of rounds after the last)": changed("evaluation", "evaluate_at")
        and max(config.evaluation.evaluate_at, default=0) > config.rounds.rounds,
        "--instance-weight (of feddpa-t and feddpa-f)": changed("evaluation", "instance_weight")
        and not name.startswith("feddpa"),
    }
    return [option for option, found in set_for_nothing.items() if found]
