"""Two rounds of whole algorithms against plain loops in torch, written from the papers' formulas."""

import jax
import numpy as np
import pytest
from helpers import assert_close, tiny_llama, word_rows

from fedrouter_jax import client, lora
from fedrouter_jax.data import schedule
from fedrouter_jax.federation import make_round
from fedrouter_jax.models import hf
from fedrouter_jax.routing import Enrolment
from fedrouter_jax.strategies import ditto, feddpa_t, fedit, fedrouter, fedsa, scaffold
from fedrouter_jax.types import LoRA

torch = pytest.importorskip("torch", reason="torch is a development dependency: pip install -r requirements-dev.txt")
transformers = pytest.importorskip("transformers")

CONFIG = lora.LoRAConfig(rank=2, alpha=4.0, dropout=0.0)
LOCAL = client.LocalConfig(steps=4, batch=2)
RATE, ROUNDS, SLOTS = 5e-3, 2, 3
TABLE = np.array([[0, 1], [1, 2], [2, 0]])  # slot of each client's local clusters
SIZES = np.array([[5, 4], [3, 6], [4, 4]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random Llama in torch, and as (config, params) here."""
    folder = tmp_path_factory.mktemp("llama")
    llama = tiny_llama(folder, seed=1).requires_grad_(False)
    return llama, *hf.load_folder(folder, "float32")


@pytest.fixture(scope="module")
def members():
    """Encoded rows by [client][local cluster]."""
    rng = np.random.default_rng(0)
    return [[word_rows(rng, count) for count in held] for held in SIZES]


@pytest.fixture(scope="module")
def start(model):
    """The first adapter, with a nonzero B."""
    _, decoder, _ = model
    fresh = lora.init(jax.random.key(3), decoder, CONFIG)
    return fresh._replace(b={m: 0.1 * jax.random.normal(jax.random.key(4), b.shape) for m, b in fresh.b.items()})


# --------------------------------------------------------------------------------------- the reference, in torch


def in_torch(adapter: LoRA, grad: bool) -> dict:
    leaves = {(side, m): leaf for side, leaves in (("a", adapter.a), ("b", adapter.b)) for m, leaf in leaves.items()}
    return {key: torch.tensor(np.array(leaf, np.float32), requires_grad=grad) for key, leaf in leaves.items()}


def in_numpy(adapter: dict) -> LoRA:
    return LoRA(*({m: leaf.detach().numpy() for (s, m), leaf in adapter.items() if s == side} for side in "ab"))


def local_steps(
    llama, adapters: dict[str, LoRA], moving: str, weights: dict[str, float], batches, pull=(0.0, None), drift=None
) -> LoRA:
    """AdamW on one named adapter; the forward pass is W x + sum of weight * alpha / r * (x A) B over all of them.

    `pull`: a factor, and the adapter that it draws to. `drift`: what is taken, times the learning rate, from each step.
    """
    pull, towards = pull[0], None if pull[1] is None else in_torch(pull[1], False)
    drift = None if drift is None else in_torch(drift, False)
    held = {name: in_torch(adapter, name == moving) for name, adapter in adapters.items()}
    hooks = []
    for number, block in enumerate(llama.model.layers):
        for module in CONFIG.targets:

            def add(_, inputs, output, number=number, module=module):
                for name, weight in weights.items():
                    a, b = (held[name][side, module][number] for side in "ab")
                    output = output + weight * CONFIG.scale * (inputs[0] @ a) @ b
                return output

            hooks.append(getattr(block.self_attn, module).register_forward_hook(add))
    optimiser = torch.optim.AdamW(held[moving].values(), lr=RATE, weight_decay=0.0)
    for rows in batches:
        total, count = 0.0, sum(len(row.response) for row in rows)
        for row in rows:
            ids = torch.tensor([row.prompt + row.response])
            scores = llama(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(scores, torch.tensor(row.response), reduction="sum")
        optimiser.zero_grad()
        (total / count).backward()
        for key, leaf in held[moving].items() if towards else ():
            leaf.grad += pull * (leaf.detach() - towards[key])
        torch.nn.utils.clip_grad_norm_(held[moving].values(), 1.0)
        optimiser.step()
        for key, leaf in held[moving].items() if drift else ():
            leaf.data -= RATE * drift[key]
    for hook in hooks:
        hook.remove()
    return in_numpy(held[moving])


def drawn(members, t: int, who: int, cluster: int) -> list:
    """The batches of a lane, by the same draw as the schedule's."""
    rows = members[who][cluster]
    order = schedule.draw(len(rows), LOCAL.steps * LOCAL.batch, np.random.default_rng([0, t, who, cluster]))
    return [[rows[i] for i in order[step * LOCAL.batch :][: LOCAL.batch]] for step in range(LOCAL.steps)]


def mean(adapters, weights):
    return jax.tree.map(lambda *leaves: np.average(leaves, axis=0, weights=weights), *adapters)


# --------------------------------------------------------------------------------------------- the algorithms here


def play(model, members, start, strategy, table) -> dict:
    """The bank after two rounds."""
    _, decoder, params = model
    enrolment = Enrolment(jax.numpy.asarray(table), SLOTS, (), np.zeros((len(table), 1), np.int32), {})
    update = client.make_client_update(decoder, CONFIG, LOCAL, optimiser=strategy.optimiser)
    run = make_round(strategy, update, lambda t: RATE, ROUNDS)
    state = strategy.init(dict.fromkeys(strategy.owners, start), enrolment)
    sizes = np.array([[len(rows) for rows in held] for held in members])
    for t in range(1, ROUNDS + 1):
        work = schedule.lanes(sizes, t, schedule.RoundConfig(), 0)
        batch = schedule.batches(work, members, t, LOCAL.steps, LOCAL.batch, 192, 48, 0, together=2)
        state, _ = run(state, params, work, batch, jax.random.key(0))
    return state.bank


def pooled(members):
    """The same rows, without local clusters."""
    return [[[row for rows in held for row in rows]] for held in members]


def one_cluster():
    return np.zeros((len(SIZES), 1), np.int32)


def test_fedit(model, members, start):
    members, rows = pooled(members), SIZES.sum(axis=1)
    found = play(model, members, start, fedit(), one_cluster())
    shared = start
    for t in (1, 2):
        trained = [local_steps(model[0], {"g": shared}, "g", {"g": 1.0}, drawn(members, t, c, 0)) for c in range(3)]
        shared = mean(trained, rows)
    assert_close(jax.tree.map(lambda leaf: leaf[0], found["main"]), shared, 1e-4)


def test_fedsa(model, members, start):
    members, rows = pooled(members), SIZES.sum(axis=1)
    found = play(model, members, start, fedsa(), one_cluster())["main"]
    a, own = start.a, [start.b] * 3
    for t in (1, 2):
        trained = [
            local_steps(model[0], {"g": LoRA(a, own[c])}, "g", {"g": 1.0}, drawn(members, t, c, 0)) for c in range(3)
        ]
        a, own = mean([adapter.a for adapter in trained], rows), [adapter.b for adapter in trained]
    assert_close(jax.tree.map(lambda leaf: leaf[0], found.a), a, 1e-4)
    for c in range(3):
        assert_close(jax.tree.map(lambda leaf, c=c: leaf[c], found.b), own[c], 1e-4)


def test_feddpa_t(model, members, start):
    members, rows = pooled(members), SIZES.sum(axis=1)
    found = play(model, members, start, feddpa_t(mix=0.3), one_cluster())
    shared, own = start, [start] * 3
    for t in (1, 2):
        sent = []
        for c in range(3):
            batches = drawn(members, t, c, 0)
            both = {"global": shared, "local": own[c]}
            own[c] = local_steps(model[0], both, "local", {"global": 0.7, "local": 0.3}, batches[:2])
            sent.append(local_steps(model[0], {"global": shared}, "global", {"global": 1.0}, batches[2:]))
        shared = mean(sent, rows)
    assert_close(jax.tree.map(lambda leaf: leaf[0], found["global"]), shared, 1e-4)
    for c in range(3):
        assert_close(jax.tree.map(lambda leaf, c=c: leaf[c], found["local"]), own[c], 1e-4)


def test_scaffold(model, members, start):
    """The control variates by option II of the paper, c_i - c + (x - y) / (K lr), not step by step."""
    members, rows = pooled(members), SIZES.sum(axis=1)
    found = play(model, members, start, scaffold(), one_cluster())
    x, own = start, [jax.tree.map(np.zeros_like, start)] * 3
    for t in (1, 2):
        everybodys = mean(own, np.ones(3))
        drifts = [jax.tree.map(np.subtract, everybodys, c) for c in own]
        trained = [
            local_steps(model[0], {"g": x}, "g", {"g": 1.0}, drawn(members, t, c, 0), drift=drifts[c]) for c in range(3)
        ]
        own = [
            jax.tree.map(lambda d, x, y: -d + (x - y) / (LOCAL.steps * RATE), drift, x, y)
            for drift, y in zip(drifts, trained, strict=True)
        ]
        x = mean(trained, rows)
    assert_close(jax.tree.map(lambda leaf: leaf[0], found["main"]), x, 1e-4)


def test_ditto(model, members, start):
    members, rows = pooled(members), SIZES.sum(axis=1)
    found = play(model, members, start, ditto(pull=5.0), one_cluster())
    shared, own = start, [start] * 3
    for t in (1, 2):
        sent = []
        for c in range(3):
            batches = drawn(members, t, c, 0)
            own[c] = local_steps(model[0], {"v": own[c]}, "v", {"v": 1.0}, batches[:2], pull=(5.0, shared))
            sent.append(local_steps(model[0], {"g": shared}, "g", {"g": 1.0}, batches[2:]))
        shared = mean(sent, rows)
    assert_close(jax.tree.map(lambda leaf: leaf[0], found["global"]), shared, 1e-4)
    for c in range(3):
        assert_close(jax.tree.map(lambda leaf, c=c: leaf[c], found["own"]), own[c], 1e-4)


def test_fedrouter(model, members, start):
    found = play(model, members, start, fedrouter(), TABLE)["main"]
    slots = [start] * SLOTS
    for t in (1, 2):
        cluster = (t - 1) % 2  # every client trains its local clusters in turn
        returned = {slot: [] for slot in range(SLOTS)}
        for c in range(3):
            slot = TABLE[c, cluster]
            adapter = local_steps(model[0], {"s": slots[slot]}, "s", {"s": 1.0}, drawn(members, t, c, cluster))
            returned[slot].append((adapter, SIZES[c, cluster]))
        for slot, pairs in returned.items():
            slots[slot] = mean(*zip(*pairs, strict=True)) if pairs else slots[slot]
    for slot in range(SLOTS):
        assert_close(jax.tree.map(lambda leaf, slot=slot: leaf[slot], found), slots[slot], 1e-4)
