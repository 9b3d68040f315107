"""Training beside the limit, profiles, and the base in fewer bits: what is measured, on the tiny model."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import hlo, limit, precision, profiled
from fedrouter_jax.errors import UserError
from fedrouter_jax.presets import smoke

ROOT = Path(__file__).resolve().parents[1]


def test_fewer_bits_take_fewer_bytes_and_hardly_move_the_loss():
    base = smoke()
    config = replace(base, data=replace(base.data, mix_rows=6))
    found = {
        name: precision.measure(replace(config, dtype=dtype, quantise=quantise))[1]
        for name, (dtype, quantise) in precision.PRECISIONS.items()
    }
    whole = found["float32"]
    assert found["bfloat16"]["bytes"] == whole["bytes"] / 2 and found["mixed"]["bytes"] < 0.51 * whole["bytes"]
    assert found["nf4"]["block_bytes"] < whole["block_bytes"] / 5 and found["int8"]["bytes"] < whole["bytes"]
    for row in found.values():
        assert abs(row["loss"] - whole["loss"]) < 0.1 and row["loss"] < 2 * np.log(300)


def test_the_loss_of_a_base_is_that_of_a_token(monkeypatch):
    lengths = []

    def losses(config, params, rows, *_):
        lengths.extend(len(row.response) for row in rows)
        return np.arange(len(rows))

    monkeypatch.setattr(precision.likelihood, "losses", losses)
    monkeypatch.setattr(precision.generate, "generate", lambda config, params, prompts, *_, **__: [[]] * len(prompts))
    rows, found = precision.measure(smoke())
    assert found["loss"] == pytest.approx(np.dot(lengths, range(rows)) / sum(lengths)) and len({*lengths}) > 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("jit(train)/transpose(jvp(Decoder))/blocks/attention/bkgqd,bksd->bkgqs/dot_general", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("jit(train)/jvp(Decoder)/blocks/q_proj/adapter/dot_general", "adapters"),
        ("jit(train)/jvp(Decoder)/blocks/q_proj/dot_general", "frozen matrices"),
        ("nvjet_sm90_tst_128x128_64x6_2x1_v_bz_NNT", "frozen matrices"),
        ("jit(train)/jvp(loss)/reduce_max", "head and loss"),
        ("jit(train)/jvp(norm)/mul", "norms"),
        ("MemcpyD2D", "copies"),
        ("jit(train)/jvp(Decoder)/blocks/jit(silu)/mul", profiled.REST),
    ],
)
def test_a_kernel_is_of_the_kind_its_name_says(name, kind):
    assert profiled.kind_of(name) == kind


def test_a_product_that_lost_its_name_goes_by_that_of_what_it_reads():
    named = 'metadata={op_name="jit(f)/attention/slice"}'
    text = f"""
  %slice.1 = f32[3,64,64] copy(%p.1), {named}
  %ynn_fusion.2 = f32[3,64,64] fusion(%slice.1, %p.2), backend_config={{"fusion_config":{{"kind":"__ynn_fusion"}}}}
  ROOT %dot.3 = f32[3,64,64] dot(%p.2, %slice.1), metadata={{stack_frame_id=3}}
  %copy.4 = f32[3,64,64] copy(%slice.1)
"""
    assert hlo.names(text) == {"slice.1": "jit(f)/attention/slice", "ynn_fusion.2": "jit(f)/attention/slice"}


def test_the_limit_is_measured_on_all_devices(tmp_path):
    options = ["--dtypes", "float32", "--lanes", "2", "--groups", "2", "--smoke", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "experiments.limit", *options]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"}, check=True, capture_output=True)
    found = json.loads((tmp_path / "limit.json").read_text())
    assert found["devices"] == 2 and "2 devices" in (tmp_path / "limit.md").read_text()
    (row,) = found["rows"]
    same = limit.Limit(lanes=2, groups=2, smoke=True)
    assert row["useful_tokens"] == limit.rows_of_a_turn(limit.SMALL, same)[1]  # of both devices
    assert row["tokens_a_second"] > 0


def test_training_is_measured_beside_the_limit(tmp_path, monkeypatch):
    options = limit.Limit(dtypes=("mixed",), packs=3, lanes=2, groups=2, smoke=True, profile=True, out=tmp_path)
    cache, kinds = jax.config.jax_compilation_cache_dir, []
    monkeypatch.setattr(limit, "matrix_rate", lambda dtype: kinds.append(dtype) or 1e9)
    try:
        limit.main(options)
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    (row,) = json.loads((tmp_path / "limit.json").read_text())["rows"]
    assert kinds == ["bfloat16"]  # what the matrices are multiplied in
    batch, useful = limit.rows_of_a_turn(limit.SMALL, options)
    assert row["useful_tokens"] == useful == (batch.rows.packs.segments > 0).sum()
    assert max(batch.count.ravel()) <= 3  # so a step is one turn, whose empty packs are computed, too
    assert row["useful_share"] == useful / (3 * batch.count.size * batch.rows.lane.shape[-1])
    assert row["flops"] == pytest.approx(4 * row["block_parameters"] * row["tokens_a_second"])
    assert row["share"] == pytest.approx(row["flops"] / row["matrix_rate"])
    shown = (tmp_path / "limit.md").read_text()
    assert f"**{100 * row['share']:.0f} %**" in shown
    named = {*profiled.KINDS, profiled.REST}
    assert {"frozen matrices", "attention", "adapters", "head and loss", "norms"} <= set(row["profile"]) <= named
    total = sum(row["profile"].values())
    assert f" | {100 * row['profile']['attention'] / total:.0f} | " in shown.splitlines()[-1]
    with pytest.raises(UserError, match="no shape is called 'gpt'"):
        limit.main(limit.Limit(shapes=("gpt",)))
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--groups is 3, but there are 2 devices; give a multiple"):
        limit.main(limit.Limit(groups=3))
