"""FedLEASE: one expert for each cluster of alike clients, and for every token a choice among all experts.

Wang et al., "Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning", NeurIPS 2025, arXiv 2509.15087.

    round 1   client: trains an adapter alone
              server: d(i, j) = mean over layers of 1 - cos(B_i, B_j); average-linkage clusters, their number M by
                      silhouette; expert m = mean of the adapters of its clients
    then      client: h = W0 x + sum over the M highest of 2M - 1 scores g(x) of softmax(g) B A x; M scores belong to
                      its own expert and one to every other, so it may use one to M experts; trains its own expert
                      and the scores
              server: per cluster, average the own experts and the scores

An adapter goes up, and all experts come down.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedrouter_jax import bank as bank_lib
from fedrouter_jax.federation import owned
from fedrouter_jax.types import LoRA, Phase, Strategy


def fedlease(experts: int = 4) -> Strategy:
    """A slot an expert, at most `experts`. Averaged: experts and scores inside a cluster. Private: nothing."""
    others = [f"other_{step}" for step in range(1, experts)]  # of cluster m: expert m + step, modulo M
    owners = {"own": "cluster", **dict.fromkeys(others, LoRA(a="copied", b="copied", gate="cluster"))}
    create, ask, sums_of, write = owned(owners)

    def init(adapters, enrolment):
        # Scores start as A does: uniform, bounded by 1 / sqrt(in). Two columns are never the same.
        fresh = adapters["own"].a
        columns = {
            module: jnp.stack([jnp.roll(a[..., c % a.shape[-1]], c, axis=1) for c in range(2 * experts - 1)], axis=-1)
            for module, a in fresh.items()
        }
        seats = {"own": {module: scores[..., :experts] for module, scores in columns.items()}}
        for number, name in enumerate(others, experts):
            seats[name] = {module: scores[..., number : number + 1] for module, scores in columns.items()}
        given = {name: adapter._replace(gate=seats[name]) for name, adapter in adapters.items()}
        state = create(given, enrolment._replace(clusters=experts))
        trained = {"a": fresh, "b": adapters["own"].b}
        warm = jax.tree.map(lambda leaf: jnp.zeros((len(state.table), *leaf.shape), leaf.dtype), trained)
        return state._replace(table=jnp.zeros_like(state.table), memory=warm)

    def collect(state, work):
        """Beside the sums, the adapters of round 1, which the memory keeps by client."""
        nothing, add = sums_of(state, work)

        def added(sums, lanes, adapters):
            takes = (state.round == 0) & (lanes.weight > 0)

            def noted(kept, new):
                return kept.at[lanes.client].add(jnp.where(bank_lib.expand(takes, new), new, 0))

            trained = {"a": adapters["own"].a, "b": adapters["own"].b}
            return add(sums[0], lanes, adapters), jax.tree.map(noted, sums[1], trained)

        return (nothing, jax.tree.map(jnp.zeros_like, state.memory)), added

    def tell(state, sums):
        return write(state, sums[0])._replace(memory=jax.tree.map(jnp.add, state.memory, sums[1]))

    def copied(state):
        """The others' slots hold what the experts have become."""
        own, count = state.bank["own"], state.table.max() + 1
        bank = {"own": own}
        for step, name in enumerate(others, 1):
            whose = (jnp.arange(experts) + step) % count
            taken = jax.tree.map(lambda leaf, whose=whose: leaf[whose], own)
            bank[name] = state.bank[name]._replace(a=taken.a, b=taken.b)
        return state._replace(bank=bank)

    def regroup(state):
        if int(state.round) != 1:
            return state
        labels = alike(state.memory["b"], experts)
        count = labels.max() + 1
        present = sent(state.memory["b"])

        def mean(name):
            def of_leaf(leaf, warm):
                found = np.array(leaf)
                for expert in range(count):
                    members = (labels == expert) & present
                    if members.any():
                        found[expert] = np.asarray(warm)[members].mean(axis=0)
                return jnp.asarray(found)

            return jax.tree.map(of_leaf, getattr(state.bank["own"], name), state.memory[name])

        def seated(gate, seats):
            """A column without weights is no seat."""
            return {module: scores * (jnp.arange(scores.shape[-1]) < seats) for module, scores in gate.items()}

        own = LoRA(mean("a"), mean("b"), seated(state.bank["own"].gate, count))
        bank = {"own": own}
        for step, name in enumerate(others, 1):
            bank[name] = state.bank[name]._replace(gate=seated(state.bank[name].gate, int(step < count)))
        table = jnp.broadcast_to(jnp.asarray(labels, state.table.dtype)[:, None], state.table.shape)
        # Until now everybody was in the first slot: the server's optimiser starts every expert as it started the last.
        server = jax.tree.map(lambda leaf: jnp.repeat(leaf[-1:], len(leaf), axis=0), state.server)
        return copied(state._replace(bank=bank, table=table, server=server))

    def phases(round, rounds):
        later = jnp.asarray(round > 1)
        moves = {"own": LoRA(True, True, later), **dict.fromkeys(others, LoRA(False, False, later))}
        return (Phase(train=moves, weights={"own": 1.0, **dict.fromkeys(others, jnp.where(later, 1.0, 0.0))}),)

    def route(state, clients, view, mode):
        here = jax.nn.one_hot(state.table[clients, 0], experts)
        return bank_lib.weights(state.bank, dict.fromkeys(state.bank, here))

    def traffic(state, lanes, size):
        """Up an expert and the scores of one's own cluster, down all experts and those scores; at first an adapter."""
        if int(state.round) < 2:
            return size, size
        own, found = state.bank["own"], int(state.table.max()) + 1
        expert = sum(leaf.size // leaf.shape[0] * leaf.dtype.itemsize for leaf in jax.tree.leaves((own.a, own.b)))
        scores = (size - expert) * (2 * found - 1) // (2 * experts - 1)  # seats without an expert are not sent
        return expert + scores, found * expert + scores

    return Strategy(
        "fedlease", owners, init, ask, collect, tell, route, phases=phases, regroup=regroup, traffic=traffic,
        derive=copied, finds_slots=True,
    )  # fmt: skip


def alike(b: dict, most: int) -> np.ndarray:
    """The cluster of each client, int [client], numbered as clients meet them; `b` has leaves [client, layer, ...].

    Two to `most` clusters, of highest silhouette. Clients that sent nothing go to the largest.
    """
    present = sent(b)
    labels = np.zeros(len(present), int)
    found = _clusters({module: np.asarray(leaf)[present] for module, leaf in b.items()}, most)
    labels[present] = found
    labels[~present] = np.bincount(found).argmax() if len(found) else 0
    return labels


def sent(b: dict) -> np.ndarray:
    """Which clients sent an update, bool [client]: B starts at zero."""
    return np.any([np.abs(leaf).max(axis=(1, 2, 3)) > 0 for leaf in map(np.asarray, b.values())], axis=0)


def _clusters(b: dict, most: int) -> np.ndarray:
    clients = len(next(iter(b.values())))
    if clients < 3 or most < 2:
        return np.arange(clients) % most
    # Here, for it takes a second, and every command loads the strategies.
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    distances = []
    for leaf in b.values():
        flat = leaf.astype(np.float64).reshape(clients, leaf.shape[1], -1)
        unit = flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-12)
        distances.append(1 - np.einsum("ild,jld->ij", unit, unit) / leaf.shape[1])
    distance = np.clip(np.mean(distances, axis=0), 0, 2)
    np.fill_diagonal(distance, 0)
    found = {
        count: AgglomerativeClustering(count, metric="precomputed", linkage="average").fit_predict(distance)
        for count in range(2, min(most, clients - 1) + 1)
    }
    best = max(found, key=lambda count: silhouette_score(distance, found[count], metric="precomputed"))
    first = list(dict.fromkeys(found[best].tolist()))
    return np.array([first.index(label) for label in found[best].tolist()])
