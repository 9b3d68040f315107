"""K-means and silhouettes against scikit-learn, and the rules for weights, masks, ties and empty clusters."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as Oracle
from sklearn.metrics import silhouette_samples, silhouette_score
from threadpoolctl import threadpool_limits

from fedrouter_jax import kmeans, silhouette, weighted_rows
from fedrouter_jax.errors import UserError

few = settings(max_examples=10, deadline=None, derandomize=True)
seeds = st.integers(0, 2**16)


def blobs(rng, row, width, k, spread):
    centers = rng.normal(size=(k, width)) * spread
    which = np.concatenate([np.arange(k), rng.integers(k, size=row - k)])
    return (centers[which] + rng.normal(size=(row, width))).astype(np.float32), which


def problem(rng, kind, row, width, k):
    """Separated, overlapping, overlapping and weighted, uniform noise, duplicates and weighted."""
    weight = np.ones(row)
    if kind == 3:
        x = rng.uniform(size=(row, width))
    else:
        x = blobs(rng, row, width, k, (10, 1, 1.5, 0, 2)[kind])[0]
    if kind == 2:
        weight = rng.gamma(1.0, size=row) + 0.01
    if kind == 4:
        x = x[rng.integers(max(2 * k, row // 3), size=row)]
        weight = rng.integers(1, 4, size=row)
    return x.astype(np.float32), weight.astype(np.float32)


def cost(x, weight, labels, centers):
    return float(np.sum(weight * np.sum((x.astype(float) - np.asarray(centers, float)[labels]) ** 2, axis=1)))


@few
@given(seed=seeds, kind=st.integers(0, 4), shift=st.sampled_from([0.0, 50.0]))
def test_rows_in_a_wider_space_cluster_the_same(seed, kind, shift):
    # With fewer rows than columns the search knows rows by their products alone.
    x, weight = problem(np.random.default_rng(seed), kind, 40, 6, 5)
    x = x + np.float32(shift)
    found = kmeans.fit(jax.random.key(seed), x, 5, weight=weight)
    wide = kmeans.fit(jax.random.key(seed), np.pad(x, [(0, 0), (0, 64)]), 5, weight=weight)
    np.testing.assert_allclose(wide.inertia, found.inertia, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(wide.inertia, cost(x, weight, wide.labels, wide.centers[:, :6]), rtol=1e-4, atol=1e-5)
    assert not np.any(wide.centers[:, 6:])


@pytest.mark.parametrize(("row", "width", "k"), [(60, 8, 8), (120, 4, 16), (150, 3, 10), (300, 32, 4), (60, 90, 6)])
def test_never_worse_than_scikit_learn(row, width, k):
    rng = np.random.default_rng(row + k)
    x, weight = (np.stack(part) for part in zip(*(problem(rng, i % 5, row, width, k) for i in range(50)), strict=True))
    # The suite's programs are compiled without a care for how fast they run; this one runs for long.
    with_care = {"xla_backend_optimization_level": 1}
    fit = jax.jit(
        jax.vmap(lambda key, x, weight: kmeans.fit(key, x, k, weight=weight, restarts=10)), compiler_options=with_care
    )
    found = jax.tree.map(np.asarray, fit(jax.random.split(jax.random.key(0), len(x)), x, weight))
    for i in range(len(x)):
        with threadpool_limits(1):  # its threads cost more than they save on small problems
            oracle = Oracle(k, n_init=10, random_state=i).fit(x[i].astype(float), sample_weight=weight[i].astype(float))
        ours = cost(x[i], weight[i], found.labels[i], found.centers[i])
        np.testing.assert_allclose(found.inertia[i], ours, rtol=1e-4)
        assert ours <= 1.001 * oracle.inertia_, (i, ours / oracle.inertia_)


@pytest.fixture(scope="module")
def small_fit():
    return jax.jit(lambda key, x, weight: kmeans.fit(key, x, 3, weight=weight, restarts=4))


@few
@given(seeds)
def test_a_fit_is_a_fixed_point(small_fit, seed):
    rng = np.random.default_rng(seed)
    x, _ = blobs(rng, 40, 5, 3, 1)
    weight = rng.gamma(1.0, size=40).astype(np.float32) * (rng.uniform(size=40) > 0.2)
    found = small_fit(jax.random.key(seed), x, weight)
    labels, distances = kmeans.nearest(x, found.centers)
    there = weight > 0
    np.testing.assert_array_equal(np.where(there, labels, -1), found.labels)
    expected = np.sum((x[:, None].astype(float) - np.asarray(found.centers, float)) ** 2, axis=-1)
    np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-5)
    for c in range(3):
        mine = np.asarray(found.labels) == c
        assert found.counts[c] == mine.sum() > 0
        np.testing.assert_allclose(found.centers[c], np.average(x[mine], axis=0, weights=weight[mine]), atol=1e-5)


@few
@given(seeds, st.sampled_from([1e30, -1e30, np.inf, np.nan]))
def test_absent_rows_change_nothing(small_fit, seed, garbage):
    rng = np.random.default_rng(seed)
    x, _ = blobs(rng, 40, 5, 3, 2)
    there = rng.uniform(size=40) > 0.3
    weight = there.astype(np.float32)
    clean = small_fit(jax.random.key(seed), np.where(there[:, None], x, 0), weight)
    dirty = small_fit(jax.random.key(seed), np.where(there[:, None], x, np.float32(garbage)), weight)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    np.testing.assert_array_equal(np.asarray(clean.labels) == -1, ~there)


@few
@given(seeds)
def test_integer_weights_are_repeated_rows(small_fit, seed):
    rng = np.random.default_rng(seed)
    x, _ = blobs(rng, 20, 5, 3, 10)
    repeats = rng.integers(1, 3, size=20)
    pad = 40 - repeats.sum()
    weighted = small_fit(jax.random.key(0), np.pad(x, ((0, 20), (0, 0))), np.pad(repeats, (0, 20)).astype(np.float32))
    repeated = small_fit(
        jax.random.key(1),
        np.pad(np.repeat(x, repeats, axis=0), ((0, pad), (0, 0))),
        (np.arange(40) < repeats.sum()).astype(np.float32),
    )
    np.testing.assert_allclose(weighted.inertia, repeated.inertia, rtol=1e-4)


@few
@given(seeds, st.sampled_from([1e-12, 1e-3, 1e6, 1e12]), st.sampled_from([0.0, 1e3]))
def test_scaling_and_translating_keep_the_labels(small_fit, seed, scale, offset):
    rng = np.random.default_rng(seed)
    x, which = blobs(rng, 40, 5, 3, 30)
    found = small_fit(jax.random.key(seed), ((x + offset) * scale).astype(np.float32), np.ones(40, np.float32))
    plain = small_fit(jax.random.key(seed), x, np.ones(40, np.float32))
    pairs = set(zip(np.asarray(plain.labels).tolist(), np.asarray(found.labels).tolist(), strict=True))
    assert len(pairs) == 3


def test_clients_under_vmap_equal_single_fits(small_fit):
    rng = np.random.default_rng(0)
    x = np.stack([blobs(rng, 40, 5, 3, 8)[0] for _ in range(4)])
    weight = (rng.uniform(size=(4, 40)) > np.array([[0.0], [0.3], [0.6], [1.0]])).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), 4)
    together = jax.vmap(small_fit)(keys, x, weight)
    for i in range(4):
        alone = small_fit(keys[i], x[i], weight[i])
        np.testing.assert_array_equal(together.labels[i], alone.labels)
        np.testing.assert_array_equal(together.counts[i], alone.counts)
        np.testing.assert_allclose(together.centers[i], alone.centers, atol=1e-4)


def test_no_row_present():
    found = kmeans.fit(jax.random.key(0), jnp.full((5, 2), jnp.nan), 3, weight=jnp.zeros(5), restarts=2)
    assert np.all(np.asarray(found.labels) == -1) and np.all(np.asarray(found.counts) == 0)
    assert np.all(np.asarray(found.centers) == 0) and found.inertia == 0


@pytest.mark.parametrize("there", [[1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 0, 0]])
def test_fewer_distinct_rows_than_clusters(there):
    x = jnp.array([[5.0, 1], [2, 2], [5, 1], [-0.0, 7], [2, 2], [0, 7]])
    found = kmeans.fit(jax.random.key(0), x, 5, weight=jnp.array(there, jnp.float32), restarts=2)
    labels = [0, 1, 0, 2, 1, 2] if there[1] else [0, -1, -1, 1, -1, -1]
    used = max(labels) + 1
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(np.asarray(found.counts) > 0, np.arange(5) < used)
    assert found.inertia == 0
    mean = np.average(x, axis=0, weights=there)
    np.testing.assert_allclose(found.centers[used:], np.broadcast_to(mean, (5 - used, 2)), atol=1e-6)
    assert np.all(np.asarray(kmeans.nearest(x, found.centers, found.counts > 0)[0]) < used)


def test_one_cluster_is_the_weighted_mean():
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(30, 4)).astype(np.float32) + 1e3, rng.gamma(1.0, size=30).astype(np.float32)
    found = kmeans.fit(jax.random.key(0), x, 1, weight=weight, restarts=2)
    center = np.average(x.astype(float), axis=0, weights=weight)
    np.testing.assert_allclose(found.centers[0], center, rtol=1e-6)
    np.testing.assert_allclose(found.inertia, cost(x, weight, np.zeros(30, int), center[None]), rtol=1e-4)


def test_more_distinct_rows_than_clusters_leave_none_empty():
    x = np.repeat(np.array([[0.0, 0], [0, 1], [100, 0], [100, 1], [100, 3]], np.float32), [90, 1, 90, 1, 1], axis=0)
    found = kmeans.fit(jax.random.key(0), x, 4, restarts=3)
    assert np.all(np.asarray(found.counts) > 0)
    np.testing.assert_allclose(found.inertia, 90 / 91, rtol=1e-3)


def test_an_empty_cluster_takes_the_costliest_row():
    x = jnp.array([[0.0], [1], [2], [10]])
    rows = weighted_rows.Rows(x, x[:, 0] ** 2, jnp.ones(4))
    centers = kmeans._lloyd(rows, jnp.array([[1.0], [500.0]]), jnp.ones(2, bool), 0.0)
    np.testing.assert_allclose(centers, [[1], [10]])


def test_ties_go_to_the_lowest_index():
    x = jnp.zeros((2, 3))
    centers = jnp.array([[9.0, 9, 9], [1, 0, 0], [0, 1, 0], [1, 0, 0]])
    assert kmeans.nearest(x, centers)[0].tolist() == [1, 1]
    labels, distances = kmeans.nearest(x, centers.at[1].set(jnp.nan), jnp.array([True, False, True, True]))
    assert labels.tolist() == [2, 2] and np.isinf(distances[0, 1])
    assert kmeans.nearest(x, centers, jnp.zeros(4, bool))[0].tolist() == [-1, -1]


@pytest.mark.parametrize(("row", "width", "k"), [(30, 3, 4), (700, 16, 5)])
def test_silhouettes_equal_scikit_learn(row, width, k):
    rng = np.random.default_rng(row)
    x, labels = blobs(rng, row, width, k, 3)
    x += 100
    labels[labels == k - 1] = 0
    labels[7] = k - 1  # alone in its cluster
    there = rng.uniform(size=row) > 0.2
    there[7] = True
    given_labels = np.where(there, labels, -1)
    garbage = np.where(there[:, None], x, np.nan)
    mean, samples = silhouette.silhouette(garbage, given_labels, k + 2)
    np.testing.assert_allclose(mean, silhouette_score(x[there].astype(float), labels[there]), atol=1e-4)
    np.testing.assert_allclose(samples[there], silhouette_samples(x[there].astype(float), labels[there]), atol=1e-4)
    assert samples[7] == 0 and np.all(np.asarray(samples)[~there] == 0)
    masked = silhouette.silhouette(garbage, labels, k + 2, there.astype(np.float32))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), masked, (mean, samples))


def test_weighted_silhouettes_by_the_definition():
    rng = np.random.default_rng(4)
    x, labels = blobs(rng, 25, 3, 3, 2)
    weight = rng.gamma(1.0, size=25).astype(np.float32)
    away = np.linalg.norm(x[:, None] - x, axis=-1)
    expected = []
    for i in range(25):
        groups = [(labels == c) & (np.arange(25) != i) for c in range(3)]
        means = [np.average(away[i, g], weights=weight[g]) if g.any() else 0 for g in groups]
        a, b = means[labels[i]], min(m for c, m in enumerate(means) if c != labels[i])
        expected.append((b - a) / max(a, b) if groups[labels[i]].any() else 0)
    mean, samples = silhouette.silhouette(x, labels, 3, weight)
    np.testing.assert_allclose(samples, expected, atol=1e-4)
    np.testing.assert_allclose(mean, np.average(expected, weights=weight), atol=1e-4)


def test_one_cluster_has_no_silhouette():
    mean, samples = silhouette.silhouette(np.eye(4, dtype=np.float32), np.zeros(4, int), 2)
    assert mean == 0 and np.all(np.asarray(samples) == 0)


def test_choose_k_finds_the_number_of_blobs():
    rng = np.random.default_rng(5)
    x, which = blobs(rng, 80, 6, 4, 20)
    scores, best = silhouette.choose_k(jax.random.key(0), x, (6, 4, 2, 3, 1), restarts=3)
    assert best == 1 and np.isneginf(scores[4])
    np.testing.assert_allclose(scores[1], silhouette_score(x, which), atol=1e-4)
    pair = np.repeat(np.array([[0.0, 0], [1, 0], [5, 5]], np.float32), 3, axis=0)
    scores, best = silhouette.choose_k(jax.random.key(0), pair, (4, 3, 2), restarts=2)
    assert np.isneginf(scores[:2]).all() and best == 2


def test_bad_input_is_named():
    key, x = jax.random.key(0), jnp.zeros((4, 2))
    with pytest.raises(UserError, match="k is 0"):
        kmeans.fit(key, x, 0)
    with pytest.raises(UserError, match="0 restarts"):
        kmeans.fit(key, x, 2, restarts=0)
    with pytest.raises(UserError, match=r"\[row, width\]"):
        kmeans.fit(key, x[0], 2)
    with pytest.raises(UserError, match="weights"):
        kmeans.fit(key, x, 2, weight=jnp.ones(3))
    with pytest.raises(UserError, match="do not fit"):
        kmeans.nearest(x, jnp.zeros((2, 3)))
    with pytest.raises(UserError, match="candidates"):
        silhouette.choose_k(key, x, ())


def test_very_many_rows_are_clustered_by_lloyd_alone():
    rng = np.random.default_rng(0)
    x, which = blobs(rng, 70_000, 3, 64, 30)
    assert len(x) * 64 > kmeans._THOROUGH
    found = kmeans.fit(jax.random.key(0), x, 64, restarts=2)
    oracle = Oracle(64, n_init=2, random_state=0).fit(x)
    np.testing.assert_allclose(found.inertia, cost(x, np.ones(len(x)), found.labels, found.centers), rtol=1e-3)
    assert found.inertia < 1.05 * oracle.inertia_


def test_of_very_many_rows_the_best_restart_counts(monkeypatch):
    monkeypatch.setattr(kmeans, "_THOROUGH", 0)  # as if these were many
    x = blobs(np.random.default_rng(0), 61, 2, 9, 3)[0]  # a shape of its own, for a compiled fit knows the limit it had
    keys = jax.random.split(jax.random.key(0), 16)
    one, ten = (
        jax.vmap(lambda key, restarts=restarts: kmeans.fit(key, x, 9, restarts=restarts).inertia)(keys)
        for restarts in (1, 10)
    )
    assert np.mean(ten) < 0.97 * np.mean(one)


def test_an_empty_cluster_takes_the_row_that_weighs_most():
    x = jnp.array([[0.0], [1], [8], [10]])
    rows = weighted_rows.Rows(x, x[:, 0] ** 2, jnp.array([1.0, 1, 5, 0.1]))
    centers = kmeans._lloyd(rows, jnp.array([[1.0], [500.0]]), jnp.ones(2, bool), 0.0, 1)
    np.testing.assert_allclose(centers[1], [8])


def test_as_many_distinct_rows_as_clusters_are_in_order_of_appearance():
    x = jnp.array([[0.0, 7], [5, 1], [2, 2], [5, 1], [0, 7], [2, 2]])
    for seed in range(4):
        found = kmeans.fit(jax.random.key(seed), x, 3, restarts=2)
        assert found.labels.tolist() == [0, 1, 2, 1, 0, 2] and found.inertia == 0


def test_no_move_of_one_row_improves_a_fit():
    rng = np.random.default_rng(0)
    for seed in range(12):
        x, weight = rng.normal(size=(40, 3)).astype(np.float32), rng.gamma(1.0, size=40).astype(np.float32)
        found = kmeans.fit(jax.random.key(seed), x, 6, weight=weight, restarts=1)
        own = np.asarray(found.labels)
        away = ((x[:, None].astype(float) - np.asarray(found.centers, float)) ** 2).sum(axis=-1)
        mass, w = np.bincount(own, weight, 6), weight[:, None]
        others = mass[own] - weight  # what a row's cluster weighs without it; of a row alone nothing is gained
        left = np.where(others > 1e-4 * weight, mass[own] / np.maximum(others, 1e-9), 0) * away[np.arange(40), own]
        gain = w * (left[:, None] - mass / (mass + w) * away)
        gain[np.arange(40), own] = 0
        assert gain.max() <= 1e-5 * float(found.inertia)
