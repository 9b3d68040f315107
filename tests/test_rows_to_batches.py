"""From rows to batches: exact spans, packing, who holds what, and what each round trains."""

import dataclasses
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from fedrouter_jax import experiment
from fedrouter_jax.config import Config
from fedrouter_jax.data import packing, scenarios, schedule, synthetic, tokens
from fedrouter_jax.data.rows import Dataset, Row
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import tiny_tokenizer
from fedrouter_jax.types import Work

TOKENIZER = tiny_tokenizer()
ROW = Row("Say yes.\n### Response: no", "yes", "t")  # the marker stands inside the user's text


def test_prompt_and_response_meet_where_generation_starts():
    row, spaced = tokens.encode(TOKENIZER, [ROW, ROW._replace(output=" yes\n")], "alpaca", 400, 16)
    text = TOKENIZER.decode(row.prompt)
    task = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert text.startswith(f"{task}\n\n### Instruction:\n")  # Alpaca's words
    assert text.endswith("### Instruction:\nSay yes.\n### Response: no\n\n### Response:")
    assert TOKENIZER.decode(row.response[:-1]) == " yes"
    assert row.response[-1] == TOKENIZER.eos_token_id
    assert not row.truncated and spaced == row


def test_a_long_row_loses_the_end_of_its_instruction_never_its_answer():
    (row,) = tokens.encode(TOKENIZER, [Row("x" * 500, "yes", "t")], "short", 100, 16)
    assert row.length == 100 and row.truncated
    assert TOKENIZER.decode(row.prompt).endswith("xxx\n### Response:")
    assert TOKENIZER.decode(row.response[:-1]) == " yes"


def test_a_row_that_just_fits_loses_nothing():
    (whole,) = tokens.encode(TOKENIZER, [ROW], "short", 100, 16)
    assert tokens.encode(TOKENIZER, [ROW], "short", whole.length, 16) == [whole] and not whole.truncated
    (cut,) = tokens.encode(TOKENIZER, [ROW], "short", whole.length - 1, 16)
    assert cut.truncated and cut.length == whole.length - 1


def test_a_prompt_to_answer_is_the_same_whatever_it_is_compared_with():
    rows = [Row("x" * 500, answer, "t") for answer in ("", "yes", "y" * 50)]
    prompts = [row.prompt for row in tokens.encode(TOKENIZER, rows, "short", 100, 16, to_answer=True)]
    assert len(prompts[0]) == 100 - 16 and prompts == [prompts[0]] * 3


def test_a_long_answer_is_cut_and_does_not_learn_to_stop_there():
    (row,) = tokens.encode(TOKENIZER, [Row("x", "y" * 50, "t")], "short", 100, 16)
    assert len(row.response) == 16 and row.truncated
    assert TOKENIZER.eos_token_id not in row.response
    for room, ends in ((4, False), (5, True)):  # of " yes" all but the end token fits; that, too
        (row,) = tokens.encode(TOKENIZER, [ROW], "short", 100, room)
        assert (row.response[-1] == TOKENIZER.eos_token_id, row.truncated) == (ends, not ends)


@pytest.mark.parametrize("bos", [False, True])
def test_text_that_spells_a_special_token_is_text(bos):
    tokenizer, end = tiny_tokenizer(), TOKENIZER.eos_token
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{end} $A", special_tokens=[(end, TOKENIZER.eos_token_id)]
        )
    row = Row(f"What is {end} for?", f"It is {end} here.", "")
    (found,) = tokens.encode(tokenizer, [row], "short", 256, 64)
    assert found.prompt[0] == TOKENIZER.eos_token_id if bos else True
    assert TOKENIZER.eos_token_id not in found.prompt[bos:] + found.response[:-1] and not found.truncated
    assert tokenizer.decode(found.response[:-1]) == f" {row.output}"
    assert tokenizer.decode(tokens.encode_texts(tokenizer, [end], 64)[0][bos:]) == end


@pytest.mark.parametrize("max_length", [60, 256])
def test_a_prompt_goes_on_even_where_the_tokenizer_ends_every_text(max_length):
    ends, plain = tiny_tokenizer(), tiny_tokenizer()
    end = (plain.eos_token, plain.eos_token_id)
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {plain.eos_token}", special_tokens=[end]
    )
    rows = [Row("red " * 20, "blue", "")]
    assert ends("red")["input_ids"][-1] == plain.eos_token_id
    assert tokens.encode(ends, rows, "short", max_length, 8) == tokens.encode(plain, rows, "short", max_length, 8)
    assert tokens.encode_texts(ends, ["red"], 8) == tokens.encode_texts(plain, ["red"], 8)


def test_a_template_of_ones_own_has_special_tokens_where_it_spells_them_and_rows_have_none():
    end, number = TOKENIZER.eos_token, TOKENIZER.eos_token_id
    (row,) = tokens.encode(TOKENIZER, [Row(f"a{end}b", "c", "")], f"{end}Q: {{instruction}}{end}A:\n", 64, 8)
    assert row.prompt.count(number) == 2 and row.prompt[0] == number
    assert TOKENIZER.decode(row.prompt) == f"{end}Q: a{end}b{end}A:\n"
    assert TOKENIZER.decode(row.response) == f"c{end}"  # a line begins without a space


def test_a_template_that_ends_with_the_instruction_gives_up_its_end():
    (row,) = tokens.encode(TOKENIZER, [Row("x" * 90 + "y", "yes", "")], "Q {instruction}", 50, 8)
    assert row.length == 50 and TOKENIZER.decode(row.prompt) == "Q " + "x" * (50 - 2 - 5)
    assert TOKENIZER.decode(row.response[:-1]) == " yes"


def test_the_start_token_stands_before_a_template_of_ones_own_and_where_a_chat_says_so():
    tokenizer, end, number = tiny_tokenizer(), TOKENIZER.eos_token, TOKENIZER.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, number)]
    )
    tokenizer.chat_template = f"{end}{{{{ messages[0].content }}}}: "
    for template, expected in (("{instruction}: ", [number]), ("chat", [number]), ("short", [number])):
        (row,) = tokens.encode(tokenizer, [ROW], template, 128, 8)
        assert row.prompt[:1] == expected and number not in row.prompt[1:], template


@pytest.mark.parametrize("chat", [None, "{{ nothing() }}", "always the same", "{{ messages[0].content * 2 }}"])
def test_a_model_without_a_chat_template_that_works_is_bad_input(chat):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat
    with pytest.raises(UserError, match="--template is chat, but the model's "):
        tokens.encode(tokenizer, [ROW], "chat", 128, 8)


def test_no_room_for_the_instruction_is_bad_input():
    with pytest.raises(UserError, match="--max-length to at least"):
        tokens.encode(TOKENIZER, [ROW], "alpaca", 100, 64)
    with pytest.raises(UserError, match="raise --max-length to at least 31$"):
        tokens.encode(TOKENIZER, [ROW], "short", 30, 16)
    assert len(tokens.encode(TOKENIZER, [ROW], "short", 31, 16, to_answer=True)[0].prompt) == 15


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 600), min_size=1, max_size=80), st.integers(1, 4))
def test_texts_get_packs_that_hold_them_and_waste_no_more_than_plain_ones(sizes, together):
    def computed(time):
        packs = len(packing.first_fit([(size, 0) for size in sizes], time, 0, 32))
        return time * -(-packs // together)

    plain, fitted = packing.pack_length(max(sizes)), packing.fitted_length(sizes, 32, together)
    assert fitted >= max(sizes) and fitted % 32 == 0 and computed(fitted) <= computed(plain)
    assert fitted == plain or computed(fitted) <= 0.95 * computed(plain)


def test_first_fit_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    sizes = [(int(n), int(n) // 7) for n in rng.integers(1, 90, 200)]
    expected, free = [], []
    for row in sorted(range(200), key=lambda i: (-sizes[i][0], i)):
        need = (*sizes[row], 1)
        fits = [pack for pack, room in enumerate(free) if all(n <= r for n, r in zip(need, room, strict=True))]
        pack = fits[0] if fits else len(free)
        if not fits:
            expected.append([])
            free.append([96, 12, 4])
        expected[pack].append(row)
        free[pack] = [r - n for n, r in zip(need, free[pack], strict=True)]
    assert packing.first_fit(sizes, 96, 12, 4) == expected


lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 10)), min_size=0, max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths, st.integers(1, 3))
def test_packing_loses_nothing_and_mixes_nothing(sizes, lanes):
    rows = [tokens.Tokens([100 * i + 1] * p, [100 * i + 2] * r, False) for i, (p, r) in enumerate(sizes)]
    dealt = [rows[lane::lanes] for lane in range(lanes)]
    found = packing.batch(dealt, packs=12, time=40, predicted=20)
    packs = found.rows.packs
    seen = []
    for pack in range(int(found.count)):
        for segment in range(1, packs.segments[pack].max() + 1):
            here = packs.segments[pack] == segment
            seen.append(tuple(packs.tokens[pack][here]))
            (lane,), (number,) = (set(field[pack][here]) for field in (found.rows.lane, found.rows.row))
            assert tuple(dealt[lane][number].prompt + dealt[lane][number].response) == seen[-1]
            np.testing.assert_array_equal(packs.positions[pack][here], np.arange(here.sum()))
    assert Counter(seen) == Counter(tuple(row.prompt + row.response) for row in rows)
    assert (packs.segments[int(found.count) :] == 0).all()
    kept = found.rows.labels >= 0
    assert kept.sum() == sum(len(row.response) for row in rows)
    # The hidden state at `where` predicts the next token, which is the label, in the same text.
    packed, at = np.nonzero(kept)
    where = found.rows.where[packed, at]
    np.testing.assert_array_equal(packs.tokens[packed, where + 1], found.rows.labels[packed, at])
    np.testing.assert_array_equal(packs.segments[packed, where + 1], packs.segments[packed, where])


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
    bare = Dataset(*([row._replace(task="") for row in rows] for rows in data[:2]), "bare", False)
    with pytest.raises(UserError, match="--columns task=NAME"):
        scenarios.partition(bare, dealt_as("dual", 4), 0)
    assert scenarios.partition(bare, dealt_as("all", 4), 0).tasks == [""]


SIZES = np.array([[5, 3, 0], [4, 0, 0], [1, 1, 7]])


def test_clusters_take_turns_and_empty_ones_are_skipped():
    config = schedule.RoundConfig()
    turns = [schedule.lanes(SIZES, t, config, 0).cluster.tolist() for t in range(1, 5)]
    assert turns == [[0, 0, 0], [1, 0, 1], [0, 0, 2], [1, 0, 0]]


def test_clusters_that_no_round_reaches_are_named():
    assert schedule.never_trained(SIZES, schedule.RoundConfig(rounds=2), 0) == [(2, 2)]
    assert schedule.never_trained(SIZES, schedule.RoundConfig(rounds=3), 0) == []


@pytest.mark.parametrize("weighting, expected", [("cluster", [5, 4, 1]), ("client", [8, 4, 9]), ("uniform", [1, 1, 1])])
def test_lanes_weigh_what_the_config_says(weighting, expected):
    work = schedule.lanes(SIZES, 1, schedule.RoundConfig(weighting=weighting), 0)
    assert work.weight.tolist() == expected


def test_all_clusters_in_a_round_never_counts_one_twice():
    work = schedule.lanes(SIZES, 1, schedule.RoundConfig(clusters_per_round=0), 0)
    assert work.client.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    active = [(c, k) for c, k, w in zip(*work, strict=True) if w > 0]
    assert sorted(active) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]


def test_partial_participation_draws_other_clients_each_round_and_reaches_all():
    config = schedule.RoundConfig(participation=0.4)
    drawn = [schedule.lanes(np.ones((10, 1), int), t, config, 0).client.tolist() for t in range(1, 21)]
    assert all(len(set(clients)) == 4 for clients in drawn)
    assert set().union(*map(set, drawn)) == set(range(10)) and len(set(map(tuple, drawn))) > 15


def test_rows_come_once_each_before_any_comes_twice():
    order = schedule.draw(5, 12, np.random.default_rng(0))
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4] and len(order) == 12
    order = schedule.draw(20, 40, np.random.default_rng(0))
    assert (order[:20] != order[20:]).any()  # another order in every pass


def test_lanes_draw_their_rows_by_seed_round_client_and_cluster():
    rows = [tokens.Tokens([number], [0], False) for number in range(20)]

    def drawn(seed=0, round=1, client=0, cluster=0):
        work = Work(*np.array([[client], [cluster], [1]]))
        return schedule.batches(work, [[rows] * 2] * 2, round, 1, 10, 64, 32, seed).rows.packs.tokens.tolist()

    assert drawn() == drawn()
    assert drawn() not in [drawn(seed=1), drawn(round=2), drawn(client=1), drawn(cluster=1)]


def test_a_lane_of_weight_zero_gets_no_rows_and_shapes_do_not_depend_on_rows():
    rows = tokens.encode(TOKENIZER, [ROW] * 6, "short", 128, 8)
    members = [[rows[:5], []], [rows[:1], rows[:2]]]
    sizes = np.array([[5, 0], [1, 2]])
    config = schedule.RoundConfig(clusters_per_round=0)
    work = schedule.lanes(sizes, 1, config, 0)
    batch = schedule.batches(work, members, 1, 3, 4, 128, 32, 0)
    assert batch.rows.packs.tokens.shape == (4, 3, 4, 128)
    assert batch.count[work.weight == 0].sum() == 0 and (batch.count[work.weight > 0] > 0).all()
    pairs = schedule.batches(work, members, 1, 3, 4, 128, 32, 0, together=3)  # four lanes: two groups of two
    assert pairs.rows.packs.tokens.shape == (2, 3, 8, 128)
    np.testing.assert_array_equal((pairs.rows.labels >= 0).sum((0, 2, 3)), (batch.rows.labels >= 0).sum((0, 2, 3)))


def test_the_pack_is_the_length_that_wastes_least_and_always_holds_the_longest_row():
    rows = [tokens.Tokens([1] * 40, [2] * 8, False)] * 5
    time, predicted = packing.shape([rows] * 4, size=2, together=4)  # 8 rows of 48 tokens are one pack of 384
    assert (time, predicted) == (384, 96)
    assert packing.shape([rows] * 4, size=2, together=1) == (128, 32)  # two rows of 48 in 128; 192 would waste more
    long = [tokens.Tokens([1] * 700, [2] * 300, False)]
    assert packing.shape([rows, long], 2, 2) == (1024, 432)
    short = [tokens.Tokens([1] * 40, [2], False)] * 20 + [tokens.Tokens([1] * 4, [2] * 60, False)]
    assert packing.shape([short], 2, 1)[1] >= 60  # the longest answer, too
    assert packing.packs_of_steps([rows] * 4, 2, 4, time, predicted, 3) == [1, 1, 1]
    assert packing.packs_of_steps([rows] * 4, 3, 4, time, predicted, 2) == [2, 2]  # twelve rows, eight to a pack
    assert packing.packs_of_steps([rows] * 4, 8, 1, time, predicted, 2) == [1, 1]  # those of one client


@pytest.mark.parametrize(
    ("counts", "most", "best"),
    [
        ([21, 22, 20], 64, 22),  # one turn of as many as there are; not all that fit
        ([22, 21, 21], 16, 12),  # two turns of which the second is not half empty
        ([20, 20, 20, 21], 64, 22),  # no turn more for a pack in four steps
        ([8] * 30 + [9], 64, 8),  # but for one in thirty
        ([3], 64, 3),
        ([200], 1, 1),
    ],
)
def test_packs_go_together_in_numbers_that_leave_few_of_them_empty(counts, most, best):
    assert packing.packs_of_a_turn(counts, most) == best


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


def test_half_a_client_takes_part():
    assert [schedule.taking_part(5, share) for share in (0.01, 0.29, 0.31, 0.5, 1.0)] == [1, 1, 2, 3, 5]


def test_a_text_to_route_is_cut_where_a_row_is(tiny):
    assert [len(ids) for ids in tokens.encode_texts(tiny.tokenizer, ["x" * 50, "y"], 10)] == [10, 1]


def test_where_a_task_runs_out_all_clients_of_a_mixture_get_fewer():
    data = synthetic.make(train_per_task=40, test_per_task=40)
    config = scenarios.DataConfig(
        scenario="dirichlet", clients=8, train_rows=60, test_rows=10, mix_rows=12, mixture_alpha=1000.0
    )
    rows = [len(held.train) for held in scenarios.partition(data, config, 0).clients]
    assert min(rows) >= 14 and max(rows) - min(rows) <= 6
