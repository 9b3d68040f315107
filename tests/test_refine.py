"""Federated Lloyd, the federated silhouette and clusters that follow centroids, against scikit-learn on pooled rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from fedrouter_jax import kmeans, refine, routing


def uneven(seed, rows=(30, 7, 18), width=6, blobs=4):
    """Clients of different sizes, padded with huge rows; and the pooled rows."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(blobs, width)) * 3
    held = [(centres[rng.integers(0, blobs, n)] + rng.normal(size=(n, width))).astype(np.float32) for n in rows]
    points = np.full((len(rows), max(rows), width), 1e3, np.float32)
    for client, own in enumerate(held):
        points[client, : len(own)] = own
    present = np.arange(max(rows)) < np.array(rows)[:, None]
    return jnp.asarray(points), jnp.asarray(present), np.concatenate(held)


@pytest.mark.parametrize("seed", range(4))
def test_federated_lloyd_is_lloyd_of_the_pooled_rows(seed):
    points, present, pooled = uneven(seed)
    start = pooled[np.random.default_rng(seed).choice(len(pooled), 5, replace=False)]
    found = refine.lloyd(points, present, jnp.asarray(start), 3)
    centres = start.astype(np.float64)
    for _ in range(3):
        labels = ((pooled[:, None] - centres) ** 2).sum(axis=-1).argmin(axis=1)
        centres = np.stack([pooled[labels == k].mean(axis=0) if (labels == k).any() else centres[k] for k in range(5)])
    np.testing.assert_allclose(found, centres, rtol=1e-4, atol=1e-4)
    settled = refine.lloyd(points, present, jnp.asarray(start), 100)
    oracle = KMeans(5, init=start, n_init=1, tol=0, max_iter=300).fit(pooled)
    np.testing.assert_allclose(settled, oracle.cluster_centers_, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_federated_silhouette_is_that_of_the_pooled_rows(seed):
    points, present, pooled = uneven(seed)
    points, pooled[0] = points.at[0, 0].set(-12), -12  # far from all others
    centres = KMeans(4, n_init=2, random_state=seed).fit(pooled).cluster_centers_.astype(np.float32)
    lonely = np.concatenate([centres, pooled[:1], np.full((1, 6), 500, np.float32)])  # a row alone, an empty cluster
    for centroids in (centres, lonely):
        labels = ((pooled[:, None] - centroids) ** 2).sum(axis=-1).argmin(axis=1)
        expected = silhouette_score(pooled, labels, metric="sqeuclidean")
        np.testing.assert_allclose(refine.silhouette(points, present, jnp.asarray(centroids)), expected, atol=1e-4)
    hidden = refine.silhouette(points, present, jnp.asarray(lonely), jnp.arange(6) < 4)
    np.testing.assert_allclose(hidden, refine.silhouette(points, present, jnp.asarray(centres)), atol=1e-6)


def test_local_clusters_follow_the_centroids_and_strays_go_to_the_nearest_kept():
    """Client 0 holds slots 2 and 0 and one stray of slot 1; client 1 holds slot 1 alone, and fewer rows."""
    centroids = jnp.asarray([[0.0, 0], [10, 0], [0, 10]])
    first = [[0, 9], [1, 10], [0, 11], [1, 1], [0, 1], [0, 0], [9, 1]]
    points = jnp.asarray([first, [[10, 1], [11, 0], [9, 0], [10, 0], [0, 0], [0, 0], [0, 0]]], jnp.float32)
    present = jnp.asarray([[True] * 7, [True] * 4 + [False] * 3])
    table, labels = refine.follow(points, present, centroids, None)
    assert table.tolist() == [[0, 2], [1, -1]]
    assert labels.tolist() == [[1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, -1, -1, -1]]
    table, labels = refine.follow(points, present, centroids, 1)
    assert table.tolist() == [[0], [1]] and labels[0].tolist() == [0] * 7  # of equals the lower slot
    table, _ = refine.follow(points, present, centroids, 3)
    assert table.tolist() == [[0, 1, 2], [1, -1, -1]]


def test_who_joins_later_has_slots_of_the_others_only():
    """Nobody else holds slot 2, which most rows of the newcomer are nearest to."""
    centroids = jnp.asarray([[0.0, 0], [10, 0], [0, 10]])
    first = [[1, 0], [0, 0], [11, 0], [10, 0]]
    points = jnp.asarray([first, [[0, 9], [1, 10], [0, 11], [10, 1]]], jnp.float32)
    present = jnp.ones((2, 4), bool)
    table, labels = refine.follow(points, present, centroids, 2, founders=1)
    assert table.tolist() == [[0, 1], [0, 1]] and labels.tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    assert refine.follow(points, present, centroids, 2)[0].tolist() == [[0, 1], [1, 2]]


def test_as_many_clusters_as_there_are_centres_may_be_found():
    """Four clients of one task each, as in Single: every centre is a cluster. Two clients: the least there can be."""
    for count in (4, 2):
        centres = 20 * np.random.default_rng(0).normal(size=(count, 8))
        clients = [
            (c + np.random.default_rng(i).normal(size=(12, 8))).astype(np.float32) for i, c in enumerate(centres)
        ]
        assert routing.enroll(jax.random.key(0), clients, routing.RECIPES["refined"], 1, None).clusters == count


def test_the_refined_recipe_finds_k_where_each_client_has_few_rows():
    """Six tasks, four rows of each on a client, too noisy to cluster alone; local counts twice too large, n_g found."""
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(6, 40)) * 1.2
    clients = [(centres.repeat(4, axis=0) + rng.normal(size=(24, 40))).astype(np.float32) for _ in range(6)]
    found = routing.enroll(jax.random.key(0), clients, routing.RECIPES["refined"], 12, None, 8)
    assert found.clusters == 6 and max(found.silhouettes["global"], key=found.silhouettes["global"].get) == 6
    slots = np.stack([np.asarray(found.table)[c][found.labels[c]] for c in range(6)]).reshape(6, 6, 4)
    assert len({tuple(slot) for slot in slots[:, :, 0]}) == 1  # every client agrees on the slot of a task
    assert (slots == slots[:, :, :1]).mean() > 0.98


def test_a_centroid_that_no_row_is_nearest_to_stays_where_it_is():
    points, present, pooled = uneven(0)
    start = np.concatenate([pooled[:3], np.full((1, 6), 400, np.float32)])
    found = refine.lloyd(points, present, jnp.asarray(start), 3)
    np.testing.assert_array_equal(found[3], start[3])
    np.testing.assert_allclose(found[:3], refine.lloyd(points, present, jnp.asarray(start[:3]), 3), rtol=1e-6)


def test_a_slot_with_less_than_a_quarter_of_an_even_share_is_not_kept():
    """Forty rows in two slots: five are a quarter of an even share, four are not."""
    centroids = jnp.asarray([[0.0, 0], [10, 0]])
    for few, slots in ((5, [0, 1]), (4, [0])):
        points = jnp.asarray([[[0, 0]] * (40 - few) + [[9, 0]] * few], jnp.float32)
        table, labels = refine.follow(points, jnp.ones((1, 40), bool), centroids, None)
        assert table[0].tolist() == slots and labels[0].tolist() == [0] * (40 - few) + [len(slots) - 1] * few


def test_padding_has_no_share_of_the_rows():
    """Two of six rows are enough, as they would not be of forty."""
    points = np.zeros((2, 40, 2), np.float32)
    points[1, 4:6] = [9, 0]
    present = np.arange(40) < np.array([[40], [6]])
    table, _ = refine.follow(jnp.asarray(points), jnp.asarray(present), jnp.asarray([[0.0, 0], [10, 0]]), None)
    assert table.tolist() == [[0, -1], [0, 1]]


def test_the_score_of_a_number_of_clusters_is_that_of_just_so_many():
    """The surplus centres that one compiled search has room for take no row."""
    points, present, pooled = uneven(1)
    key, ks = jax.random.key(0), (2, 3, 4)
    centres = jnp.asarray(pooled[::2])
    found = refine.choose_k(key, centres, jnp.ones(len(centres)), points, present, ks, 10, 10)
    for k, score in zip(ks, np.asarray(found), strict=True):
        fit = kmeans.fit(key, centres, k, restarts=10)
        alone = refine.silhouette(points, present, refine.lloyd(points, present, fit.centers, 10))
        np.testing.assert_allclose(score, alone, atol=1e-3)
