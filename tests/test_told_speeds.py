"""What README and speed.md say of speed and memory is what the committed measurements say."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from documents import BENCH, README
from documents import SAID_OF_SPEED as SAID

from experiments import bench, growth, limit, precision, profiled, startup
from fedrouter_jax.models.parameters import param_shapes
from fedrouter_jax.plan import SHAPES


def read(path: Path) -> dict:
    """A committed JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", [".", "amx-cores", "no-matrix-units", "avx2", "h200"])
def test_a_bench_is_that_of_its_measurement(folder):
    found = read(BENCH / folder / "bench.json")
    assert bench.markdown(found) == (BENCH / folder / "bench.md").read_text(encoding="utf-8")
    blocks = jax.tree.leaves(param_shapes(SHAPES["smollm2-135m"])["blocks"])
    assert found["flops_a_token"] == 4 * sum(leaf.size for leaf in blocks)  # forward and back, none for frozen weights


def test_the_readmes_ratios_on_cpus_are_those_of_the_benches():
    """From the least to the most of five machines, each in its faster type."""
    machines = {".": ", mixed", "faster-cores": ", mixed", "amx-cores": ", mixed", "no-matrix-units": "", "avx2": ""}
    published, tuned, clusters, shallow = [], [], [], []
    for folder, kind in machines.items():
        phases = read(BENCH / folder / "bench.json")["phases"]
        peers = [bench.rates(phases[name]) for name in ("embed", "train a round", "routed generation")]
        ours = [rate["ours" + kind] for rate in peers]
        published.append([mine / rate["published"] for mine, rate in zip(ours, peers, strict=True)])
        best = [max(rate[side] for side in rate if side.startswith("best effort")) for rate in peers]
        tuned.append([mine / other for mine, other in zip(ours, best, strict=True)])
        kmeans = bench.rates(phases["K-Means"])
        clusters.append(kmeans["ours"] / kmeans["scikit-learn"])
        shallow.append(peers[0]["ours, refined"] / ours[0])

    def spans(ratios):
        return [f"{least:.2f} to {most:.2f}" for least, most in zip(np.min(ratios, 0), np.max(ratios, 0), strict=True)]

    assert f"| published flow, five CPUs | {' | '.join(spans(published))} |" in README
    assert f"| best effort, five CPUs | {' | '.join(spans(tuned))} |" in README
    assert f"on CPUs {spans(published)[1]} times, and {spans(tuned)[1]} (" in README
    assert f"K-Means is {min(clusters):.0f} to {max(clusters):.0f} times as fast as scikit-learn's on CPUs" in README
    assert f"the same purpose, {min(shallow):.1f} to {max(shallow):.1f} times as fast again" in README


def test_the_ratios_beside_the_targets_are_those_of_the_benches_and_bold_where_one_is_met():
    mixed, plain = (".", "faster-cores", "amx-cores"), ("no-matrix-units", "avx2", ".", "faster-cores", "amx-cores")
    machines = [*((folder, ", mixed") for folder in mixed), *((folder, "") for folder in plain)]
    rates = [
        {name: bench.rates(phase) for name, phase in read(BENCH / folder / "bench.json")["phases"].items()}
        for folder, _ in machines
    ]

    def row(label, target, ratios, digits=2):
        shown = [f"{ratio:.{digits}f}".removeprefix("0") for ratio in ratios]
        cells = [f"**{text}**" if ratio >= target else text for ratio, text in zip(ratios, shown, strict=True)]
        return f"{label} | {target} | " + " | ".join(cells) + " |"

    names = {"embed": "embed", "train a round": "train a round, 8 lanes", "routed generation": "routed generation"}
    for targets, sides in (
        ((2.5, 2, 4), ("published",)),
        ((1.3, 1.3, 2), ("best effort", "best effort, bf16")),
    ):
        for (name, label), target in zip(names.items(), targets, strict=True):
            found = [
                rate[name]["ours" + kind] / max(rate[name][side] for side in sides if side in rate[name])
                for rate, (_, kind) in zip(rates, machines, strict=True)
            ]
            assert row(f"| {label}", target, found) in SAID
    kmeans = [rate["K-Means"]["ours"] / rate["K-Means"]["scikit-learn"] for rate in rates[3:]]
    label, cells = row("| K-Means, 64 clients (scikit-learn)", 10, kmeans, 1).split(" | 10 | ")
    assert f"{label} | 10 | | | | {cells}" in SAID


def test_the_speeds_on_gpus_are_those_of_the_benches():
    gpu = BENCH / "h200"
    found = read(gpu / "bench.json")
    peers, share = found["phases"], found["useful_share"]
    ours, layer = (np.median(peers["train a round"]["seconds"][side]) for side in ("ours", "best effort"))
    assert f"and then {layer:.1f} s a round" in SAID and f"ours, at {ours:.2f} s".replace("0.", ".") in SAID
    spent = {what: np.median(found) for what, found in read(gpu / "compiled.json")["seconds"].items()}
    assert "{model:.2f} s; with a layer compiled {layer:.2f}, with nothing {nothing:.2f}".format(**spent) in SAID
    less = 100 * (1 - spent["model"] / spent["layer"])
    assert f"{less:.0f} per cent less than the one in the table, where both were timed" in SAID
    assert f"about {spent['model'] / ours:.0f} times as fast" in SAID
    useful = "{:.0f} per cent in embedding, {:.0f} in training (a loop over blocks), {:.0f} in reading"
    assert useful.format(*(100 * share[name] for name in ("embed", "train", "read"))) in SAID
    ratios = {}
    for phase in ("embed", "train a round", "routed generation", "read prompts", "K-Means"):
        rate = bench.rates(peers[phase])
        ratios[phase] = [rate["ours"] / rate[side] for side in rate if not side.startswith("ours")]
        for side in {"published", "best effort", "scikit-learn"} & set(rate):
            assert f"| {rate['ours']:,.0f} |" in SAID and f"| {rate[side]:,.0f} |" in SAID
            ratio = rate["ours"] / rate[side]
            assert any(f"**{ratio:.{digits}f}**" in SAID for digits in (0, 1, 2))
    train, write, embed = (ratios[phase] for phase in ("train a round", "routed generation", "embed"))
    assert f"| published flow, one H200 | {embed[0]:.1f} | {train[0]:.1f} | {write[0]:.1f} |" in README
    tuned = (
        f"{embed[1]:.2f} | {train[1]:.1f}, compiled layer by layer (about {spent['model'] / ours:.0f} where the whole"
    )
    assert f"| best effort, one H200 | {tuned} model is compiled, timed on another H200) | {write[1]:.1f} |" in README
    assert "{:.0f} times on the H200".format(*ratios["K-Means"]) in README
    shallow = bench.rates(peers["embed"])
    assert f"on CPUs, {shallow['ours, refined'] / shallow['ours']:.1f} on the H200." in README
    rate = bench.rates(read(BENCH / "h100" / "bench.json")["phases"]["train a round"])
    trained = f"{rate['ours']:,.0f} | {rate['published']:,.0f} | **{rate['ours'] / rate['published']:.1f}** (15)"
    assert f"on an H100 (commit 8b6811e) | {trained} |" in SAID
    for row in read(gpu / "training.json")["rows"]:
        assert f"{row['tokens_a_second']:,}" in SAID


def test_the_speeds_of_a_device_for_each_core_are_those_measured():
    rates = {"mixed": [], "float32": []}
    for name in ("one-1", "one-2", "two-1", "two-2"):
        for row in read(BENCH / "cores" / f"{name}.json")["rows"]:
            rates[row["dtype"]].append(f"{row['tokens_a_second']:.0f}")
    mixed = "{} and {} on one, {} and {} on two in mixed precision".format(*rates["mixed"])
    assert mixed + ", {} and {}, {} and {} in float32".format(*rates["float32"]) in SAID


@pytest.mark.parametrize(("name", "script"), [("growth", growth), ("precision", precision), ("startup", startup)])
def test_what_was_measured_once_is_as_it_was_measured(name, script):
    assert script.markdown(read(BENCH / f"{name}.json")) == (BENCH / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", ["h100", "profile", ".", "avx2"])
def test_training_beside_the_limit_is_that_measured(folder):
    measured = read(BENCH / folder / "limit.json")
    assert limit.markdown(measured) == (BENCH / folder / "limit.md").read_text(encoding="utf-8")
    if folder == "h100":
        for row in measured["rows"]:
            parts, total = row["profile"], sum(row["profile"].values())
            times = [
                f"{100 * parts[kind] / total:.0f}" for kind in (*profiled.KINDS, profiled.REST) if kind != "optimiser"
            ]
            cells = f"{row['tokens_a_second']:,.0f} ({100 * row['share']:.0f} %) | {' | '.join(times)}"
            assert f"| {cells} |" in SAID
    if folder == "avx2":
        shares = (f"{100 * row['share']:.0f}" for row in measured["rows"])
        assert "on the AMD without AVX-512 {}, {} and {}".format(*shares) in SAID
    if folder == ".":
        shares = {(row["shape"], row["dtype"]): round(100 * row["share"]) for row in measured["rows"]}
        floats, mixed = ([shares[shape, dtype] for shape in limit.Limit().shapes] for dtype in ("float32", "mixed"))
        assert "SmolLM2-135M {} per cent of the float32 rate,\n360M {}, Llama 3.2 1B {};".format(*floats) in SAID
        assert "in mixed precision {}, {} and {} of the bfloat16 rate".format(*mixed) in SAID
