"""Work on many rows: dealt to all rows of devices and all processes, and how far it has got."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Event, Lock
from typing import Any

import numpy as np

from fedrouter_jax import mesh, processes
from fedrouter_jax.types import Advance, PyTree, unseen

Track = Callable[..., Any]  # (what, rows in all, rows done before) -> context manager giving `advance(rows, note="")`


@contextmanager
def silent(what: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """The `Track` that shows nothing."""
    yield unseen


class _Stopped(Exception):
    """Another row of devices has failed, or the user has interrupted."""


def divided(
    params: PyTree,
    count: int,
    work: Callable[[PyTree, PyTree, np.ndarray, Advance], np.ndarray],
    advance: Advance = unseen,
    tree: PyTree = (),
) -> np.ndarray:
    """`work(params, tree, places, advance)` [place, ...] for the places 0 .. count-1, all of them on every process.

    Every row of devices holds a whole base, and `tree` (arrays) whole, and does a share of the places (an array of
    int), all at the same time.
    """
    bases, lock, stopped = mesh.copies(processes.own(params)), Lock(), Event()
    # Placed here, by one thread: JAX (0.10) lists the parts of an array when it is first asked for them, and a second
    # thread that asks meanwhile is given the beginning of that list.
    trees = [mesh.beside(base, tree) for base in bases]
    mine = np.arange(count)[processes.share()]
    shares = [mine[row :: len(bases)] for row in range(len(bases))]

    def counted(rows: int) -> None:
        if stopped.is_set():
            raise _Stopped
        with lock:
            advance(rows)

    def run(base: PyTree, tree: PyTree, places: np.ndarray) -> np.ndarray:
        try:
            with mesh.known(base):
                return work(base, tree, places, counted)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(len(bases)) as pool:
        first, *rest = zip(bases, trees, shares, strict=True)
        others = [pool.submit(run, *row) for row in rest]
        found, wrong = [], []
        for part in (partial(run, *first), *(other.result for other in others)):
            try:
                found.append(part())
            except BaseException as error:  # an interrupt reaches this thread alone
                stopped.set()
                wrong.append(error)
    for error in wrong:
        if not isinstance(error, _Stopped):
            raise error
    whole = np.zeros((len(mine), *found[0].shape[1:]), found[0].dtype)
    for row, part in enumerate(found):
        whole[row :: len(bases)] = part
    advance(count - len(mine))
    return processes.together(whole, count)
