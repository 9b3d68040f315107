"""Who holds which rows, and what each is asked."""

import dataclasses
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrouter_jax import experiment
from fedrouter_jax.config import Config
from fedrouter_jax.data import scenarios, schedule, synthetic
from fedrouter_jax.data.rows import Dataset, Row
from fedrouter_jax.errors import UserError


def dealt_as(scenario, clients, **others):
    """Rows enough for small tests."""
    return scenarios.DataConfig(scenario=scenario, clients=clients, train_rows=30, test_rows=10, mix_rows=12, **others)


@pytest.mark.parametrize("scenario, held", [("single", 1), ("dual", 2), ("all", 4)])
def test_scenarios_deal_tasks_without_overlap(scenario, held):
    data = synthetic.make(train_per_task=40, test_per_task=20)
    split = scenarios.partition(data, dealt_as(scenario, 8), 0)
    dealt = [i for client in split.clients for i in client.train]
    assert len(dealt) == len(set(dealt))
    for number, client in enumerate(split.clients):
        tasks = Counter(data.train[i].task for i in client.train)
        assert set(tasks) == set(scenarios.tasks_of(number, split.tasks, scenario)) and len(tasks) == held
        assert max(tasks.values()) - min(tasks.values()) <= 1 and len(client.train) <= 30
        assert {data.test[i].task for i in client.test} == set(tasks) and len(client.test) <= 10
    assert Counter(data.test[i].task for i in split.mix) == {task: 3 for task in split.tasks}


@pytest.mark.parametrize("alpha, most", [(0.01, 1.5), (1000.0, 4)])
def test_mixtures_deal_without_overlap_and_follow_alpha(alpha, most):
    """Rows by a Dirichlet mixture: small alpha, about one task a client; large, all of them, evenly."""
    data = synthetic.make(train_per_task=60, test_per_task=20)
    split = scenarios.partition(data, dealt_as("dirichlet", 8, mixture_alpha=alpha), 3)
    dealt = [i for client in split.clients for i in client.train]
    assert len(dealt) == len(set(dealt)) and max(len(client.train) for client in split.clients) <= 30
    held = [Counter(data.train[i].task for i in client.train) for client in split.clients]
    assert np.mean([len(tasks) for tasks in held]) <= most
    if alpha > 1:
        assert all(len(tasks) == 4 and max(tasks.values()) - min(tasks.values()) <= 3 for tasks in held)
    for client, tasks in zip(split.clients, held, strict=True):  # tested on the mixture that it trains on
        assert {data.test[i].task for i in client.test} <= set(tasks)


def test_tasks_that_a_mixture_gives_to_newcomers_alone_or_to_nobody_are_no_founders():
    data = synthetic.make(train_per_task=40, test_per_task=20)
    seen = set()
    for seed in range(12):
        config = replace(dealt_as("dirichlet", 4), newcomers=2, mixture_alpha=0.1, train_rows=20)
        split = scenarios.partition(data, config, seed)
        first, every = ({data.train[i].task for c in split.clients[:n] for i in c.train} for n in (2, 4))
        assert (set(split.tasks), split.founding) == (every, len(first))
        assert {data.test[i].task for i in split.mix} == {row.task for row in data.train}
        seen.add((len(every), len(first)))
    assert min(seen)[0] < 4 and any(first < every for every, first in seen)


def test_neighbouring_tasks_are_those_that_rows_name_one_after_the_other():
    data = synthetic.make(train_per_task=40, test_per_task=20)
    data = data._replace(train=data.train[::-1])
    order = list(dict.fromkeys(row.task for row in data.train))
    split = scenarios.partition(data, dealt_as("dual", 4), 0)
    assert split.tasks == order
    assert {data.train[i].task for i in split.clients[3].train} == {order[3], order[0]}


def test_the_largest_remainders_of_a_mixture_are_rounded_up():
    rows = [Row("", "", task) for task in "ab" for _ in range(10)]
    (hand,) = scenarios.deal_shares(rows, ["a", "b"], np.array([[0.89, 0.11]]), 10, np.random.default_rng(0))
    assert Counter(rows[i].task for i in hand) == {"a": 9, "b": 1}


def test_a_task_that_runs_out_is_shared_by_what_was_wanted():
    rows = [Row("", "", "a")] * 6 + [Row("", "", "b")] * 20
    shares = np.array([[0.9, 0.1], [0.3, 0.7]])
    hands = scenarios.deal_shares(rows, ["a", "b"], shares, 10, np.random.default_rng(0))
    assert [Counter(rows[i].task for i in hand) for hand in hands] == [{"a": 4, "b": 1}, {"a": 1, "b": 7}]


def test_natural_clients_keep_their_own_rows():
    """Clients in the order of the rows, no more than asked for, caps by chance; without unseen tasks."""
    data = synthetic.make(train_per_task=40, test_per_task=20)
    train, test = (
        tuple(row._replace(client="bca"[i % 3]) for i, row in enumerate(rows)) for rows in (data.train, data.test)
    )
    named = data._replace(train=train, test=test)
    unseen = data.train[0].task
    config = replace(dealt_as("natural", 2, unseen=(unseen,)), train_rows=1000, test_rows=5)
    split = scenarios.partition(named, config, 0)
    for name, client in zip("bc", split.clients, strict=True):
        assert client.train == [i for i, row in enumerate(train) if row.client == name and row.task != unseen]
        assert {(test[i].client, test[i].task == unseen) for i in client.test} == {(name, False)}
        assert len(client.test) == 5
    assert split.clients[0].test != scenarios.partition(named, config, 1).clients[0].test
    assert unseen not in split.tasks and {test[i].task for i in split.mix} == {*split.tasks, unseen}
    assert split.founding == 3

    own = next(task for task in split.tasks if task != unseen)  # what only a newcomer holds is no founder's task
    train, test = (
        tuple(row._replace(client="late" if row.task == own else "b") for row in rows)
        for rows in (data.train, data.test)
    )
    later = data._replace(
        train=(*(row for row in train if row.client == "b"), *(row for row in train if row.client == "late")), test=test
    )
    split = scenarios.partition(later, replace(dealt_as("natural", 2), newcomers=1), 0)
    assert own in split.tasks and (len(split.tasks), split.founding) == (4, 3)
    config = Config(data=replace(dealt_as("natural", 2), newcomers=1))
    assert experiment.cluster_counts(config, split) == (None, 3)

    silent = named._replace(test=tuple(row._replace(client="b") for row in test))
    for rows, clients, message in ((named, 4, "name 3"), (data, 2, "name none"), (silent, 2, "'c' has no test row")):
        with pytest.raises(UserError, match=message):
            scenarios.partition(rows, dealt_as("natural", clients), 0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), cap=st.integers(4, 24), alpha=st.sampled_from([0.3, 5.0]))
def test_nobody_gets_more_rows_than_the_caps_say(seed, cap, alpha):
    data = synthetic.make(train_per_task=40, test_per_task=20)
    data = data._replace(test=[row._replace(output=str(i % 3)) for i, row in enumerate(data.test)])  # labels
    for scenario in ("all", "dirichlet"):
        made = scenarios.DataConfig(
            scenario=scenario,
            clients=3,
            mixture_alpha=alpha,
            train_rows=cap + 9,
            test_rows=cap,
            mix_rows=cap + 5,
            balanced=True,
        )
        try:
            split = scenarios.partition(data, made, seed)
        except UserError:  # a mixture may leave a client without test rows
            continue
        train, test = (max(map(len, held)) for held in zip(*split.clients, strict=True))
        assert train <= cap + 9 and test <= cap and len(split.mix) <= cap + 5


@pytest.mark.parametrize("scenario", ["single", "dual", "all"])
def test_balanced_tests_hold_every_label_equally_often(scenario):
    """A task answered by one of two labels, one of them rare: as many of each, and other tasks as before."""
    data = synthetic.make(train_per_task=40, test_per_task=32)
    task = data.train[0].task
    labelled = [
        row._replace(output="no" if i % 4 else "yes") if row.task == task else row for i, row in enumerate(data.test)
    ]
    data = data._replace(test=labelled)
    plain, even = (scenarios.partition(data, dealt_as(scenario, 4, balanced=way), 0) for way in (False, True))
    assert [client.train for client in even.clients] == [client.train for client in plain.clients]
    for held in [client.test for client in even.clients] + [even.mix]:
        answers = Counter(data.test[i].output for i in held if data.test[i].task == task)
        assert answers["yes"] == answers["no"] and set(answers) <= {"yes", "no"}
        assert len(held) == len(set(held))
    assert sum(data.test[i].task == task for i in even.mix) == 2  # of twelve, four tasks, an even number
    assert Counter(data.test[i].task for i in plain.mix)[task] == 3


def test_a_task_is_balanced_that_has_few_labels_and_a_share_that_holds_each():
    def answers(labels, cap):
        rows = [Row("", str(label), "t") for label in range(labels) for _ in range(5 + label)]
        (hand,) = scenarios.deal(rows, {"t": [0]}, cap, 1, np.random.default_rng(0), balanced=True)
        return Counter(rows[i].output for i in hand)

    assert set(answers(8, 16).values()) == {2} and len(answers(8, 16)) == 8
    assert answers(8, 7).total() == 7
    assert answers(9, 18).total() == 18 and set(answers(9, 18).values()) != {2}


def test_a_task_without_test_rows_is_not_asked_for():
    data = synthetic.make(train_per_task=40, test_per_task=20)
    task = data.train[0].task
    data = data._replace(test=tuple(row for row in data.test if row.task != task))
    for balanced in (False, True):
        split = scenarios.partition(data, dealt_as("dual", 4, balanced=balanced), 0)
        assert len(split.tasks) == 4 and all(client.test for client in split.clients)


def test_unseen_tasks_are_asked_for_in_the_mix_alone():
    data = synthetic.make(train_per_task=40, test_per_task=20)
    gone = data.train[0].task
    split = scenarios.partition(data, dealt_as("dual", 8, unseen=(gone,)), 0)
    assert gone not in split.tasks and len(split.tasks) == 3
    assert all(data.train[i].task != gone for client in split.clients for i in client.train)
    assert all(data.test[i].task != gone for client in split.clients for i in client.test)
    assert sum(data.test[i].task == gone for i in split.mix) == 3
    with pytest.raises(UserError, match="--unseen names 'poems'"):
        scenarios.partition(data, dealt_as("dual", 8, unseen=("poems",)), 0)


def test_a_shift_tests_each_client_on_what_the_next_one_holds():
    data = synthetic.make(train_per_task=40, test_per_task=20)
    still, shifted = (scenarios.partition(data, dealt_as("dual", 8, shift=shift), 0) for shift in (0, 2))
    assert [client.train for client in shifted.clients] == [client.train for client in still.clients]
    assert [client.test for client in shifted.clients] == [still.clients[(c + 2) % 8].test for c in range(8)]


@pytest.mark.parametrize("scenario, clients, shift", [("single", 4, 4), ("single", 8, 4), ("all", 4, 1)])
def test_a_shift_that_changes_nothing_is_refused(scenario, clients, shift):
    data = synthetic.make(train_per_task=40, test_per_task=20)
    with pytest.raises(UserError, match=f"--shift is {shift}, but .* on the tasks they hold themselves"):
        scenarios.partition(data, dealt_as(scenario, clients, shift=shift), 0)


def test_a_task_that_only_newcomers_hold_is_refused():
    data = synthetic.make(train_per_task=40, test_per_task=20)
    with pytest.raises(UserError, match="3 clients that train leave task .* raise --clients to at least 5"):
        scenarios.partition(data, dealt_as("single", 4, newcomers=1), 0)
    assert len(scenarios.partition(data, dealt_as("single", 5, newcomers=1), 0).clients) == 5


def test_scenarios_refuse_what_they_cannot_deal():
    data = synthetic.make(train_per_task=8, test_per_task=8)
    with pytest.raises(UserError, match="raise --clients to at least 4"):
        scenarios.partition(data, dealt_as("single", 3), 0)
    with pytest.raises(UserError, match="raise --clients to at least 3"):
        scenarios.partition(data, dealt_as("dual", 2), 0)
    first, *others = dict.fromkeys(row.task for row in data.train)
    with pytest.raises(UserError, match=f"--unseen leaves only {first!r}"):
        scenarios.partition(data, dealt_as("dual", 4, unseen=tuple(others)), 0)
    with pytest.raises(UserError, match="too few rows"):
        scenarios.partition(data, dealt_as("dirichlet", 32), 0)
    with pytest.raises(UserError, match="--clients is 100000, but synthetic has 32 training rows; lower it"):
        scenarios.partition(data, dealt_as("single", 100_000), 0)
    some = data._replace(train=[row._replace(task="") if i % 8 == 0 else row for i, row in enumerate(data.train)])
    with pytest.raises(UserError, match="4 of 32 training rows have no task; give all rows one, or none"):
        scenarios.partition(some, dealt_as("all", 4), 0)
    bare = Dataset(*([row._replace(task="") for row in rows] for rows in data[:2]), "bare")
    with pytest.raises(UserError, match="--columns task=NAME"):
        scenarios.partition(bare, dealt_as("dual", 4), 0)
    assert scenarios.partition(bare, dealt_as("all", 4), 0).tasks == [""]


def test_one_row_of_each_task_is_enough():
    data = synthetic.make(train_per_task=40, test_per_task=20)
    config = replace(dealt_as("dual", 4), train_rows=2, test_rows=2, mix_rows=4)
    split = scenarios.partition(data, config, 0)
    assert len(split.mix) == 4 and all(len(rows) == 2 for client in split.clients for rows in client)


def test_every_task_is_in_the_mix_and_trained():
    data = synthetic.make(train_per_task=40, test_per_task=20)
    config = scenarios.DataConfig(clients=8, train_rows=10, test_rows=4, mix_rows=3)
    with pytest.raises(UserError, match="--mix-rows is 3, but the mix is of 4 tasks"):
        scenarios.partition(data, config, 0)
    strange = data._replace(test=[data.test[0]._replace(task="poems"), *data.test[1:]])
    with pytest.raises(UserError, match="test rows of task 'poems', which no training row has"):
        scenarios.partition(strange, dataclasses.replace(config, mix_rows=12), 0)


def test_another_seed_deals_other_rows_and_draws_other_clients():
    data = synthetic.make(train_per_task=40, test_per_task=20)
    config = scenarios.DataConfig(clients=8, train_rows=10, test_rows=4, mix_rows=12)
    one, two = (scenarios.partition(data, config, seed) for seed in (0, 1))
    assert one == scenarios.partition(data, config, 0)
    assert one.clients[0].train != two.clients[0].train and one.mix != two.mix
    rounds = schedule.RoundConfig(participation=0.4)
    drawn = [
        [schedule.lanes(np.ones((10, 1), int), t, rounds, seed).client.tolist() for t in range(1, 6)] for seed in (0, 1)
    ]
    assert drawn[0] != drawn[1]


def test_where_a_task_runs_out_all_clients_of_a_mixture_get_fewer():
    data = synthetic.make(train_per_task=40, test_per_task=40)
    config = scenarios.DataConfig(
        scenario="dirichlet", clients=8, train_rows=60, test_rows=10, mix_rows=12, mixture_alpha=1000.0
    )
    rows = [len(held.train) for held in scenarios.partition(data, config, 0).clients]
    assert min(rows) >= 14 and max(rows) - min(rows) <= 6
