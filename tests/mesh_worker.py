# ruff: noqa: E402 (JAX joins processes before anything else)
"""Rounds of a small federation on a mesh, as a program of its own: JAX counts devices, and joins processes, once.

    python mesh_worker.py '{"cases": [{"strategy": "fedrouter", "shape": [8, 1]}]}'

A case may say `quantise`, `at_once`, the rounds to play (`first` to `last`), folders to `load` its start from and to
`save` its end to, and that its `traffic` is wanted. `process` [number, count, address] joins others. Prints a JSON line
for each case: the largest difference from one device that plays all rounds, the number of compiled programs, the bytes
of the bank, and where it is wanted what the devices of a program send each other, bytes by operation. A case with
`answer` embeds and answers so many texts instead, and prints the largest difference of embeddings, the share of equal
answers, the devices of caches, the threads that place what rows of devices share, and whether attention would be
cuDNN's on a GPU.
"""

import dataclasses
import functools
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from fedrouter_jax.terminal import wait_for_devices

wait_for_devices()
ASKED = json.loads(sys.argv[1])
if "process" in ASKED:
    number, count, address = ASKED["process"]
    jax.distributed.initialize(address, count, number)

from jax.experimental.multihost_utils import process_allgather

from experiments import hlo
from fedrouter_jax import answers, bank, checkpoint, client, experiment, generate, mesh, models, sharing
from fedrouter_jax.data import schedule
from fedrouter_jax.federation import make_round
from fedrouter_jax.lora import LoRAConfig
from fedrouter_jax.models import attention, load_model
from fedrouter_jax.presets import smoke

LOCAL = client.LocalConfig(steps=2, batch=2, learning_rate=1e-2)
LORA = LoRAConfig(rank=4, dropout=0.1)
LAST = 2


@functools.cache
def begin(strategy, quantise):
    """A federation of eight clients: what is prepared, its start, its rows."""
    config = smoke()
    config = dataclasses.replace(
        config, strategy=strategy, local=LOCAL, lora=LORA, quantise=quantise,
        data=dataclasses.replace(config.data, clients=8), compute=dataclasses.replace(config.compute, lanes_together=2),
    )  # fmt: skip
    model = load_model("tiny", quantise=quantise)
    prepared = experiment.prepare(config, model)._replace(mesh=None, model=model)  # shapes are the cases' business
    rows = sum(len(held.train) for held in prepared.partition.clients)
    enrolment = experiment.enroll(prepared, np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32))
    return prepared, experiment.start(prepared, enrolment), experiment.members(prepared, enrolment)


@functools.cache
def alone(strategy, quantise, last):
    """The bank after rounds on one device."""
    return play(strategy, quantise, last=last)[0]


def play(strategy, quantise="none", shape=None, at_once=1, first=1, last=LAST, load=None, save=None, traffic=False):
    """The bank after the rounds `first` to `last`, on every process, and how many programs were compiled."""
    prepared, state, members = begin(strategy, quantise)
    state, params = jax.tree.map(jax.numpy.copy, state), prepared.model.params
    on = shape and mesh.make(shape[1], jax.devices()[: shape[0] * shape[1]])
    if on:
        state, params = mesh.place_state(on, prepared.strategy, state), mesh.place_base(on, params)
    if load:
        state = checkpoint.load(Path(load), first - 1, state)
    update = client.make_client_update(prepared.model.config, LORA, LOCAL, optimiser=prepared.strategy.optimiser)
    loss = client.make_client_loss(prepared.model.config, LORA)
    run = make_round(prepared.strategy, update, lambda t: 1e-2, 3, at_once, loss=loss, mesh=on)
    sizes = np.array([[len(cluster) for cluster in held] for held in members])
    for t in range(first, last + 1):
        work = schedule.lanes(sizes, t, prepared.config.rounds, 0)
        rows_of_devices = on.shape["clients"] if on else 1
        batch = schedule.batches(work, members, t, LOCAL.steps, LOCAL.batch, *prepared.pack, 0, 2, rows_of_devices)
        inputs = (state, params, work, mesh.place_batches(on, batch) if on else batch, jax.random.key(3))
        if t == first:
            sent = hlo.traffic(run.lower(*inputs).compile().as_text()) if traffic else {}
        state, info = run(*inputs)
        assert np.isfinite(np.asarray(info.loss)).all()  # every process may read it
    if save:
        checkpoint.save(Path(save), last, state)
    sent["bank"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state.bank))
    return process_allgather(state.bank, tiled=True) if on else state.bank, run._cache_size(), sent


def respond(strategy, shape, answer):
    """How texts are embedded and answered by rows of devices, each its share, beside one device."""
    prepared, state, _ = begin(strategy, "none")
    rng = np.random.default_rng(1)
    state = state._replace(
        bank=jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype("f"), state.bank)
    )
    rows = list(prepared.test)[:answer]
    texts, encoded = [prepared.dataset.test[row].instruction for row in rows], [prepared.test[row] for row in rows]
    weights = np.eye(bank.slots_of(state.bank), dtype="f")
    weights = weights[rng.integers(0, len(weights), answer)]
    on = mesh.make(shape[1], jax.devices()[: shape[0] * shape[1]])
    model = prepared.model._replace(params=mesh.place_base(on, prepared.model.params))
    spread, placed = prepared._replace(model=model, mesh=on), mesh.place_state(on, prepared.strategy, state)
    said, numbers, caches, placing, mesh_beside = [], [], [], set(), mesh.beside

    def empty_cache(*given):
        made = models.empty_cache(*given)
        caches.append({device.id for leaf in jax.tree.leaves(made) for device in leaf.devices()})
        return made

    def beside(*given):
        placing.add(threading.current_thread().name)
        return mesh_beside(*given)

    generate.models = SimpleNamespace(**vars(models) | {"empty_cache": empty_cache})
    mesh.beside = beside
    for of, here in ((prepared, state), (spread, placed)):
        said.append(answers.answer(of, here, [row.prompt for row in encoded], weights))
        numbers.append((experiment.embed_texts(of, texts), answers.losses(of, here, encoded, weights)))
    same = np.mean([a == b for a, b in zip(*said, strict=True)])
    gap = max(float(np.abs(alone - spread).max()) for alone, spread in zip(*numbers, strict=True))
    bases = len(mesh.copies(model.params))
    found = {"gap": gap, "same": float(same), "different": len(set(said[0])), "bases": bases}
    found |= {"kernel": kernel(model.params), "placing": sorted(placing)}
    mesh.beside = mesh_beside
    return found | {"caches": sorted(map(sorted, caches[1:]))}  # the first was that of one device


def kernel(params):
    """Whether rows of devices would take cuDNN's attention to embed and answer, if they had it."""
    known, attention.compute_capability = attention.compute_capability, lambda: "9.0"
    found = sharing.divided(params, 4, lambda base, tree, places, advance: np.full(len(places), attention.by_cudnn()))
    attention.compute_capability = known
    return found.all().item() if found.all() == found.any() else None


for case in ASKED["cases"]:
    if "answer" in case:
        print(json.dumps(respond(**case)), flush=True)
        continue
    found, programs, sent = play(**case)
    if jax.process_index() > 0:
        continue  # the first process alone compares and prints
    expected = alone(case["strategy"], case.get("quantise", "none"), case.get("last", LAST))
    gaps = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), found, expected)
    print(json.dumps({**case, "gap": max(jax.tree.leaves(gaps)), "programs": programs, "sent": sent}), flush=True)
