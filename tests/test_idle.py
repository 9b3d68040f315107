"""Options that were set and change nothing."""

import dataclasses

import pytest

from fedrouter_jax import config as config_lib
from fedrouter_jax import experiment, idle
from fedrouter_jax.errors import UserError
from fedrouter_jax.presets import smoke
from fedrouter_jax.strategies import ifca


def test_options_that_change_nothing_are_named():
    assert idle.options(smoke()) == []
    fedit = dataclasses.replace(
        smoke(), strategy="fedit", cluster=dataclasses.replace(smoke().cluster, local_clusters=2)
    )
    rounds = dataclasses.replace(smoke().rounds, server_rate=0.1, turns="staggered")
    named = idle.options(dataclasses.replace(fedit, rounds=rounds))
    assert [option.split()[0] for option in named] == ["--server-rate", "--local-clusters", "--turns"]
    others = dataclasses.replace(
        smoke(),
        strategy="fedsa",
        data=dataclasses.replace(smoke().data, shift=8, clients=4),
        cluster=dataclasses.replace(smoke().cluster, global_clusters=3, max_clusters=5, recipe="paper"),
        evaluation=dataclasses.replace(
            smoke().evaluation,
            evaluate_at=(2, 4),
            personalised_routing="oracle",
            generalisation_routing="local",
            instance_weight="global",
        ),
    )
    assert [option.split()[0] for option in idle.options(others)] == [
        "--shift", "--global-clusters", "--max-clusters", "--recipe",
        "--personalised-routing", "--generalisation-routing",
        "--evaluate-at", "--instance-weight",
    ]  # fmt: skip
    alone = dataclasses.replace(fedit, strategy="local", rounds=dataclasses.replace(rounds, server="adam", turns="own"))
    assert idle.options(alone)[0] == "--server (local averages nothing there)"
    assert idle.options(dataclasses.replace(smoke(), rounds=dataclasses.replace(rounds, server="adam"))) == []
    turns = dataclasses.replace(smoke().rounds, clusters_per_round=0, weighting="client")
    for strategy, count in (("fedrouter", 0), ("oracle", 0), ("fedit", 2), ("fedalt", 2)):
        named = idle.options(dataclasses.replace(smoke(), strategy=strategy, rounds=turns))
        assert [option.split()[0] for option in named] == ["--clusters-per-round", "--weighting"][:count]
    known = dataclasses.replace(smoke().cluster, local_clusters=2, global_clusters=4, max_clusters=5)
    once = dataclasses.replace(smoke().rounds, rounds=1)
    rate = dataclasses.replace(smoke().local, learning_rate=0.5)
    named = idle.options(dataclasses.replace(smoke(), cluster=known, rounds=once, local=rate))
    assert [option.split()[0] for option in named] == ["--max-clusters", "--learning-rate"]
    lease = dataclasses.replace(known, local_clusters=None)
    assert [
        option.split()[0] for option in idle.options(dataclasses.replace(smoke(), strategy="fedlease", cluster=lease))
    ] == ["--max-clusters"]
    evenly = dataclasses.replace(smoke().rounds, weighting="uniform")
    assert idle.options(dataclasses.replace(smoke(), strategy="fedit", rounds=evenly)) == []
    assert len(idle.options(dataclasses.replace(smoke(), strategy="local", rounds=evenly))) == 1


def test_the_slots_of_a_method_of_ones_own_are_as_many_as_are_asked_for(monkeypatch):
    """It clusters no rows, but has slots for clusters: the number counts, and must be given."""
    mine = lambda **_: ifca()._replace(name="mine", choose=None)  # noqa: E731
    monkeypatch.setattr(config_lib.strategies, "find", lambda name: mine)
    config = dataclasses.replace(smoke(), strategy="methods:mine")
    for count in (3, 0):
        asked = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, global_clusters=count))
        assert idle.options(asked) == []
    with pytest.raises(UserError, match="--global-clusters is 0, chosen by silhouette, but mine clusters no rows"):
        experiment.prepare(asked)
