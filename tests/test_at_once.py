"""How much goes through a device at once: lanes that share packs, packs, groups and rows that fit its memory."""

import dataclasses

import jax
import pytest

from fedrouter_jax import at_once, experiment, memory
from fedrouter_jax import method as method_lib
from fedrouter_jax.config import ComputeConfig
from fedrouter_jax.data import packing
from fedrouter_jax.data.schedule import RoundConfig
from fedrouter_jax.presets import smoke


def test_packs_suit_the_lanes_that_will_share_them(monkeypatch):
    def lanes(devices, clients=4, name="fedrouter", held=2, **rounds):
        config = dataclasses.replace(smoke(), strategy=name, rounds=RoundConfig(**rounds))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, clients=clients))
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        return at_once.groups_of_lanes(config, method_lib.strategy(config, 4), held)

    assert [lanes(devices) for devices in (1, 2, 8)] == [(1, 4), (1, 2), (1, 1)]
    assert lanes(1, clients=20) == (3, 7)  # of eight at most
    assert lanes(2, clients=20) == (2, 5)
    assert lanes(1, clients=3, clusters_per_round=0) == (1, 6)  # two clusters of each
    assert lanes(1, clients=3, clusters_per_round=0, name="fedit") == (1, 3)  # a client has no clusters there
    assert lanes(1, clients=1, clusters_per_round=0, held=None) == (2, 5)  # ten that it may hold
    assert lanes(1, clients=8, participation=0.5) == (1, 4)
    assert lanes(2, name="centralised") == (1, 1)
    monkeypatch.setattr(at_once, "groups_of_lanes", lambda *_: (1, 3))
    found = experiment.prepare(smoke())
    assert found.pack == packing.shape(found.train, found.config.local.batch, 3)


@pytest.mark.parametrize(("limit", "packs", "groups", "rows"), [(None, 5, 1, 64), (2**40, 5, 1, 512), (1, 1, 1, 64)])
def test_on_an_accelerator_as_much_goes_together_as_fits(monkeypatch, limit, packs, groups, rows):
    config = smoke()
    prepared = experiment.prepare(config)
    read = prepared.model, [row.prompt for row in prepared.test.values()]
    counts = [4, 5, 4]  # most steps have a pack less than that
    args = (prepared.model.config, prepared.strategy, 4, (1, 4), prepared.pack, counts)
    assert at_once.training(config, *args) == (1, 1) and at_once.rows(config, *read) == 64
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(at_once, "memory_limit", lambda: limit)
    counted, planned = [], at_once.memory.federation
    monkeypatch.setattr(at_once.memory, "federation", lambda *given: counted.append(given[3]) or planned(*given))
    assert at_once.training(config, *args) == (packs, groups)
    assert {*counted} == ({4} if limit else set())  # slots, as many as there are clusters
    assert at_once.rows(config, *read) == rows
    assert limit == 1 or at_once.training(config, *args[:-1], [2 * at_once.PACKS])[0] == at_once.PACKS
    assert at_once.training(config, *args[:3], (64, 8), *args[4:])[0] == 1
    pooled = experiment.prepare(dataclasses.replace(config, strategy="centralised"))  # one lane
    assert limit == 1 or pooled.packs < experiment.prepare(config).packs
    asked = dataclasses.replace(config, compute=ComputeConfig(packs_at_once=3, groups_at_once=2, rows_at_once=7))
    assert at_once.training(asked, *args) == (3, 2)
    assert at_once.rows(asked, *read) == 7


def test_some_memory_is_left_for_what_nobody_plans(monkeypatch):
    """All eight groups are planned to fit to the byte; and the keys and values of 256 rows are a quarter of it."""
    config, prepared = smoke(), experiment.prepare(smoke())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    federation = memory.federation(prepared.model.config, config, prepared.strategy, 4)
    prompt = [0] * 100
    shape = memory.Pack(*prepared.pack, rows=4 * config.local.batch, lanes=4, at_once=1)
    all_of_them = memory.needed(federation, shape, 8, 8).total
    for limit, fitting in ((all_of_them, range(1, 8)), (all_of_them / 0.84, [8])):
        monkeypatch.setattr(at_once, "memory_limit", lambda limit=limit: limit)
        found = at_once.training(config, prepared.model.config, prepared.strategy, 4, (8, 4), prepared.pack, [1])
        assert found[0] == 1 and found[1] in fitting
    decoder = prepared.model.config
    row = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * 4 * (len(prompt) + config.data.max_response)
    monkeypatch.setattr(at_once, "memory_limit", lambda: 4 * 256 * row)
    assert at_once.rows(config, prepared.model, [prompt] * 600) == 256
