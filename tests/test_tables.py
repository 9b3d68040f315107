"""The tables of Table 1: whose means are compared, what is bold, what is a gain."""

from dataclasses import replace

import numpy as np
import pytest
from written_runs import BASE_SCORES, make_summary

from experiments import equal, table1, table1_tables
from experiments.methods import METHODS
from fedrouter_jax.errors import UserError
from fedrouter_jax.presets import smoke


def test_the_table_marks_the_best_rival_and_states_the_gain():
    found = {
        f"dual-{method}-{seed}": make_summary(method, seed, score + 0.02 * seed)
        for method, score in (("fedrouter", 0.48), ("fedit", 0.38), ("fedrouter-a", 0.4), ("oracle", 0.9))
        for seed in (0, 1)
    }
    lines = table1_tables.markdown(found).splitlines()
    assert "**synthetic** rows" in lines[2] and "Seeds [0, 1]" in lines[4]
    row = {
        line.split("|")[1].strip(): line
        for line in lines[: lines.index("## Seed 0 of dual: every method on the same rows")]
        if line[:2] == "| "
    }
    assert "**0.490 ± 0.127**" in row["fedrouter"] and "0.390 ± 0.127" in row["fedit"] and "**" not in row["fedit"]
    bound = row["oracle (told the tasks)"]
    assert "**" not in bound and "0.910" in bound  # no rival
    last = row["**fedrouter, gain over the best baseline**"]
    for points in ("+0.100", "+0.050"):
        assert f"+25.6 % over fedit ({points} ± 0.000; 2 seeds)" in last
    assert "| dual | fedrouter | 2 | 0.490 / 0.245 |" in lines  # task by task
    assert "| fedrouter | 0.480 | 0.240 | 0.360 |" in lines  # seed 0
    assert "| fedrouter | 6 | 1000 | 3.0 | 4.5 | 7 |" in lines  # three rounds of two steps
    found["dual-fedrouter-0"]["cost"]["seconds_total"] = 9.0  # what a resumed run does not know
    assert table1_tables.markdown(found).splitlines() == lines


def test_a_method_of_ones_own_is_in_the_tables_and_has_a_gain():
    """It is nobody's baseline, however good it is."""
    own = "mymethods:personal_a"
    found = {
        f"dual-{method}-{seed}": make_summary(method, seed, score + 0.02 * seed)
        for method, score in (("fedrouter+", 0.48), ("fedit", 0.38), (own, 0.58))
        for seed in (0, 1)
    }
    lines = table1_tables.markdown(found).splitlines()
    assert f"| dual | {own} | 2 | 0.590 / 0.295 |" in lines and f"| {own} | 0.580 | 0.290 | 0.435 |" in lines
    scores = lines[: lines.index("## Leads by task")]
    assert [line.split("|")[1].strip() for line in scores if line[:2] == "| "][1:] == [
        *("base model", "fedrouter+", "fedit", own),
        *(f"**{method}, gain over the best baseline**" for method in ("fedrouter+", own)),
    ]
    assert sum("+51.3 % over fedit" in line for line in scores) == 1
    configs = table1.configs(table1.Table1(methods=(own, f"{own}+"), scenarios=("dual",), once=(), seeds=1))
    plain, staggered = configs[f"dual-{own}-0"], configs[f"dual-{own}+-0"]
    assert (plain.strategy, plain.rounds.turns) == (own, "own")
    assert staggered == replace(plain, rounds=replace(plain.rounds, turns="staggered"))
    with pytest.raises(UserError, match="--strategy nowhere:method: not to be imported"):
        table1.main(table1.Table1(smoke=True, methods=("fedit", "nowhere:method")))


def test_the_base_model_is_that_of_the_method_that_comes_first():
    """Whichever of the names sorts first or last: another method in the table does not change its row."""
    found = {
        f"dual-{method}-0": make_summary(method, 0, 0.4)
        for method in ("clustered", "fedrouter", "rolora", "unheard-of")
    }
    for number, name in enumerate(sorted(found)):
        found[name]["scores"]["base"]["rouge1"]["mean"] = 0.1 + 0.01 * number
    assert table1_tables.cells(found)["dual", "personalised", table1_tables.UNTRAINED] == {0: pytest.approx(0.11)}


def test_the_least_loss_is_the_best_and_runs_without_one_are_left_out():
    found = {
        f"dual-{method}-{seed}": make_summary(method, seed, 0.4)
        for method in ("fedrouter+", "fedit", "local")
        for seed in (0, 1)
    }
    assert "Loss" not in table1_tables.markdown(found)
    for name, loss in (("fedrouter+", 1.5), ("fedit", 2.0)):
        for seed in (0, 1):
            for part, scores in found[f"dual-{name}-{seed}"]["scores"].items():
                scores["loss"] = {"mean": (3.0 if part in BASE_SCORES else loss) + 0.02 * seed, "per_task": {}}
    found["dual-ifca-7"] = make_summary("ifca", 7, 0.4)  # another seed: its loss is that of other rows
    for scores in found["dual-ifca-7"]["scores"].values():
        scores["loss"] = {"mean": 0.1, "per_task": {}}
    lines = table1_tables.markdown(found).split("## Loss of the reference answers")[1].split("\n## ")[0].splitlines()
    row = {line.split("|")[1].strip(): line for line in lines if line[:2] == "| "}
    assert "**1.510 ± 0.127**" in row["fedrouter+"] and "**" not in row["fedit"] and not {"local", "ifca"} & {*row}
    assert (
        "-24.9 % over fedit (-0.500 ± 0.000; 2 seeds)"
        in row["**fedrouter+, more than the best baseline: less is better**"]
    )


@pytest.mark.parametrize(
    ("seeds", "best"), [((0, 0), ["fedrouter+"]), ((0, 1), []), (((0, 1), (2, 3)), []), (((0, 1), 0), [])]
)
def test_the_best_is_told_of_equal_seeds_alone(seeds, best):
    """And it is never the base model, which has those of all methods and is better here."""
    found = {
        f"dual-{method}-{seed}": make_summary(method, seed, score)
        for (method, score), some in zip((("fedrouter+", 0.09), ("fedit", 0.08)), seeds, strict=True)
        for seed in np.atleast_1d(some).tolist()
    }
    found["dual-ifca-0"] = make_summary("ifca", 0, 0.05)
    lines = table1_tables.scores(table1_tables.cells(found), ("fedrouter+", "fedit", "ifca"))
    assert [line.split("|")[1].strip() for line in lines if "**0." in line] == best


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"data": replace(smoke().data, clients=8)}, "clients is 4 in dual-fedit-0 and 8 in dual-local-0"),
        ({"local": replace(smoke().local, batch=3)}, "batch is 4 in dual-fedit-0 and 3 in dual-local-0"),
        ({"lora": replace(smoke().lora, rank=2)}, "rank is 8 in dual-fedit-0 and 2 in dual-local-0"),
        ({"rounds": replace(smoke().rounds, rounds=9)}, "rounds is 3 in dual-fedit-0 and 9 in dual-local-0"),
        ({"local": replace(smoke().local, steps=9)}, "steps is 2 in dual-fedit-0 and 9 in dual-local-0"),
        ({"dtype": "bfloat16"}, "dtype is 'float32' in dual-fedit-0 and 'bfloat16' in dual-local-0"),
        ({"quantise": "nf4"}, "quantise is 'none' in dual-fedit-0 and 'nf4' in dual-local-0"),
        ({"model": "other"}, "model is 'tiny' in dual-fedit-0 and 'other' in dual-local-0"),
        ({"seed": 1, "strategy": "local", "data": replace(smoke().data, scenario="all")}, ""),
        ({"local": replace(smoke().local, learning_rate=1e-3)}, "learning_rate is 0.005 in dual-local-1 and 0.001"),
    ],
)
def test_a_table_of_unequal_budgets_is_refused(changed, expected):
    """But for the learning rate, which a method may have for itself."""
    config = replace(smoke(), data=replace(smoke().data, scenario="dual"))
    configs = {"dual-fedit-0": replace(config, local=replace(config.local, learning_rate=1e-2))}
    configs |= {"dual-local-1": config, "dual-local-0": replace(config, **changed)}
    gone = make_summary("fedgone", 0, 0.5)
    assert table1_tables.shown({"dual-fedgone-0": gone | {"config": {}}, "dual-fedit-0": gone}) == {
        "dual-fedit-0": gone
    }
    check = equal.check_rates if "learning_rate" in expected else equal.check_budgets
    if expected:
        with pytest.raises(UserError, match=expected):
            check(configs)
    else:
        check(configs)


def test_a_method_without_a_rival_is_no_best():
    """In Single alone two methods ran."""
    names = ("dual-fedrouter+-0", "single-fedrouter+-0", "single-fedit-0")
    found = {name: make_summary(name.split("-")[1], 0, 0.5) for name in names}
    head, _, *rows = table1_tables.scores(table1_tables.cells(found), ("fedrouter+", "fedit"))
    (row,) = (line for line in rows if line.startswith("| fedrouter+ "))
    pairs = zip(*(text[2:-2].split(" | ") for text in (head, row)), strict=True)
    best = {name.split(", ")[1] for name, cell in pairs if "**" in cell}
    assert best == {"single"}


def test_means_that_are_compared_are_of_the_same_seeds():
    """A method with more seeds than another shows those that both have; its gain is over all of its own."""
    found = {
        f"dual-{method}-{seed}": make_summary(method, seed, score + 0.02 * seed)
        for method, score, seeds in (("fedrouter", 0.48, 4), ("fedit", 0.38, 4), ("local", 0.3, 2), ("ifca", 0.9, 1))
        for seed in range(seeds)
    }
    found["dual-flora-9"] = make_summary("flora", 9, 0.95)  # once, with a seed that no other has
    lines = table1_tables.scores(table1_tables.cells(found), tuple(METHODS))
    row = {line.split("|")[1].strip(): line for line in lines}
    wanted = {"fedrouter": "**0.490 ± 0.127**", "local": "0.310 ± 0.127", "ifca": "0.900", "flora": "0.950"}
    for method, cell in wanted.items():
        assert f"| {cell} |" in row[method]
    assert "over fedit (+0.100 ± 0.000; 4 seeds)" in row["**fedrouter, gain over the best baseline**"]


def test_a_method_that_is_no_more_is_no_baseline():
    found = {f"dual-{m}-{seed}": make_summary("fedit", seed, 0.4) for m in ("fedrouter", "fedit") for seed in (0, 1)}
    lines = table1_tables.scores(table1_tables.cells(found), tuple(METHODS))
    found |= {f"dual-fedgone-{seed}": make_summary("fedit", seed, 0.6) for seed in (1, 2)}  # left in the folder
    assert table1_tables.scores(table1_tables.cells(found), tuple(METHODS)) == lines


def test_nobody_gains_over_the_untrained_model():
    found = {f"all-fedrouter-{seed}": make_summary("fedrouter", seed, 0.5) for seed in (0, 1)}
    last = table1_tables.scores(table1_tables.cells(found), tuple(METHODS))[-1]
    assert [cell.strip() for cell in last.split("|")[2:-1]] == ["", ""]
