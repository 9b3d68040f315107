"""A learning rate for each method, chosen by rows that are held out of the training rows."""

import json
from dataclasses import asdict, replace

import pytest
from written_runs import CONFIG, change_json, make_run

from experiments import learning_rates, summaries, table1
from fedrouter_jax import experiment, records
from fedrouter_jax.data.rows import Dataset, Row
from fedrouter_jax.errors import UserError
from fedrouter_jax.presets import smoke

BEST = {"fedrouter": 0.005, "fedit": 0.02}  # by the losses below


def summary(config) -> dict:
    """A summary whose loss on clients' own rows is least at the strategy's best rate; on the mix at the highest."""
    rate = config.local.learning_rate
    loss = {"personalised": abs(rate - BEST[config.strategy]), "generalisation": 1 - rate}
    parts = ("base", "base_generalisation", *loss)
    scores = {part: {"rouge1": {"mean": 0.4, "per_task": {}}} for part in parts}
    scores |= {part: scores[part] | {"loss": {"mean": value, "per_task": {}}} for part, value in loss.items()}
    cost = dict.fromkeys(("tokens", "bytes_up", "bytes_down", "seconds_training", "optimiser_steps_per_client"), 1.0)
    return {"config": asdict(config), "scores": scores, "cost": cost, "accuracy": {}, "device": "cpu"}


def test_each_method_trains_at_the_rate_of_least_loss_on_rows_held_out(tmp_path, monkeypatch):
    swept = {}

    def sweep(configs, folder, _, kept):
        kept.mkdir(parents=True)
        swept[kept.name] = folder, configs
        for name, config in configs.items():
            (kept / f"{name}.json").write_text(json.dumps(summary(config)))

    monkeypatch.setattr(table1, "sweep", sweep)
    options = table1.Table1(methods=("fedrouter+", "fedit"), scenarios=("dual",), once=(), rates=(0.005, 5e-05, 0.02))
    with pytest.raises(UserError, match="the process with --first-seed 0 does that first"):
        table1.main(replace(options, smoke=True, out=tmp_path, first_seed=1))
    table1.main(replace(options, smoke=True, out=tmp_path))
    (work, tried), (folder, made) = swept["rates"], swept["runs"]
    assert (work, folder) == (tmp_path / "work" / "rates", tmp_path / "work")
    assert [*tried] == [f"dual-{m}-{r}" for m in ("fedrouter+", "fedit") for r in ("0.005", "0.00005", "0.02")]
    basis = table1.configs(replace(options, smoke=True))
    for name, config in (tried | made).items():
        kind, run = learning_rates.kind_of(name), f"{learning_rates.kind_of(name)}-0"
        rate = float(name.rpartition("-")[2]) if name in tried else BEST[config.strategy]
        assert config == replace(
            basis[run],
            data=replace(basis[run].data, validation=name in tried),
            local=replace(basis[run].local, learning_rate=rate, min_learning_rate=config.local.min_learning_rate),
        ), kind
        assert config.local.min_learning_rate / rate == pytest.approx(
            basis[run].local.min_learning_rate / basis[run].local.learning_rate
        )
    written = (tmp_path / "table1.md").read_text()
    falls = {config.local.learning_rate: config.local.min_learning_rate for config in made.values()}
    assert f"learning rate 0.005 to {falls[0.005]:g} or 0.02 to {falls[0.02]:g}; at most" in written
    assert "| | 0.00005 | 0.005 | 0.02 |" in written
    assert "| fedrouter+, dual | 0.005 | **0.000** | 0.015 |" in written
    assert "| fedit, dual | 0.020 | 0.015 | **0.000** |" in written


def asked(tmp_path, **changes):
    """A table of two methods at two rates, on a folder of rows or what `changes` say."""
    for name in ("train", "test"):
        rows = [{"instruction": f"{name} {i}", "output": "x", "task": "ab"[i % 2]} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data": str(tmp_path), "methods": ("fedit", "local"), "scenarios": ("dual",), "once": (), "seeds": 2}
    options = table1.Table1(**given | {"rates": (0.005, 0.01)} | changes)
    made = table1.configs(options)
    return learning_rates.trials(made, options.rates), made


def test_what_would_end_trials_late_or_ask_test_rows_is_refused_before(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    tried, made = asked(tmp_path)
    learning_rates.check(tried, made, kept)
    run = kept / "dual-fedit-1.json"
    for rate, known in ((0.01, True), (0.02, False)):
        run.write_text(json.dumps(summary(summaries.portable(learning_rates.at(made[run.stem], rate)))))
        if known:
            learning_rates.check(tried, made, kept)
        else:
            with pytest.raises(UserError, match="dual-fedit-1.json is of another experiment, with the rate 0.02"):
                learning_rates.check(tried, made, kept)
    run.write_text(json.dumps(summary(summaries.portable(made[run.stem])) | {"data": "of other rows"}))
    with pytest.raises(UserError, match="dual-fedit-1.json is of other rows"):
        learning_rates.check(tried, made, kept)
    for data in ("synthetic", str(tmp_path / "train.jsonl")):  # others by the seed
        with pytest.raises(UserError, match="test rows of one seed are training rows of another"):
            learning_rates.check(*asked(tmp_path, data=data), tmp_path)
        learning_rates.check(*asked(tmp_path, data=data, seeds=1), tmp_path)
    with pytest.raises(UserError, match="--learning-rate is 0"):
        learning_rates.check(*asked(tmp_path, rates=(0.01, 0.0)), tmp_path)


def test_a_rate_without_a_finite_loss_is_not_chosen(tmp_path):
    tried, _ = asked(tmp_path)
    found = {name: summary(replace(config, strategy="fedit")) for name, config in tried.items()}
    for name in ("dual-fedit-0.01", "dual-local-0.01", "dual-local-0.005"):
        del found[name]["scores"]["personalised"]["loss"]
    found = {name: of for name, of in found.items() if "fedit" in name}
    assert learning_rates.chosen(found) == {"dual-fedit": 0.005}
    del found["dual-fedit-0.005"]["scores"]["personalised"]["loss"]
    with pytest.raises(UserError, match="dual-fedit: no loss is finite at 0.005, 0.01; give lower --rates"):
        learning_rates.chosen(found)


def test_held_out_rows_are_training_rows_that_nobody_trains_on():
    config = smoke()
    config = replace(config, data=replace(config.data, validation=True))
    whole, held = experiment.rows_of(smoke()), experiment.rows_of(config)
    assert sorted(held.train + held.test) == sorted(whole.train)
    assert not {row.instruction for row in held.train} & {row.instruction for row in held.test}
    tasks = {row.task for row in whole.train}
    for task in tasks:
        count = sum(row.task == task for row in held.test)
        assert count == pytest.approx(sum(row.task == task for row in whole.train) / 5, abs=1)
    assert experiment.rows_of(replace(config, seed=1)).test != held.test
    assert experiment.prepare(config).dataset == held
    mine = tuple(Row(f"question {i}", "yes", "task") for i in range(10))
    given = Dataset(mine, (Row("asked", "no", "task"),), "mine")
    assert len(experiment.rows_of(config, given).test) == 2 and experiment.rows_of(smoke(), given) is given
    natural = replace(config, data=replace(config.data, scenario="natural", clients=2))
    lacking = Dataset(tuple(row._replace(client="ab"[i > 8]) for i, row in enumerate(mine)), given.test, "mine")
    with pytest.raises(
        UserError, match="client 'b' has no test row in mine .--validation: of its training rows.; give"
    ):
        experiment.prepare(natural, dataset=lacking)


def test_a_run_on_held_out_rows_says_so_and_stands_beside_one_on_test_rows(tmp_path):
    def run(name, validation, rows):
        path = make_run(tmp_path / name, replace(CONFIG, data=replace(CONFIG.data, validation=validation)))
        change_json(path / "clusters.json", data=rows)
        return path

    held, usual = run("held", True, "one"), run("usual", False, "other")
    assert "no test row was asked" in "".join(records.notes(records.read(held)))
    assert "held out" not in "".join(records.notes(records.read(usual)))
    labels = [row.label for row in records.rows_of(records.read_all([held, usual]))]
    assert len(set(labels)) == len(labels) == 4
    again = run("again", False, "third")
    with pytest.raises(UserError, match="name the same rows"):
        records.rows_of(records.read_all([usual, again]))
