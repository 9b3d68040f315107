"""What the experiments make of a clock: rates, times that are compared, processes that start."""

from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

from experiments import growth, profiled, rates, startup
from fedrouter_jax.presets import smoke

QUIET = Console(quiet=True)


def ticking(monkeypatch, module, seconds):
    """A clock that each timed stretch finds so much later."""
    readings = iter([reading for second in seconds for reading in (0.0, second)])
    monkeypatch.setattr(module.clock, "perf_counter", lambda: next(readings))


def test_a_matrix_rate_is_that_of_the_fastest_product_after_one_that_is_not_timed(monkeypatch):
    calls = []
    ticking(monkeypatch, rates, [0.5, 0.25, 2.0])
    assert rates.best_rate(lambda: calls.append(0), 3) == 2 * rates.matrix_rows() ** 3 / 0.25
    assert len(calls) == 4


def test_a_time_is_the_median_of_runs_after_the_first(monkeypatch):
    calls = []
    ticking(monkeypatch, growth, [3.0, 1.0, 20.0])
    assert growth.timed(lambda: calls.append(0)) == 3 and len(calls) == 4


def test_rounds_of_many_lanes_are_compared_with_those_of_few_just_before_and_after(monkeypatch):
    turns = {8: iter([1.0, 1.0, 1.0] * 3 + [1.0, 3.0, 2.0, 2.0, 10.0, 10.0]), 64: iter([1.0, 4.0, 6.0])}
    monkeypatch.setattr(growth, "compiled_round", lambda lanes: ((lambda: next(turns[lanes])), {"batch_bytes": lanes}))
    few, many = growth.by_lanes((8, 64), QUIET)
    assert few == {"lanes": 8, "seconds_a_lane_step": 1, "against_fewest": 1, "batch_bytes": 8}
    assert many == {"lanes": 64, "seconds_a_lane_step": 4, "against_fewest": 0.6, "batch_bytes": 64}  # of .5, 2 and .6


def test_seconds_are_those_of_a_lane_and_a_step(monkeypatch):
    once, _ = growth.compiled_round(8)
    readings = count()
    monkeypatch.setattr(growth.clock, "perf_counter", lambda: float(next(readings)))
    assert once() == pytest.approx(1 / (2 * 8 * smoke().local.steps))  # of two rounds


def test_only_the_first_process_finds_nothing_that_was_kept(monkeypatch, tmp_path):
    folders = []

    def process(preset, cache):
        folders.append((Path(cache), [*Path(cache).iterdir()]))
        (Path(cache) / f"program-{len(folders)}").touch()
        return [9.0, 2.0, 4.0, 3.0][len(folders) - 1]

    monkeypatch.setattr(startup, "process", process)
    startup.main(startup.Startup(smoke=True, out=tmp_path))
    assert [len(held) for _, held in folders] == [0, 1, 2, 3] and len({folder for folder, _ in folders}) == 1
    shown = (tmp_path / "startup.md").read_text()
    assert "| nothing kept from earlier | 9.0 |" in shown and "kept, median of 3 | 3.0 |" in shown


def test_kernels_of_a_kind_are_added_up_in_seconds(monkeypatch):
    @contextmanager
    def trace(folder):
        (Path(folder) / "one.xplane.pb").touch()
        yield

    kernels = [("dot.1", 2e9), ("fmha", 1e9), ("dot_1", 3e9), ("MemcpyD2D", 5e8)]
    monkeypatch.setattr(jax.profiler, "trace", trace)
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda path: kernels)
    monkeypatch.setattr(profiled, "events", iter)
    text = '  %dot.1 = f32[8] dot(%a, %b), metadata={op_name="jit(train)/blocks/q_proj/dot_general"}\n'
    program = type("Program", (SimpleNamespace,), {"__call__": lambda self: ()})(as_text=lambda: text)
    assert profiled.profiled(program) == {"frozen matrices": 5, "attention": 1, "copies": 0.5}
