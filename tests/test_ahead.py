"""Programs compiled for accelerators that are not here, by their own compilers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from experiments import hlo, programs
from fedrouter_jax import mesh
from fedrouter_jax.models.parameters import param_shapes
from fedrouter_jax.plan import SHAPES

BENCH = Path(__file__).resolve().parents[1] / "docs" / "bench"
LIBTPU = Path(sys.prefix) / "tpu" / "libtpu" / "libtpu.so"


@pytest.mark.skipif(not LIBTPU.exists(), reason="no compiler for TPUs beside the environment (make test installs it)")
def test_a_federation_compiles_for_a_tpu_and_for_four(tmp_path):
    """A round, embedding, reading and writing; the round trains once, whatever the compiler makes of its loops."""
    # The suite's flags are those of a CPU's compiler.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    # Twice as fast; a loop that would train twice still does (of the levels of optimisation, O0 no longer shows it).
    environment["JAX_EXEC_TIME_OPTIMIZATION_EFFORT"] = "-1.0"
    command = [sys.executable, "-m", "experiments.ahead", "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    one, four = json.loads((tmp_path / "ahead.json").read_text())["rows"]
    assert not one["sent"] and four["sent"]["all-reduce"] > 0
    # Two share a base and its heads divide evenly: in a block nothing but sums is sent.
    assert {name for name in four["sent"] if name.endswith("in loops")} == {"all-reduce in loops"}
    for row in (one, four):
        assert min(row[name] for name in ("round", "embedding", "reading", "writing")) > 0
    assert one["loops_of_steps"] == four["loops_of_steps"] == 1
    assert "| TPU v5e | small |" in (tmp_path / "ahead.md").read_text()


def test_the_embedding_compiled_ahead_is_of_the_recipes_blocks():
    """Of a sixth of SmolLM2's thirty, without the final norm."""
    case = programs.Case("TPU v5e", "smollm2-135m")
    federation, pack, _ = programs.laid_out(case)
    one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), (mesh.CLIENTS, mesh.MODEL))
    text = programs.phases(federation, pack.tokens, 4, one)["embedding"].as_text()
    assert "tensor<5x576x1536x" in text and "tensor<30x" not in text


def test_a_program_is_read_with_the_turns_of_its_loops():
    def program(x, turns):
        def layers(x, _):
            return jnp.tanh(x @ x), None

        def visit(_, x):
            return jax.lax.scan(layers, x, length=7)[0]

        return jax.lax.fori_loop(0, turns, visit, x)

    text = jax.jit(program).lower(jnp.ones((8, 8)), 3).compile().as_text()
    found = {loops for line, loops in hlo.instructions(text) if " dot(" in line or "__onednn" in line}
    assert found == {(None, 7)}


def test_bytes_and_cycles_are_added_up():
    """By hand: 4 turns of a loop of 10 cycles that gathers 2 x 3 of bfloat16, and a sum of 5 of float32 behind it."""
    text = """HloModule made
%body (a: (s32[], bf16[2,3])) -> (s32[], bf16[2,3]) {
  %b = bf16[2,3]{1,0} all-gather(%a), backend_config={"estimated_cycles":"10"}
}
%condition (c: (s32[], bf16[2,3])) -> pred[] {
  %four = s32[] constant(4)
  ROOT %less = pred[] compare(%i, %four), direction=LT
}
%inner (d: f32[5]) -> f32[5] {
  %e = f32[5]{0} all-reduce-start(%d), to_apply=%body.sum, backend_config={"estimated_cycles":"3"}
}
%body.sum (x: f32[], y: f32[]) -> f32[] {
  ROOT %z = f32[] add(%x, %y)
}
ENTRY %main (p: f32[5]) -> f32[5] {
  %w = (s32[], bf16[2,3]) while(%t), condition=%condition, body=%body
  ROOT %f = f32[5]{0} call(%p), to_apply=%inner, backend_config={"estimated_cycles":"100"}
}
"""
    assert hlo.traffic(text) == {"all-gather in loops": 12, "all-reduce": 20}
    assert hlo.cycles(text) == 4 * 10 + 3 + 100


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ("(bf16[2,8], bf16[4,8]) all-gather-start(%a)", {"all-gather": 64}),
        ("((f32[2], f32[3]), (f32[8], f32[12])) all-gather-start(%a, %b)", {"all-gather": 80}),
        ("(f32[6], f32[6], u32[], u32[]) collective-permute-start(%a)", {"collective-permute": 24}),
        ("(f32[6], f32[4]) all-reduce-start(%a, %b)", {"all-reduce": 40}),
        ("(f32[6], f32[4]) all-gather(%a, %b)", {"all-gather": 40}),
    ],
)
def test_what_a_collective_starts_from_is_not_counted_with_what_comes_of_it(made, expected):
    lines = "".join(f"  %f.{i} = {made}, replica_groups=[1,2]\n" for i in range(2))
    twice = {operation: 2 * size for operation, size in expected.items()}
    assert hlo.traffic(f"ENTRY %main (p: f32[5]) -> f32[5] {{\n{lines}}}\n") == twice


def test_the_table_of_compiled_programs_is_that_of_their_json(monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ})  # which importing the script changes
    monkeypatch.setattr(sys, "path", [*sys.path])
    from experiments import ahead

    found = json.loads((BENCH / "ahead.json").read_text(encoding="utf-8"))
    assert ahead.markdown(found) == (BENCH / "ahead.md").read_text(encoding="utf-8")
    for row in found["rows"]:
        if "share_of_peak" in row:  # by packs of 512 tokens, four operations a parameter of the blocks
            blocks = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(SHAPES[row["shape"]])["blocks"]))
            peak = row["cycles_a_pack"] * ahead.TARGETS[row["target"]].flops_a_cycle * row["model_parallel"]
            assert row["share_of_peak"] == pytest.approx(4 * blocks * 512 / peak)
