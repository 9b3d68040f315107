"""From tokens to packs: nothing is lost, nothing mixed, little wasted."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrouter_jax.data import packing, tokens


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 600), min_size=1, max_size=80), st.integers(1, 4))
def test_texts_get_packs_that_hold_them_and_waste_no_more_than_plain_ones(sizes, together):
    def computed(time):
        packs = len(packing.first_fit([(size, 0) for size in sizes], time, 0, 32))
        return time * -(-packs // together)

    plain, fitted = packing.pack_length(max(sizes)), packing.fitted_length(sizes, 32, together)
    assert fitted >= max(sizes) and fitted % 32 == 0 and computed(fitted) <= computed(plain)
    assert fitted == plain or computed(fitted) <= 0.95 * computed(plain)


def test_first_fit_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    sizes = [(int(n), int(n) // 7) for n in rng.integers(1, 90, 200)]
    expected, free = [], []
    for row in sorted(range(200), key=lambda i: (-sizes[i][0], i)):
        need = (*sizes[row], 1)
        fits = [pack for pack, room in enumerate(free) if all(n <= r for n, r in zip(need, room, strict=True))]
        pack = fits[0] if fits else len(free)
        if not fits:
            expected.append([])
            free.append([96, 12, 4])
        expected[pack].append(row)
        free[pack] = [r - n for n, r in zip(need, free[pack], strict=True)]
    assert packing.first_fit(sizes, 96, 12, 4) == expected


lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 10)), min_size=0, max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths, st.integers(1, 3))
def test_packing_loses_nothing_and_mixes_nothing(sizes, lanes):
    rows = [tokens.Tokens([100 * i + 1] * p, [100 * i + 2] * r, False) for i, (p, r) in enumerate(sizes)]
    dealt = [rows[lane::lanes] for lane in range(lanes)]
    found = packing.batch(dealt, packs=12, time=40, predicted=20)
    packs = found.rows.packs
    seen = []
    for pack in range(int(found.count)):
        for segment in range(1, packs.segments[pack].max() + 1):
            here = packs.segments[pack] == segment
            seen.append(tuple(packs.tokens[pack][here]))
            (lane,), (number,) = (set(field[pack][here]) for field in (found.rows.lane, found.rows.row))
            assert tuple(dealt[lane][number].prompt + dealt[lane][number].response) == seen[-1]
            np.testing.assert_array_equal(packs.positions[pack][here], np.arange(here.sum()))
    assert Counter(seen) == Counter(tuple(row.prompt + row.response) for row in rows)
    assert (packs.segments[int(found.count) :] == 0).all()
    kept = found.rows.labels >= 0
    assert kept.sum() == sum(len(row.response) for row in rows)
    # The hidden state at `where` predicts the next token, which is the label, in the same text.
    packed, at = np.nonzero(kept)
    where = found.rows.where[packed, at]
    np.testing.assert_array_equal(packs.tokens[packed, where + 1], found.rows.labels[packed, at])
    np.testing.assert_array_equal(packs.segments[packed, where + 1], packs.segments[packed, where])


def test_the_pack_is_the_length_that_wastes_least_and_always_holds_the_longest_row():
    rows = [tokens.Tokens([1] * 40, [2] * 8, False)] * 5
    time, predicted = packing.shape([rows] * 4, size=2, together=4)  # 8 rows of 48 tokens are one pack of 384
    assert (time, predicted) == (384, 96)
    assert packing.shape([rows] * 4, size=2, together=1) == (128, 32)  # two rows of 48 in 128; 192 would waste more
    long = [tokens.Tokens([1] * 700, [2] * 300, False)]
    assert packing.shape([rows, long], 2, 2) == (1024, 432)
    short = [tokens.Tokens([1] * 40, [2], False)] * 20 + [tokens.Tokens([1] * 4, [2] * 60, False)]
    assert packing.shape([short], 2, 1)[1] >= 60  # the longest answer, too
    assert packing.packs_of_steps([rows] * 4, 2, 4, time, predicted, 3) == [1, 1, 1]
    assert packing.packs_of_steps([rows] * 4, 3, 4, time, predicted, 2) == [2, 2]  # twelve rows, eight to a pack
    assert packing.packs_of_steps([rows] * 4, 8, 1, time, predicted, 2) == [1, 1]  # those of one client


@pytest.mark.parametrize(
    ("counts", "most", "best"),
    [
        ([21, 22, 20], 64, 22),  # one turn of as many as there are; not all that fit
        ([22, 21, 21], 16, 12),  # two turns of which the second is not half empty
        ([20, 20, 20, 21], 64, 22),  # no turn more for a pack in four steps
        ([8] * 30 + [9], 64, 8),  # but for one in thirty
        ([3], 64, 3),
        ([200], 1, 1),
    ],
)
def test_packs_go_together_in_numbers_that_leave_few_of_them_empty(counts, most, best):
    assert packing.packs_of_a_turn(counts, most) == best
