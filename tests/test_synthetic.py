"""The synthetic tasks: deterministic, held out, balanced, in house style, and not solved by copying."""

import hashlib
import random
import re
import statistics
from collections import Counter

import pytest
from rouge_score import rouge_scorer

from fedrouter_jax.data import synthetic
from fedrouter_jax.data.rows import Row
from fedrouter_jax.errors import UserError

DATA = synthetic.make()


def drafts(task, count, seed=0):
    rng = random.Random(f"{seed}")
    return [synthetic.GRAMMARS[task](rng, index) for index in range(count)]


def text_of(task, draft):
    return synthetic.SEPARATORS[task].join(draft.parts)


def test_rows_are_the_same_everywhere():
    # The digest changes with any change to the grammars: results of before and after it do not compare.
    text = "\n".join("\t".join(row[:3]) for row in DATA.train + DATA.test)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "dd7fe3a370c5c972"
    assert synthetic.make() == DATA
    assert synthetic.make(seed=1).train != DATA.train


def test_counts_names_and_order():
    assert DATA.name == "synthetic"
    assert Counter(row.task for row in DATA.train) == dict.fromkeys(synthetic.TASKS, 300)
    assert Counter(row.task for row in DATA.test) == dict.fromkeys(synthetic.TASKS, 200)
    assert len({row.task for row in DATA.train[:40]}) == 4  # shuffled, not task after task


def test_no_test_instruction_occurs_in_train():
    instructions = [row.instruction for row in DATA.train + DATA.test]
    assert len(set(instructions)) == len(instructions)


@pytest.mark.parametrize("task", synthetic.TASKS)
def test_no_test_input_occurs_in_train_under_another_request(task, monkeypatch):
    monkeypatch.setitem(synthetic.REQUESTS, task, ("{x}",))
    monkeypatch.setattr(synthetic, "GENERIC", ("{x}",))
    bare = synthetic.make(2, train_per_task=1000, test_per_task=1000)

    def inputs(rows):
        separator = synthetic.SEPARATORS[task] or "never in a text"
        return {frozenset(row.instruction.split(separator)) for row in rows if row.task == task}

    assert len(inputs(bare.train)) == len(inputs(bare.test)) == 1000
    assert not inputs(bare.train) & inputs(bare.test)


def test_paraphrase_is_balanced():
    for rows in (DATA.train, DATA.test):
        answers = Counter(row.output for row in rows if row.task == "paraphrase")
        assert answers["yes"] == answers["no"] == sum(answers.values()) / 2


def test_paraphrase_answers_follow_the_content():
    # Recover topic and intent of each question by matching it against the phrasings, then judge the pair anew.
    asked = {}
    for topics, *intents in synthetic.KINDS:
        for intent in intents:
            for phrasing in intent.split(" / "):
                for topic in topics.split(", "):
                    asked.setdefault(phrasing.format(topic), set()).add((intent, topic))
    assert all(len(meanings) == 1 for meanings in asked.values())  # no question has two meanings
    for draft in drafts("paraphrase", 2000):
        first, second = draft.parts
        assert first != second
        assert draft.output == ("yes" if asked[first] == asked[second] else "no")


STYLES = {
    "paraphrase": r"yes|no",
    "triples": r"[A-Z][\w ]+ is an? [\w ]+\.",
    "dialogue": r"[A-Z][a-z]+ (and [A-Z][a-z]+ )?will [\w ]+\.",
    "headline": r"[a-z0-9 ,:-]+",
}


@pytest.mark.parametrize("task", synthetic.TASKS)
def test_house_style(task):
    # One style fits its own task and none of the others, which is what makes the tasks conflict.
    for draft in drafts(task, 2000):
        assert [name for name, style in STYLES.items() if re.fullmatch(style, draft.output)] in (
            [task],
            ["paraphrase", "headline"],  # yes and no are lower case as well
        )
    words = {word for draft in drafts(task, 2000) for word in draft.output.split()}
    if task == "headline":
        assert not words & {"the", "a", "an", "will", *synthetic.NUMBERS}
    if task == "triples":
        assert not [word for word in words if word.isdigit() and len(word) < 4]  # only years stay digits
        assert not [draft for draft in drafts(task, 2000) if re.search(r"\ba [AEIOUaeiou]", draft.output)]
    if task == "dialogue":
        assert not words & set(synthetic.TIMES)


def test_dialogue_summary_names_who_does_it():
    for index, draft in enumerate(drafts("dialogue", 2000)):
        speakers = list(dict.fromkeys(line.split(":")[0] for line in draft.parts))
        subjects = draft.output.split(" will ")[0].split(" and ")
        expected = [[0, 1], [0, 1], [1], [1], [0], [2], [0, 1]][index % 7]
        assert subjects == [speakers[i] for i in expected]


def test_every_word_of_a_triple_sentence_comes_from_its_facts():
    # Subject and either the value itself or its wording; a dropped fact leaves no trace.
    for draft in drafts("triples", 600):
        facts = [part.split(", ") for part in draft.parts]
        assert len({subject for subject, _, _ in facts}) == 1
        assert draft.output.startswith(facts[0][0])
        for _, name, value in facts:
            told = {
                "cuisine": synthetic.DEMONYMS,
                "origin": synthetic.DEMONYMS,
                "country": synthetic.DEMONYMS,
                "priceRange": synthetic.PRICES,
                "careerField": synthetic.CAREERS,
                "bookTopic": synthetic.GENRES,
                "course": synthetic.COURSES,
                "floorCount": {str(i + 2): word for i, word in enumerate(synthetic.NUMBERS)},
                "titleCount": {str(i + 2): word for i, word in enumerate(synthetic.NUMBERS)},
            }.get(name, {value: value})[value]
            assert re.search(rf"\b{told}\b", draft.output), (draft, told)


@pytest.mark.parametrize("task", synthetic.TASKS)
def test_requests(task):
    requests = synthetic.REQUESTS[task] + synthetic.GENERIC
    assert all(request.count("{x}") == 1 for request in requests) and len(set(requests)) == len(requests)
    rows = [row for row in DATA.train if row.task == task]
    generic = [row for row in rows if any(row.instruction.endswith(g.split("{x}")[1]) for g in synthetic.GENERIC)]
    assert 0.2 < len(generic) / len(rows) < 0.5
    assert all(row.instruction == row.instruction.strip() and row.output == row.output.strip() for row in rows)


@pytest.mark.parametrize("task", synthetic.TASKS)
def test_grammar_is_rich(task):
    inputs = {frozenset(draft.parts) for draft in drafts(task, 20_000)}
    assert len(inputs) > 10_000


@pytest.mark.parametrize("task", synthetic.TASKS)
def test_rows_are_short(task):
    # About 0.75 words a token; the marks count as words.
    words = [len(re.findall(r"\w+|[^\w\s]", row.instruction)) for row in DATA.train if row.task == task]
    assert 15 < statistics.mean(words) < 35 and max(words) < 60


@pytest.mark.parametrize("task", synthetic.TASKS)
def test_copying_and_constants_score_low(task):
    scorer = rouge_scorer.RougeScorer(["rouge1"])
    pairs = drafts(task, 400)
    train = [row for row in DATA.train if row.task == task]

    def score(answer_of):
        return statistics.mean(scorer.score(draft.output, answer_of(draft))["rouge1"].fmeasure for draft in pairs)

    assert score(lambda draft: text_of(task, draft)) < 0.45
    frequent = Counter(row.output for row in train).most_common(1)[0][0]
    assert score(lambda draft: frequent) < (0.51 if task == "paraphrase" else 0.35)
    # The right content in another task's shape: a neighbour row's answer.
    assert score(lambda draft: train[len(draft.parts[0])].output) < (0.6 if task == "paraphrase" else 0.35)


def test_errors():
    with pytest.raises(UserError, match="train_per_task is 0; expected at least 1"):
        synthetic.make(train_per_task=0)
    with pytest.raises(UserError, match="test_per_task is -1"):
        synthetic.make(test_per_task=-1)


def test_used_up_grammar_says_so(monkeypatch):
    draw = synthetic.Draft(("only one",), "answer")
    monkeypatch.setitem(synthetic.GRAMMARS, "headline", lambda rng, index: draw)
    assert isinstance(synthetic.rows("headline", 1, random.Random("0"), set())[0], Row)
    with pytest.raises(UserError, match="the grammar of task 'headline' has no new row after 1; ask for fewer"):
        synthetic.rows("headline", 2, random.Random("0"), set())
