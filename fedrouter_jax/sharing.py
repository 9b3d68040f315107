"""Work on many rows: dealt to all rows of devices and all processes, and how far it has got."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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


def divided(
    params: PyTree,
    count: int,
    work: Callable[[PyTree, np.ndarray, Advance], np.ndarray],
    advance: Advance = unseen,
) -> np.ndarray:
    """`work(params, places, advance)` [place, ...] for the places 0 .. count-1, all of them on every process.

    Every row of devices holds a whole base, and does a share of the places (an array of int), all at the same time.
    """
    bases, lock, stopped = mesh.copies(processes.own(params)), Lock(), Event()
    mine = np.arange(count)[processes.share()]
    shares = [mine[row :: len(bases)] for row in range(len(bases))]

    def counted(rows: int) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        with lock:
            advance(rows)

    def run(base: PyTree, places: np.ndarray) -> np.ndarray:
        with mesh.known(base):
            return work(base, places, counted)

    with ThreadPoolExecutor(len(bases)) as pool:
        others = [pool.submit(run, *share) for share in zip(bases[1:], shares[1:], strict=True)]
        try:
            found = [run(bases[0], shares[0]), *(other.result() for other in others)]
        except BaseException:  # an interrupt reaches this thread alone
            stopped.set()
            raise
    whole = np.zeros((len(mine), *found[0].shape[1:]), found[0].dtype)
    for row, part in enumerate(found):
        whole[row :: len(bases)] = part
    advance(count - len(mine))
    return processes.together(whole, count)
