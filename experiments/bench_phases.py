"""The phases that `bench.py` times: what each side does, and what its first results must be to count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from sklearn.cluster import KMeans

from experiments.torch_baseline import flow
from fedrouter_jax import at_once, bank, client, experiment, generate, kmeans, lora, peft_io, routing
from fedrouter_jax.config import Config
from fedrouter_jax.data import schedule, tokens
from fedrouter_jax.errors import UserError
from fedrouter_jax.experiment import Prepared
from fedrouter_jax.presets import demo
from fedrouter_jax.types import LoRA
from fedrouter_jax.weighted_rows import padded

LANES, SLOTS = 8, 4
POINTS, WIDTH = 96, 576  # K-Means: rows of a client
# How far a side may be from the published flow: embeddings by this much of the largest number, losses as they are; and
# the share of answers that must be the same, for greedy ones part ways where two tokens are as likely. A model that is
# in bfloat16 altogether rounds its loss too, to three digits: of a few short answers that shows.
ALIKE = {
    "float32": {
        "embeddings": {"ours": 1e-3, "best effort": 1e-3, "ours, mixed": 3e-2, "best effort, bf16": 3e-2},
        "losses": {"ours": 1e-2, "best effort": 1e-2, "ours, mixed": 1e-1, "best effort, bf16": 2e-1},
        "answers": {"ours": 0.75, "best effort": 0.75, "ours, mixed": 0.25, "best effort, bf16": 0.25},
    },
    "bfloat16": {
        "embeddings": {"ours": 3e-2, "best effort": 3e-2},
        "losses": {"ours": 2e-1, "best effort": 2e-1},
        "answers": {"ours": 0.4, "best effort": 0.4},
    },
}


class Phase(NamedTuple):
    """What each side does, and what its first results are worth."""

    sides: dict[str, Callable[[], Any]]
    # Of the sides' first results: useful tokens or rows by side ("" for those not named); UserError where they differ.
    useful: Callable[[dict[str, Any]], dict[str, int]]
    unit: str = "tokens"


@dataclass(frozen=True)
class Load:
    """How much work a phase is."""

    texts: int  # to embed
    steps: int  # of each lane
    batch: int  # rows of a step
    prompts: int  # to answer
    new: int  # tokens of an answer, at most
    clients: int  # of K-Means
    rounds: int  # of training before answers are timed
    rows: int = 48  # of a client


class Peer(NamedTuple):
    """A flow in PyTorch on a model."""

    name: str
    flow: flow.Flow
    model: Any


def same(what: str, found: dict[str, Any], most: dict[str, float]) -> None:
    """Refuse to go on where a side's results are further from the published flow's than they may be."""
    for side, limit in most.items():
        gap = float(np.abs(np.array(found[side]) - np.array(found["published"])).max()) if side in found else 0
        if not gap <= limit:  # nor is a number that is none near enough
            raise UserError(
                f"{what}: {side!r} and 'published' differ by {gap:.1e}, more than {limit:.1e}; no use to time them"
            )


def setting(data: str, load: Load) -> Config:
    """Eight clients that hold two tasks each; no dropout, so that both sides compute the same."""
    config = demo()
    real = data != "synthetic"
    rows = replace(
        config.data, data=data, clients=LANES, test_rows=load.prompts, mix_rows=load.prompts,
        train_rows=load.rows, max_length=320 if real else 192, max_response=48 if real else 24,
    )  # fmt: skip
    return replace(
        config,
        data=rows,
        lora=replace(config.lora, dropout=0.0),
        local=replace(config.local, steps=load.steps, batch=load.batch),
        cluster=replace(config.cluster, recipe="paper"),
    )


def fresh(prepared: Prepared) -> LoRA:
    """An adapter as training starts from."""
    return lora.init(jax.random.key(0), prepared.model.config, prepared.config.lora)


def spread(values: list, count: int) -> list:
    """So many of them, evenly."""
    return values[:: max(1, len(values) // count)][:count]


def texts_of(prepared: Prepared, load: Load) -> list[str]:
    """Training texts of all clients."""
    held = [i for held in prepared.partition.clients for i in held.train]
    return [prepared.dataset.train[i].instruction for i in spread(held, load.texts)]


def asked(prepared: Prepared, load: Load) -> list[int]:
    """Test rows of all tasks."""
    return spread(list(prepared.test), load.prompts)


def embedding(mine: dict[str, Prepared], peers: list[Peer], load: Load) -> Phase:
    """Mean states of the last layer of some texts."""
    prepared = mine["ours"]
    texts = texts_of(prepared, load)
    ids = tokens.encode_texts(prepared.model.tokenizer, texts, prepared.config.data.max_length)
    pad = prepared.model.tokenizer.pad_token_id
    cluster = replace(prepared.config.cluster, recipe="refined")
    shallow = prepared._replace(config=replace(prepared.config, cluster=cluster))
    sides: dict[str, Callable] = {
        side: lambda each=each: experiment.embed_texts(each, texts)
        for side, each in (mine | {"ours, refined": shallow}).items()
    }
    sides |= {each.name: lambda each=each: flow.embed(each.model, ids, pad, each.flow) for each in peers}

    def useful(found):
        largest = float(np.abs(found["published"]).max())
        alike = ALIKE[prepared.config.dtype]["embeddings"]
        same("embeddings", found, {side: most * largest for side, most in alike.items()})
        return {"": sum(map(len, ids))}

    return Phase(sides, useful)


def training(mine: dict[str, Prepared], peers: list[Peer]) -> Phase:
    """A round of eight lanes on four slots, two lanes to a slot."""
    prepared = mine["ours"]
    config, pad = prepared.config, prepared.model.tokenizer.pad_token_id
    labels = [np.arange(len(held)) % 2 for held in prepared.train]
    table = jnp.asarray([[c % SLOTS, (c + 1) % SLOTS] for c in range(LANES)], jnp.int32)
    width = prepared.model.config.width
    router = routing.Router(jnp.zeros((SLOTS, width)), jnp.zeros(width), jnp.ones(width), jnp.asarray(False))
    enrolment = routing.Enrolment(table, SLOTS, router, padded(labels), {})
    members = experiment.members(prepared, enrolment)
    work, _ = experiment.round_inputs(prepared, members, 1)
    steps, size = config.local.steps, config.local.batch
    lanes = []
    for c, k, weight in zip(work.client, work.cluster, work.weight, strict=True):
        drawn = schedule.rows_of_steps(members[c][k], steps, size, [config.seed, 1, int(c), int(k)])
        lanes.append((int(table[c, k]), float(weight), drawn))
    given = {name: leaf.detach().clone() for name, leaf in flow.get_peft_model_state_dict(peers[0].model).items()}
    rate = float(client.learning_rate(config.local, config.rounds.rounds, 1))

    def ours(prepared):
        state, inputs = experiment.start(prepared, enrolment), experiment.round_inputs(prepared, members, 1)
        return [lane["loss"] for lane in experiment.train_round(prepared, state, *inputs)[1]["lanes"]]

    compiled: dict[str, tuple[Any, Callable]] = {}

    def other(each):
        base = each.model.get_base_model()
        if each.name not in compiled:
            # On a CPU a compiled layer is slower than one that is not (docs/log.md).
            what = each.flow.compiled if each.model.device.type == "cuda" else "nothing"
            compiled[each.name] = (base, base.forward) if what == "nothing" else flow.compiled(each.model, what)
        whose, forward = compiled[each.name]
        with patch.object(whose, "forward", forward):  # in training only: other phases share the model
            return flow.train_round(each.model, [given] * SLOTS, lanes, rate, pad, each.flow)[1]

    def useful(found):
        same("losses", found, ALIKE[config.dtype]["losses"])
        return {"": sum(row.length for _, _, drawn in lanes for rows in drawn for row in rows)}

    sides = {side: lambda each=each: ours(each) for side, each in mine.items()}
    return Phase(sides | {each.name: lambda each=each: other(each) for each in peers}, useful)


def trained(prepared: Prepared, load: Load, console: Console) -> LoRA:
    """An adapter of each task, leaves [task, ...]: trained, so that answers are as long as they are in use."""
    known = experiment.prepare(replace(prepared.config, strategy="oracle"), prepared.model)
    enrolment = experiment.enroll(known, None)
    state, rows = experiment.start(known, enrolment), experiment.members(known, enrolment)
    for t in range(1, load.rounds + 1):
        state, record = experiment.train_round(known, state, *experiment.round_inputs(known, rows, t))
        console.print(f"training adapters to answer with, round {t}: loss {record['loss']:.2f}")
    return bank.serving(state.bank)


def generation(mine: dict[str, Prepared], adapters: LoRA, peers: list[Peer], load: Load, new: int) -> Phase:
    """Answers to prompts of all tasks by their tasks' adapters. Useful are the tokens read and written."""
    prepared = mine["ours"]
    config, tokenizer = prepared.config, prepared.model.tokenizer
    rows, tasks = asked(prepared, load), prepared.partition.tasks
    prompts = [prepared.test[row].prompt for row in rows]
    slots = [tasks.index(prepared.dataset.test[row].task) for row in rows]
    gates = np.asarray(lora.gates(jax.nn.one_hot(jnp.asarray(slots), len(tasks)), config.lora))
    theirs_bank = [
        in_torch(jax.tree.map(lambda leaf, s=slot: leaf[s], adapters), peers[0].model.device)
        for slot in range(len(tasks))
    ]

    def ours(params):
        return generate.generate(
            prepared.model.config, params, prompts, lora.concatenate(adapters), gates,
            stop=tokenizer.eos_token_id, new_tokens=new,
            rows_at_once=at_once.rows(config, prepared.model, prompts),
            packs_at_once=at_once.packs(config), shrinks=jax.default_backend() == "cpu",
        )  # fmt: skip

    def other(each):
        return flow.generate(
            each.model, theirs_bank, slots, prompts, tokenizer.pad_token_id, tokenizer.eos_token_id, new, each.flow
        )

    def useful(found):
        for side, least in ALIKE[config.dtype]["answers"].items():
            pairs = zip(found.get(side, found["published"]), found["published"], strict=True)
            if (agreed := np.mean([one == other for one, other in pairs])) < least:
                raise UserError(
                    f"{side!r} and 'published' agree in only {agreed:.0%} of the answers; no use to time them"
                )
        # Those of rounded weights end elsewhere, so each side has its own count.
        read = sum(map(len, prompts))
        return {
            side: read + sum(min(len(answer) + 1, new) for answer in answers)  # with the end, where it was written
            for side, answers in found.items()
        }

    sides = {side: lambda each=each: ours(each.model.params) for side, each in mine.items()}
    return Phase(sides | {each.name: lambda each=each: other(each) for each in peers}, useful)


def in_torch(adapter: LoRA, device) -> dict:
    """An adapter as a PEFT state dict."""
    return {name: torch.tensor(leaf, device=device) for name, leaf in peft_io.tensors(adapter).items()}


def clustering(load: Load) -> Phase:
    """K-Means with ten starts of every client's rows: all clients in one program, against one after the other."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(load.clients, SLOTS, WIDTH))
    rows = centres[:, rng.integers(0, SLOTS, POINTS)] + 0.5 * rng.normal(size=(load.clients, POINTS, WIDTH))
    rows = rows.astype(np.float32)
    keys = jax.random.split(jax.random.key(0), load.clients)
    fit = jax.jit(jax.vmap(lambda key, x: kmeans.fit(key, x, SLOTS, restarts=10).inertia))

    def ours():
        return np.asarray(fit(keys, rows))

    def theirs():
        return np.array([KMeans(SLOTS, n_init=10, random_state=0).fit(x).inertia_ for x in rows])

    def useful(found):
        if not np.allclose(found["ours"], found["scikit-learn"], rtol=1e-2):
            raise UserError("the K-Means of both sides reach different inertias; no use to time them")
        return {"": load.clients * POINTS}

    return Phase({"ours": ours, "scikit-learn": theirs}, useful, "rows")


def nearest(load: Load, device: str) -> Phase:
    """The nearest of 16 centroids for every row of every client."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(load.clients * POINTS, WIDTH)).astype(np.float32)
    centroids = rng.normal(size=(16, WIDTH)).astype(np.float32)

    def ours():
        return np.asarray(kmeans.nearest(rows, centroids)[0])

    def theirs():
        points = (torch.from_numpy(part).to(device) for part in (rows, centroids))
        return torch.cdist(*points).argmin(dim=1).cpu().numpy()

    def useful(found):
        if (found["ours"] != found["torch"]).mean() > 1e-3:  # sums in another order decide between near equals
            raise UserError("both sides route rows to different centroids; no use to time them")
        return {"": len(rows)}

    return Phase({"ours": ours, "torch": theirs}, useful, "rows")
