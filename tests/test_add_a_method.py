"""The example of docs/add-a-method.md works, and obeys the laws."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_laws
from helpers import assert_close, begin, play

from fedrouter_jax import bank, memory, method, runs, serve
from fedrouter_jax.cli import main
from fedrouter_jax.config import EvaluationConfig
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import tiny
from fedrouter_jax.presets import smoke
from fedrouter_jax.strategies import fedit, ffalora
from fedrouter_jax.types import LoRA, Phase

PAGE = Path(__file__).resolve().parents[1] / "docs" / "add-a-method.md"
CODE = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]


@pytest.fixture(scope="module")
def page():
    """What the page's code defines, run from top to bottom."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_laws_take_a_method_of_ones_own(tmp_path):
    """As the page says; they are only collected here, and obeyed by the example below."""
    (tmp_path / "mymethods.py").write_text(CODE, encoding="utf-8")
    laws = Path(test_laws.__file__)
    environment = os.environ | {"METHOD": "mymethods:personal_a", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", str(laws), "-k", "personal", "-p", "no:xdist"]
    done = subprocess.run(command, cwd=laws.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout.split(": ")[-1]) > 5, done.stdout + done.stderr


MORE = """
import numpy as np

from fedrouter_jax import bank
from fedrouter_jax.federation import only_slot
from fedrouter_jax.strategies.fedrouter import nearest_slot

number = 3


def nothing():
    return {}


def made_of(owners):
    return Strategy("made-of", owners, *owned(owners), own_slot)


def everybodys():
    return made_of({"main": "public"})


def stranger():
    return made_of({"main": "clients"})


def nameless():
    return made_of(LoRA(a="client", b="shared"))


def crossed():
    return made_of({"main": LoRA(a="cluster", b="client")})


def other_name():
    return made_of({"own": "client"})


def moved_for_nothing():
    return made_of({"main": LoRA(a="fixed", b="client")})


def pair():
    # Two adapters for each cluster.
    owners = {"a": "cluster", "b": "cluster"}

    def route(state, clients, view, mode):
        own = nearest_slot(state, clients, view, mode)
        return bank.weights(state.bank, {"a": 0.4 * jnp.roll(own, 1, axis=1), "b": 0.6 * own})

    both = Phase(train={"a": True, "b": True}, weights={"a": 1.0, "b": 1.0})
    return Strategy(
        "pair", owners, *owned(owners), route, enrolling="clustering", phases=lambda round, rounds: (both,)
    )


def turns():
    # Clusters have turns, but one adapter.
    return Strategy("turns", {"main": "shared"}, *owned({"main": "shared"}), only_slot, enrolling="clustering")


def told():
    # Lanes are told a number, of an array that NumPy made.
    owners = {"main": "shared"}
    init, ask, *rest = owned(owners)

    def start(adapters, enrolment):
        return init(adapters, enrolment)._replace(memory={"pull": np.full(4, 0.5, np.float32)})

    def asked(state, work):
        return ask(state, work) | {"pull": state.memory["pull"][work.client]}

    def optimiser(adamw, rate, local):
        return adamw

    part = Phase(train={"main": True, "pull": False}, weights={"main": 1.0})
    return Strategy(
        "told", owners, start, asked, *rest, only_slot, phases=lambda round, rounds: (part,), optimiser=optimiser
    )


def informed(config):
    return made_of({"main": "client"})._replace(name=f"{config.rounds.rounds} rounds, scale {config.lora.scale}")


def narrow():
    both = Phase(train={"a": True, "b": True}, weights={"a": 1.0, "b": 1.0})
    return made_of({"a": "client", "b": "client"})._replace(phases=lambda round, rounds: (both,))
"""


def test_the_page_trains_and_scores(page):
    assert page["record"]["round"] == 3 and 0 <= page["scores"]["personalised"]["rouge1"]["mean"] <= 1
    first, last = (page["state"].bank["main"].a["q_proj"][i] for i in (0, 1))
    assert (np.asarray(first) != np.asarray(last)).any()  # every client has an A of its own


def test_the_command_line_runs_it_from_a_file(tmp_path, monkeypatch, capsys, unanswered):
    (tmp_path / "mymethods.py").write_text(CODE + MORE)
    (tmp_path / "broken.py").write_text("\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "run"
    small = ["--rounds", "1", "--evaluate-at", "--mix-rows", "4", "--test-rows", "2", "--out", str(out)]
    assert main(["run", "--preset", "smoke", "--strategy", "mymethods:personal_a", *small]) == 0
    assert len(list(out.glob("adapters/*/"))) == 4 and "mymethods:personal" in (out / "report.md").read_text()
    runs.proceed(out)
    small[-1] = str(tmp_path / "public")
    assert main(["run", "--preset", "smoke", "--strategy", "mymethods:everybodys", *small]) == 0
    capsys.readouterr()
    assert main(["route", small[-1], "text"]) == 2 and "say whose with --client" in capsys.readouterr().err
    for name, message in (
        ("fedavg", "choose among fedrouter, fedit"),
        ("nowhere:personal_a", "No module named 'nowhere'"),
        ("mymethods:another", "has no attribute 'another'"),
        ("mymethods:nothing", "gives a dict; expected a"),
        ("mymethods:number", "is a int; expected a function"),
        ("mymethods:stranger", "the owner of 'main' is 'clients'; choose among fixed, shared, "),
        ("mymethods:nameless", "owners are LoRA(a='client', b='shared', gate={}); expected a dict of named adapters"),
        ("mymethods:crossed", "client and cluster own the parts of 'main'"),
        ("mymethods:moved_for_nothing", "a phase moves a of 'main', whose owner is fixed, so nobody would keep it;"),
        ("mymethods:other_name", "a phase tells of main, but the adapters are own; name all of them in `train`"),
        ("json:loads", "could not be called, with config if it takes one (TypeError"),
        ("broken:method", "ZeroDivisionError: division by zero, "),
        ("broken:method", "broken.py:2)"),
        ("mymethods:narrow", "a row for each text and a column for each of 8 slots, a_0 to b_3"),
    ):
        assert main(["run", "--preset", "smoke", "--strategy", name, *small[:-1], str(tmp_path / "other")]) == 2
        *_, line = capsys.readouterr().err.splitlines()  # behind a line for each part of a run
        assert message in line


def test_what_moves_for_nothing_in_some_round_between_is_refused():
    def phases(round, rounds):
        return (Phase(train={"main": LoRA(a=round == 4, b=True)}, weights={"main": 1.0}),)

    config = replace(smoke(), rounds=replace(smoke().rounds, rounds=6))
    with pytest.raises(UserError, match="a phase moves a of 'main', whose owner is fixed"):
        method.check(config, ffalora()._replace(phases=phases))


@pytest.mark.parametrize("name", ["pair", "turns", "told"])
def test_a_method_of_another_kind_trains_answers_and_goes_on(name, finished, tmp_path, monkeypatch, unanswered):
    (tmp_path / "other_methods.py").write_text(CODE + MORE)
    monkeypatch.syspath_prepend(tmp_path)
    out, config = tmp_path / "run", replace(smoke(), strategy=f"other_methods:{name}")
    config = replace(config, rounds=replace(config.rounds, rounds=1), evaluation=EvaluationConfig(evaluate_at=()))
    scores = runs.run(config, out)
    runs.proceed(out)  # from its checkpoint
    answers = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert {answer["slot"] for answer in answers} - {None} <= {*range(4 if name == "pair" else 1)}
    plain = json.loads((finished / "scores.json").read_text())["personalised"]["routing_accuracy"]
    assert scores["personalised"].get("routing_accuracy") == (plain if name == "pair" else None)
    if name != "told":
        shown = serve.route(out, ["Say yes."])[0]
        both = f"a_{(shown['slot'] + 1) % 4} (0.40) + b_{shown['slot']} (0.60)"
        assert shown["adapter"] == ("shared_0" if name == "turns" else both)
        written = json.loads((out / "router" / "router.json").read_text())["adapters"]
        assert written == ([f"a_{slot} + b_{slot}" for slot in range(4)] if name == "pair" else [])
    else:
        federation = memory.federation(tiny.CONFIG, config, method.strategy(config, None), 1)
        lanes = memory.asked(federation, 4)
        assert memory.on_a_device(lanes, 1) == memory.nbytes(lanes)


def test_owners_that_do_not_fit_an_adapter_are_named(federation):
    gated = {"main": federation.adapters["main"]._replace(gate={"q_proj": jnp.zeros((2, 64, 1))})}
    with pytest.raises(UserError, match=r"does not fit the adapters \(main: a, b, gate\); say one thing of each"):
        bank.spread({"main": LoRA(a="client", b="shared")}, gated)


def test_a_method_that_takes_a_config_is_given_the_runs(tmp_path, monkeypatch):
    (tmp_path / "informed_methods.py").write_text(CODE + MORE)
    monkeypatch.syspath_prepend(tmp_path)
    found = method.strategy(replace(smoke(), strategy="informed_methods:informed"), None)
    assert found.name == f"3 rounds, scale {smoke().lora.scale}"


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "import sys\n\ndef make():\n    sys.exit(0)"])
def test_a_module_that_leaves_is_refused_in_a_line(code, tmp_path, monkeypatch):
    """It would end the command without a word, as if all had been done."""
    name = f"leaving_{len(code)}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"--strategy {name}:make.*SystemExit: 0"):
        method.strategy(replace(smoke(), strategy=f"{name}:make"), None)


@pytest.mark.parametrize(
    "law",
    [
        test_laws.test_permuting_lanes_changes_nothing,
        test_laws.test_a_lane_of_weight_zero_moves_nothing,
        test_laws.test_client_owned_leaves_never_travel,
    ],
)
def test_its_method_obeys_the_laws(page, federation, law):
    law(federation, page["personal_a"]())


def test_what_clients_send_is_clipped(page, federation):
    """By the page's method around FedIT: one client moves the average by the norm at most, or as in FedIT."""

    def alone(work, batch):
        return work._replace(weight=work.weight * (work.client == 1)), batch

    def moved(strategy):
        before = begin(federation, strategy).bank
        after = play(federation, strategy, federation.update, rounds=1, change=alone)[0].bank
        return jax.tree.map(lambda a, b: np.asarray(a - b), after, before)

    free, short = moved(fedit()), moved(page["clipped"](0.01))
    assert_close(moved(page["clipped"](1e3)), free)
    assert sum((leaf**2).sum() for leaf in jax.tree.leaves(short)) == pytest.approx(0.01**2, 1e-3)
    test_laws.test_a_lane_of_weight_zero_moves_nothing(federation, page["clipped"](0.01))
    test_laws.test_the_way_lanes_are_mapped_changes_nothing(federation, page["clipped"](0.01))


def test_a_phase_may_move_some_layers_alone(federation):
    def phases(round, rounds):
        return (Phase(train={"main": jnp.arange(2)[:, None, None] < 1}, weights={"main": 1.0}),)

    strategy = fedit()._replace(phases=phases)
    before = begin(federation, strategy).bank["main"]
    after = play(federation, strategy, federation.update, rounds=1)[0].bank["main"]
    for new, old in zip(*map(jax.tree.leaves, (after, before)), strict=True):
        assert abs(new[:, 0] - old[:, 0]).max() > 1e-3
        np.testing.assert_allclose(new[:, 1], old[:, 1], rtol=1e-6)
    whole = bank.wire_bytes(strategy.owners, {"main": before}, [Phase(True, {"main": 1.0})])
    assert 2 * bank.wire_bytes(strategy.owners, {"main": before}, phases(1, 5)) == whole > 0


def test_a_does_not_move_in_the_first_half(page, federation):
    strategy = page["personal_a"]()
    before = begin(federation, strategy).bank["main"]
    for rounds, still in ((2, True), (3, False)):
        after = play(federation, strategy, federation.update, rounds=rounds)[0].bank["main"]
        same = all(bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (after.a, before.a)), strict=True))
        assert same == still
