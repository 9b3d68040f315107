"""Packing: many short rows side by side in a few fixed-length packs, so that little compute goes to padding.

Every array has a static shape, chosen once from the configuration and all rows, so a round compiles once.
How many packs hold rows is data (`count`): the training loop stops there, and empty packs cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedrouter_jax.data.tokens import Tokens
from fedrouter_jax.types import Array

_SHORTEST, _LONGEST = 256, 512  # tokens of a pack: shorter make small products, longer pay for attention
# Packs that take as long as a turn does beside its packs: SmolLM2-135M's on an H200, by turns of 16 and 32
# (docs/bench/h200/training.json).
_TURN = 5


class Packs(NamedTuple):
    """Packed texts. Leading axes may be added in front of `[pack, ...]`."""

    tokens: Array  # int32 [pack, time]
    positions: Array  # int32 [pack, time]: restart at 0 with every text
    segments: Array  # int32 [pack, time]: 0 for padding, 1.. numbers the texts of a pack


class Rows(NamedTuple):
    """Packed texts and what to predict in them."""

    packs: Packs  # [pack, time]
    lane: Array  # int32 [pack, time]: whose row a token is of, counted inside the group of lanes
    row: Array  # int32 [pack, time]: which row of that lane's step
    where: Array  # int32 [pack, predicted]: time index whose hidden state predicts a response token
    labels: Array  # int32 [pack, predicted]: that response token, -1 for padding


class Batch(NamedTuple):
    """The rows of one optimiser step of a group of lanes. Leading axes `[group, step]` are added in front."""

    rows: Rows  # [pack, ...]
    count: Array  # int32 []: packs that hold rows; the rest are empty


def first_fit(sizes: Sequence[tuple[int, int]], time: int, predicted: int, rows: int) -> list[list[int]]:
    """Assign rows of (tokens, responses) to packs of at most `time` tokens, `predicted` responses and `rows` rows.

    First-fit decreasing; deterministic. Returns the row indices of each pack.
    """
    packs: list[list[int]] = []
    free = np.tile(np.array([time, predicted, rows]), (len(sizes), 1))  # of every pack there may be
    for row in sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], i)):
        need = np.array([*sizes[row], 1])
        pack = int((free[: len(packs) + 1] >= need).all(axis=1).argmax())
        if pack == len(packs):
            packs.append([])
        packs[pack].append(row)
        free[pack] -= need
    return packs


def lay_out(texts: Sequence[Sequence[int]], assignment: list[list[int]], packs: int, time: int) -> Packs:
    """Write texts into `packs` packs of length `time` as `assignment` says (numpy, int32)."""
    tokens, positions, segments = np.zeros((3, packs, time), np.int32)
    for pack, rows in enumerate(assignment):
        start = 0
        for number, row in enumerate(rows, start=1):
            end = start + len(texts[row])
            tokens[pack, start:end] = texts[row]
            positions[pack, start:end] = np.arange(end - start)
            segments[pack, start:end] = number
            start = end
    return Packs(tokens, positions, segments)


def owners(packs: Packs, assignment: list[list[int]], nobody: int) -> np.ndarray:
    """The row that each token of laid out packs is of, int32 [pack, time]; `nobody` where there is none."""
    found = np.full(packs.segments.shape, nobody, np.int32)
    for pack, rows in enumerate(assignment):
        found[pack] = np.array([nobody, *rows], np.int32)[packs.segments[pack]]
    return found


def pack_length(longest: int) -> int:
    """The static length of packs: a multiple of 128 that holds the longest row, at least `_SHORTEST`.

    Longer packs waste less on their tail; attention inside a pack grows with the square, so not longer than needed.
    """
    return max(_SHORTEST, -(-longest // 128) * 128)


def fitted_length(sizes: Sequence[int], rows: int, together: int) -> int:
    """The `pack_length` of texts of these lengths, `rows` to a pack and `together` packs to a turn, or a better one.

    Better is a multiple of 32, of at most `_LONGEST`, with which a twentieth less is computed: a few turns can leave
    much of the last one empty. Elsewhere the plain length will do, and fewer lengths are fewer programs to compile.
    """

    def turns(time: int) -> int:
        return -(-len(first_fit([(size, 0) for size in sizes], time, 0, rows)) // together)

    plain, longest = pack_length(max(sizes)), max(_SHORTEST, -(-max(sizes) // 32) * 32)
    if turns(plain) == 1:
        return plain
    best = min(range(longest, _LONGEST + 1, 32), key=lambda time: time * turns(time), default=plain)
    return best if best * turns(best) <= 0.95 * plain * turns(plain) else plain


def batch(lanes: Sequence[Sequence[Tokens]], packs: int, time: int, predicted: int) -> Batch:
    """Pack the rows of one step of a group of lanes, all lanes' rows in one stream.

    `packs` must be at least the number of rows: in the worst case each needs a pack.
    """
    owners = [(lane, number) for lane, rows in enumerate(lanes) for number in range(len(rows))]
    rows = [row for rows in lanes for row in rows]
    sizes = [(row.length, len(row.response)) for row in rows]
    assignment = first_fit(sizes, time, predicted, len(rows))
    texts = [row.prompt + row.response for row in rows]
    where = np.zeros((packs, predicted), np.int32)
    labels = np.full((packs, predicted), -1, np.int32)
    lane, number = np.zeros((2, packs, time), np.int32)
    for pack, members in enumerate(assignment):
        start = filled = 0
        for row in members:
            lane[pack, start : start + rows[row].length], number[pack, start : start + rows[row].length] = owners[row]
            first, answer = start + len(rows[row].prompt) - 1, rows[row].response
            where[pack, filled : filled + len(answer)] = np.arange(first, first + len(answer))
            labels[pack, filled : filled + len(answer)] = answer
            start, filled = start + rows[row].length, filled + len(answer)
    laid_out = lay_out(texts, assignment, packs, time)
    return Batch(Rows(laid_out, lane, number, where, labels), np.int32(len(assignment)))


def shape(clients: Sequence[Sequence[Tokens]], size: int, together: int) -> tuple[int, int]:
    """The (tokens, response tokens) of a pack that suits steps of `size` rows of `together` lanes (`batch`).

    Of all multiples of 64 that hold the longest row, the one that wastes least on sample steps of these clients' rows,
    at most 512 where rows allow, for attention costs the square. Response tokens: half as many again as an average
    pack has, since the head computes them all, filled or not.
    """
    rows = [row for held in clients for row in held]
    longest, answer = max(row.length for row in rows), max(len(row.response) for row in rows)
    share = 1.5 * sum(len(row.response) for row in rows) / sum(row.length for row in rows)

    def waste(time: int) -> tuple[int, int, int]:
        predicted = max(answer, -(-int(share * time) // 16) * 16)
        packs = sum(packs_of_steps(clients, size, together, time, predicted, 8))
        return packs * (time + 8), time, predicted  # 8: what visiting a pack costs beside its tokens

    first = -(-longest // 64) * 64
    return min(waste(time) for time in range(first, max(first, 512) + 1, 64))[1:]


def packs_of_steps(
    clients: Sequence[Sequence[Tokens]], size: int, together: int, time: int, predicted: int, steps: int = 32
) -> list[int]:
    """How many packs hold rows in so many sample steps of `size` rows of `together` lanes."""
    rng = np.random.default_rng(0)
    sampled = [[held[i] for held in clients[:together] for i in rng.integers(0, len(held), size)] for _ in range(steps)]
    return [
        len(first_fit([(row.length, len(row.response)) for row in step], time, predicted, size * together))
        for step in sampled
    ]


def packs_of_a_turn(counts: Sequence[int], most: int) -> int:
    """How many packs, at most `most`, to take through the model together where steps have so many: the quickest way.

    The last turn of a step is computed in full, filled or not; every turn costs `_TURN` packs more. Beyond eight only
    even numbers, so that other draws of rows seldom ask for another program.
    """
    held = np.array(counts)
    sizes = [size for size in range(1, max(1, most) + 1) if size <= 8 or size % 2 == 0]
    return min(sizes, key=lambda size: (int((-(-held // size) * (size + _TURN)).sum()), size))
