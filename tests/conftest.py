"""What every test file may use: the tiny random model and a small federation on it."""

from __future__ import annotations

import gc
import os
from importlib.metadata import version
from pathlib import Path

# The suite compiles many tiny programs and runs each for milliseconds: compile them quickly, and once.
# The older emitters compile twice as fast; jaxlib 0.11.2 has lost them, and an unknown flag ends the process.
older = tuple(int(part) for part in version("jaxlib").split(".")[:2]) < (0, 11)
flags = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",  # a program is one piece: most are too small for more
    *["--xla_cpu_use_fusion_emitters=false"] * older,
]
os.environ.setdefault("XLA_FLAGS", " ".join(flags))
from fedrouter_jax.terminal import wait_for_devices

wait_for_devices()  # as the command does: the flags are part of what programs are kept by
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
gc.set_threshold(100_000, 50, 100)  # tracing makes many objects and hardly any garbage: a twentieth of the suite's time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLIENTS, CLUSTERS, LOCAL, LORA, SLOTS, Federation

from fedrouter_jax import answers, client, lora, runs
from fedrouter_jax.data import synthetic, tokens
from fedrouter_jax.models import load_model
from fedrouter_jax.presets import smoke
from fedrouter_jax.routing import Enrolment, Router

LONGEST = ("test_mesh.py", "test_runs.py", "test_laws.py", "test_run_kinds.py", "test_ahead.py")  # minutes each


def pytest_collection_modifyitems(items):
    """The longest files first: begun last, one would leave the other processes with nothing to do."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def programs():
    """A file's programs are dropped after its tests: Linux limits the mappings of a process, and so its programs."""
    yield
    jax.clear_caches()
    gc.collect()  # programs in cycles


@pytest.fixture(scope="session")
def tiny():
    """The tiny random model."""
    return load_model("tiny")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """An uninterrupted smoke run; tests that change it copy it first."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    runs.run(smoke(), out)
    return out


@pytest.fixture
def unanswered(monkeypatch):
    """Adapters that say nothing, at once, for tests of what stands around the answers."""
    monkeypatch.setattr(answers, "answer", lambda prepared, state, prompts, *_: [""] * len(prompts))
    monkeypatch.setattr(answers, "losses", lambda prepared, state, rows, *_: np.zeros(len(rows), np.float32))


@pytest.fixture(scope="session")
def federation(tiny) -> Federation:
    """Four clients on the tiny model; adapters with a nonzero B, so that gradients reach A."""
    rows = tokens.encode(tiny.tokenizer, synthetic.make(train_per_task=20, test_per_task=4).train, "short", 96, 24)
    members = [[rows[8 * c + 4 * k :][: 4 + c] for k in range(CLUSTERS)] for c in range(CLIENTS)]
    width = tiny.config.width
    router = Router(
        jax.random.normal(jax.random.key(1), (SLOTS, width)), jnp.zeros(width), jnp.ones(width), jnp.asarray(False)
    )
    table = jnp.asarray([[0, 1], [1, 2], [0, 0], [2, 1]], jnp.int32)
    labels = np.zeros((CLIENTS, 1), np.int32)
    fresh = lora.init(jax.random.key(0), tiny.config, LORA)
    adapters = {"main": fresh._replace(b=jax.tree.map(lambda b: b + 0.02, fresh.b))}
    update = jax.jit(client.make_client_update(tiny.config, LORA, LOCAL))
    return Federation(tiny, update, Enrolment(table, SLOTS, router, labels, {}), adapters, members)
