"""Four small conflicting tasks drawn from grammars, in the image of FedRouter's (arXiv 2604.00050, section 4).

The paper fine-tunes on four FLAN tasks: question pairs (QQP), triples to text (WebNLG), chat summaries (SAMSum) and
headlines (Gigaword). These stand-ins have the same forms, no shared text, and rows short enough to train on two CPU
cores. Each task has one house style, so an answer in another task's style scores low:

* paraphrase: `yes` or `no`, lower case, in equal numbers;
* triples: one full sentence, facts in a fixed order, codes and counts turned into words (`4` becomes `four`);
* dialogue: what somebody will do, third person, chat abbreviations written out (`fri` becomes `on Friday`);
* headline: lower case, present tense, no articles, newsroom verbs, words turned into digits (`four` becomes `4`).

About a third of the rows carry a request that tells nothing about the style (`GENERIC`), so the style must be learnt
from the form of the input. Only `random.Random` seeded with a string is used, so rows are equal on every platform.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from fedrouter_jax.data.rows import Dataset, Row
from fedrouter_jax.errors import UserError


class Draft(NamedTuple):
    """What a grammar draws: the pieces of the input, before a request is put around them, and the right answer."""

    parts: tuple[str, ...]
    output: str


# ---------------------------------------------------------------------------------------------------- shared words

CITIES = (
    "Dalton Milford Ashton Redhill Norwood Fairview Kingston Lakeside Brookfield Oakdale Westport Greenville Riverton "
    "Hampton Clifton Newport Springfield Harrow Bradford Weston"
).split()
FIRST = "Anna Ben Carl Dana Emma Frank Grace Henry Ivan Julia Kevin Laura Mark Nina Oscar Paula Rosa Sam Tina".split()
LAST = "Stone Baker Hill Moore Wells Fox Lane Price Young Reed Marsh Cole Hunter Bell Wood Grant".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()  # NUMBERS[i] is i + 2
DEMONYMS = {
    "Italy": "Italian", "France": "French", "Spain": "Spanish", "Greece": "Greek", "Turkey": "Turkish",
    "Mexico": "Mexican", "Japan": "Japanese", "China": "Chinese", "India": "Indian", "Poland": "Polish",
    "Russia": "Russian", "Brazil": "Brazilian", "Sweden": "Swedish", "Portugal": "Portuguese",
}  # fmt: skip


def _pick(rng: random.Random, *lists):
    """One item of each list (the keys of a dict count as a list)."""
    return tuple(rng.choice(list(items)) for items in lists)


def _number(rng: random.Random) -> tuple[str, str]:
    """A small number as word and as digits."""
    i = rng.randrange(len(NUMBERS))
    return NUMBERS[i], str(i + 2)


# ------------------------------------------------------------------------------------------------------ paraphrase

# A paragraph is one kind: a line of topics, then the intents, whose phrasings, split by " / ", ask the same thing.
QUESTIONS = """
rice, fish, pasta, chicken, oatmeal, pumpkin, cabbage, salmon, bread, quinoa, garlic, spinach, tofu, beef, \
turkey, lamb, corn, pork, tuna, barley, squash, shrimp, broccoli, kale
How do I cook {}? / What is the best way to cook {}? / Can you tell me how to prepare {}? / How is {} made?
How long can I keep {}? / When does {} go bad? / For how many days is {} fresh? / How long does {} last?
Is {} good for your health? / What are the health benefits of {}? / Why is {} healthy? / Is {} good for me?
Where can I buy cheap {}? / Which shop has cheap {}? / Where is {} sold for less? / Who sells cheap {}?

Paris, London, Rome, Berlin, Tokyo, Boston, Madrid, Dublin, Sydney, Chicago, Vienna, Oslo, Athens, Cairo, Prague, \
Lisbon, Denver, Delhi, Miami, Geneva, Seattle, Toronto, Moscow, Milan
When should I visit {}? / What is the best month to see {}? / Which season suits {}? / When is {} at its best?
What does it cost to live in {}? / Is life in {} expensive? / How much money do I need in {}? / Is {} costly?
How do I find a job in {}? / How can I get work in {}? / Who is hiring in {}? / Where are the jobs in {}?
What should I see in {}? / Which sights in {} are worth it? / What are the sights of {}? / What to see in {}?

chess, piano, Spanish, drawing, swimming, guitar, math, tennis, singing, coding, Latin, dancing, poker, sewing, \
Japanese, painting, yoga, golf, violin, French, writing, juggling, boxing, photography
How can I learn {}? / What is the best way to start {}? / How do beginners study {}? / How do I begin with {}?
How long does it take to master {}? / How soon can I be good at {}? / Is {} quick to learn? / How hard is {}?
Can I earn money with {}? / Can one make a living with {}? / Does {} pay well? / Is {} a good job?
Which book on {} is the best? / What should I read about {}? / Are there books about {}? / Any good {} book?

phone, laptop, camera, bike, printer, washing machine, radio, watch, car, oven, lamp, heater, toaster, piano, tent, \
fridge, scooter, clock, blender, stove, sofa, truck, keyboard, boat
How do I repair my {}? / How can I fix a broken {}? / What do I do with a broken {}? / Who can fix my {}?
Which {} should I buy? / What is the best {} on the market? / Can you name a good {} to get? / What {} is best?
How do I sell my old {}? / Where can I find a buyer for my {}? / Who wants to buy my {}? / Where do I sell a {}?
How do I clean a {}? / How can I get dirt off a {}? / How do I wash my {}? / What gets a {} clean?

dog, cat, horse, parrot, rabbit, turtle, goat, snake, hamster, duck, pony, goldfish, lizard, pig, sheep, ferret, \
donkey, chicken, mouse, frog, llama, pigeon, cow, gecko
What should I feed my {}? / What food is right for a {}? / What does a {} eat? / What do I give a {} to eat?
How long does a {} live? / What is the life span of a {}? / How old can a {} get? / At what age does a {} die?
How do I train a {}? / How can I teach a {} tricks? / Can a {} learn commands? / Is it possible to train a {}?
Why is my {} sick? / What makes a {} ill? / What are signs that a {} is unwell? / Is my {} ill?
"""
KINDS = [paragraph.split("\n") for paragraph in QUESTIONS.strip().split("\n\n")]


def _paraphrase(rng: random.Random, index: int) -> Draft:
    """Two questions; even indices have the same meaning, odd ones differ in the topic or in what is asked of it."""
    topics, *intents = rng.choice(KINDS)
    topic, other_topic = rng.sample(topics.split(", "), 2)
    intent, other_intent = (phrasings.split(" / ") for phrasings in rng.sample(intents, 2))
    first, second = rng.sample(intent, 2)
    if index % 2 == 0:
        return Draft((first.format(topic), second.format(topic)), "yes")
    if rng.random() < 0.6:
        return Draft((first.format(topic), rng.choice(intent).format(other_topic)), "no")
    return Draft((first.format(topic), rng.choice(other_intent).format(topic)), "no")


# --------------------------------------------------------------------------------------------------------- triples

ADJECTIVES = "Blue Golden Silver Green Old Little Grey White Happy Quiet Red Royal Hidden Silent Bright".split()
VENUES = "Kettle Lantern Anchor Garden Spoon Windmill Harbor Pepper Table Fountain".split()
TOWERS = "Tower House Hall Plaza Court Library Palace Gate".split()
TITLES = "River Mountain Letter Winter Mirror Bridge Island Promise Storm Road".split()
TEAMS = "Rovers Lions Eagles Sharks Wolves Tigers Hawks Bears".split()
DISHES = "Pie Stew Soup Salad Cake Pudding Curry Roll".split()
PRICES = {"low": "cheap", "medium": "fairly priced", "high": "expensive"}
CAREERS = {
    "teaching": "teacher", "medicine": "doctor", "law": "lawyer", "music": "musician", "farming": "farmer",
    "painting": "painter", "politics": "politician", "physics": "physicist", "acting": "actor", "flying": "pilot",
}  # fmt: skip
GENRES = {
    "crime": "crime novel", "love": "love story", "ghosts": "ghost story", "war": "war novel", "verse": "book of poems",
    "humor": "comic novel", "travel": "travel book", "past": "historical novel",
}  # fmt: skip
INGREDIENTS = "apples onions lemons carrots cherries potatoes beans lamb honey walnuts shrimp cheese".split()
COURSES = {"first": "starter", "second": "main course", "third": "dessert"}
SPORTS = "football hockey rugby basketball volleyball handball".split()


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiouAEIO' else 'a'} {phrase}"


def _triples(rng: random.Random, index: int) -> Draft:
    """Two or three facts on one subject, in any order, and the sentence that states them in a fixed order."""
    city, country, first, last, adjective = _pick(rng, CITIES, DEMONYMS, FIRST, LAST, ADJECTIVES)
    person, (word, digits), year = f"{first} {last}", _number(rng), str(rng.randrange(1900, 2000))
    optional = rng.random() < 0.5  # whether the last fact is told
    match index % 6:
        case 0:
            subject, price = f"{adjective} {rng.choice(VENUES)}", rng.choice(list(PRICES))
            facts = {"cuisine": country, "priceRange": price, "town": city}
            told = f"is {_article(PRICES[price])} {DEMONYMS[country]} restaurant", f" that can be found in {city}"
        case 1:
            subject, career = person, rng.choice(list(CAREERS))
            facts = {"birthYear": year, "careerField": career, "birthPlace": city}
            told = f"is {_article(CAREERS[career])} who was born in {year}", f" in the town of {city}"
        case 2:
            subject = f"{adjective} {rng.choice(TOWERS)}"
            facts = {"floorCount": digits, "town": city, "architect": person}
            told = f"is a building with {word} floors located in {city}", f" and was designed by {person}"
        case 3:
            subject, genre = f"The {adjective} {rng.choice(TITLES)}", rng.choice(list(GENRES))
            facts = {"bookTopic": genre, "country": country, "author": person}
            told = f"is {_article(DEMONYMS[country])} {GENRES[genre]}", f" that was written by {person}"
        case 4:
            subject, sport = f"{city} {rng.choice(TEAMS)}", rng.choice(SPORTS)
            facts = {"sport": sport, "titleCount": digits, "coach": person}
            told = f"is {_article(sport)} team which has won {word} titles", f" under the coach {person}"
        case _:
            subject = f"{adjective} {rng.choice(DISHES)}"
            course, ingredient = _pick(rng, COURSES, INGREDIENTS)
            facts = {"course": course, "origin": country, "ingredient": ingredient}
            told = f"is {_article(DEMONYMS[country])} {COURSES[course]}", f" that is made with {ingredient}"
    names = list(facts) if optional else list(facts)[:2]
    triples = [f"{subject}, {name}, {facts[name]}" for name in names]
    rng.shuffle(triples)
    return Draft(tuple(triples), f"{subject} {told[0]}{told[1] if optional else ''}.")


# -------------------------------------------------------------------------------------------------------- dialogue

TOGETHER = (
    "cook pasta, watch a movie, play tennis, go swimming, visit the museum, have lunch, paint the kitchen, bake a cake,"
    " clean the garage, go hiking, play chess, go to the beach, see the concert, plant trees, study math, go fishing,"
    " go shopping, practice the song"
).split(", ")
FAVORS = (
    "buy milk, call the bank, pick up the kids, water the plants, feed the cat, send the report, print the tickets,"
    " book a table, return the books, bring the chairs, order the pizza, wash the car, walk the dog, fix the door,"
    " cut the grass, drive Grandma home, post the letter, do the dishes"
).split(", ")
TIMES = {
    "mon": "on Monday", "tue": "on Tuesday", "wed": "on Wednesday", "thu": "on Thursday", "fri": "on Friday",
    "sat": "on Saturday", "sun": "on Sunday", "2nite": "tonight", "tmrw": "tomorrow", "at 12": "at noon",
}  # fmt: skip
EXCUSES = {
    "I have a cold": "a cold", "my boss needs me": "work", "I have guests": "guests", "it will rain": "rain",
    "there is a strike": "a strike", "I have an exam": "an exam", "I am broke": "money",
}  # fmt: skip
YES = ["Sure!", "Count me in!", "Ok, great.", "Yes, with pleasure.", "Good idea!", "Yep :)", "No problem."]
PROPOSALS = ["wanna {} {}?", "shall we {} {}?", "do you want to {} {}?", "how about we {} {}?"]
BEGGING = ["can you {} {}?", "could you please {} {}?", "hey, would you {} {}?", "I need you to {} {}"]


def _dialogue(rng: random.Random, index: int) -> Draft:
    """A chat of two or three people and the one sentence on what comes of it."""
    a, b, c = rng.sample(FIRST, 3)
    act, favor, excuse, yes, yes2 = _pick(rng, TOGETHER, FAVORS, EXCUSES, YES, YES)
    when, later = rng.sample(list(TIMES), 2)
    propose = f"{a}: {rng.choice(PROPOSALS).format(act, when)}"
    beg = f"{a}: {rng.choice(BEGGING).format(favor, when)}"
    match index % 7:
        case 0:
            lines, summary = [propose, f"{b}: {yes}"], f"{a} and {b} will {act} together {TIMES[when]}."
        case 1:
            lines = [propose, f"{b}: can't, {later} is better", f"{a}: {yes}"]
            summary = f"{a} and {b} will {act} together {TIMES[later]}."
        case 2:
            lines = [propose, f"{b}: sorry, {excuse}"]
            summary = f"{b} will not {act} with {a} because of {EXCUSES[excuse]}."
        case 3:
            lines, summary = [beg, f"{b}: {yes}"], f"{b} will {favor} for {a} {TIMES[when]}."
        case 4:
            lines = [beg, f"{b}: no, {excuse}", f"{a}: ok, I'll do it {later}"]
            summary = f"{a} will {favor} {TIMES[later]} without help from {b}."
        case 5:
            lines = [f"{a}: who can {favor} {when}?", f"{b}: not me, {excuse}", f"{c}: I can"]
            summary = f"{c} will {favor} for {a} {TIMES[when]}."
        case _:
            lines = [propose, f"{b}: {yes}", f"{c}: not me, {excuse}"]
            summary = f"{a} and {b} will {act} without {c} because of {EXCUSES[excuse]}."
    return Draft(tuple(lines), summary)


# -------------------------------------------------------------------------------------------------------- headline

ACTORS = ["the city council of {}", "the mayor of {}", "officials in {}", "the local government of {}"]
DECISIONS = {
    "close": "shut", "reduce spending on": "slash", "investigate": "probe", "support": "back", "prohibit": "bar",
    "postpone work on": "delay", "sharply criticize": "slam", "think about selling": "mull",
}  # fmt: skip
ASSETS = "schools hotels bridges parks hospitals mines farms museums factories markets theaters airports".split()
MOTIVES = {
    "because of rising costs": "over costs", "because there is no money": "over funds", "for fear of fire": "over fire",
    "after weeks of protests": "amid protests", "after a long dispute": "amid row", "before the election": "pre vote",
}  # fmt: skip
VEHICLES = "train truck tram taxi plane ferry van tractor".split()
OBSTACLES = "wall bridge church shop tree bank fence barn".split()
HARM = {"were injured": "hurt", "lost their lives": "dead", "were reported missing": "missing"}
FIRMS = "apex orion summit falcon atlas delta vertex nova titan zenith".split()
SECTORS = "steel food energy software textile airline mining paper".split()
MOVES = {"fell by": "sinks", "rose by": "jumps", "lost": "sheds", "gained": "adds"}
RESULTS = "sales profit exports orders growth output".split()
OFFICES = "mayor judge banker coach teacher general priest pilot".split()
CRIMES = {
    "taking money for favors": "bribery", "stealing from the state": "theft", "setting a house on fire": "arson",
    "selling state secrets": "spying", "lying to the court": "perjury", "not paying taxes": "tax fraud",
}  # fmt: skip
HABITS = "tea coffee walking singing fish nuts yoga garlic music cycling".split()
EFFECTS = {"sleep better": "sleep", "live longer": "long life", "remember more": "memory", "lose weight": "diets"}
TREATIES = {
    "sell each other more goods": "boost trade", "stop the fighting": "end war", "build a railway": "lay rail",
    "catch more criminals": "fight crime", "remove visas": "ease travel", "share river water": "split water",
}  # fmt: skip
STAGES = {"semifinal": "semis", "final": "final", "second round": "round 2"}


def _headline(rng: random.Random, index: int) -> Draft:
    """One lower-case news sentence with spaced punctuation, and its headline."""
    (city, city2), (land, land2) = rng.sample(CITIES, 2), rng.sample(list(DEMONYMS), 2)
    day, first, last, firm, sector = _pick(rng, DAYS, FIRST, LAST, FIRMS, SECTORS)
    word, digits = _number(rng)
    match index % 8:
        case 0:
            actor, decision, asset, motive = _pick(rng, ACTORS, DECISIONS, ASSETS, MOTIVES)
            news = f"{actor.format(city)} will {decision} {word} {asset} {motive} , it was announced on {day}"
            head = f"{city} to {DECISIONS[decision]} {digits} {asset} {MOTIVES[motive]}"
        case 1:
            harm, vehicle, obstacle = _pick(rng, HARM, VEHICLES, OBSTACLES)
            news = f"{word} people {harm} on {day} when a {vehicle} ran into a {obstacle} near {city} , police said"
            head = f"{digits} {HARM[harm]} as {vehicle} hits {obstacle} in {city}"
        case 2:
            move, result = _pick(rng, MOVES, RESULTS)
            mood = rng.choice(["weak", "strong", "record", "poor"])
            news = f"shares of the {sector} company {firm} {move} {word} percent after a report of {mood} {result}"
            head = f"{firm} {MOVES[move]} {digits} pct on {mood} {result}"
        case 3:
            sport, stage = _pick(rng, SPORTS, STAGES)
            news = f"{city} won against {city2} by {word} points on {day} and is now in the {stage} of the {sport} cup"
            head = f"{city} down {city2} by {digits} , reach {sport} {STAGES[stage]}"
        case 4:
            news = f"the {sector} company {firm} said on {day} that {first} {last} will become its new chief executive"
            head = f"{sector} maker {firm} taps {last} as ceo"
        case 5:
            office, crime = _pick(rng, OFFICES, CRIMES)
            news = f"a former {office} from {city} was sent to prison on {day} for {word} years for {crime}"
            head = f"{city} ex-{office} gets {digits} yrs for {CRIMES[crime]}"
        case 6:
            habit, effect = _pick(rng, HABITS, EFFECTS)
            news = f"people who love {habit} {effect} than others , researchers in {city} wrote on {day}"
            head = f"{habit} aids {EFFECTS[effect]} : {city} study"
        case _:
            treaty = rng.choice(list(TREATIES))
            news = f"the leaders of {land} and {land2} met in {city} on {day} and agreed to {treaty}"
            head = f"{land} , {land2} to {TREATIES[treaty]}"
    return Draft((f"{news} .".lower(),), head.lower())


# -------------------------------------------------------------------------------------------------------- requests

GENERIC = ("{x}\n\nWrite a short text about this.", "{x}\n\nWhat is the right reply?", "Input: {x}\nOutput:")
GENERIC_SHARE = 1 / 3
GRAMMARS: dict[str, Callable[[random.Random, int], Draft]] = {
    "paraphrase": _paraphrase,
    "triples": _triples,
    "dialogue": _dialogue,
    "headline": _headline,
}
SEPARATORS = {"paraphrase": "\n", "triples": "; ", "dialogue": "\n", "headline": ""}
REQUESTS: dict[str, tuple[str, ...]] = {
    "paraphrase": (
        "{x}\nDo both questions ask for the same thing?",
        "{x}\n\nWould one answer serve both questions? Say yes or no.",
        "Decide whether these questions match.\n{x}",
        "Two questions:\n{x}\nSame meaning, yes or no?",
        "Can the second question replace the first one?\n{x}",
    ),
    "triples": (
        "Facts: {x}\nTurn the facts into one sentence.",
        "{x}\n\nSay this data in plain English.",
        "Put these data entries into words: {x}",
        "Record: {x}.\nDescribe this record.",
        "Which sentence states all of this data?\n{x}",
    ),
    "dialogue": (
        "Chat:\n{x}\n\nSum up this chat in one sentence.",
        "{x}\n\nWhat do they agree on?",
        "Read these messages and tell the outcome.\n{x}",
        "{x}\nGive the gist of the conversation.",
        "Messages:\n{x}\n\nWho does what?",
    ),
    "headline": (
        "{x}\n\nGive this news a headline.",
        "News: {x}\nHeadline:",
        "Shorten this report to one line: {x}",
        "What title fits this article?\n{x}",
        "{x}\nTell the story in a few words.",
    ),
}
TASKS = tuple(GRAMMARS)
MAX_DRAWS = 300  # draws for one new row before the grammar counts as used up


def rows(task: str, count: int, rng: random.Random, seen: set[frozenset[str]]) -> list[Row]:
    """`count` rows of one task whose inputs are new to `seen`, which grows by them.

    An input counts as seen whatever its request and the order of its parts, so a held-out row is new in content.
    Raises `UserError` where the grammar has no more inputs to give.
    """
    made: list[Row] = []
    for index in range(count):
        for _ in range(MAX_DRAWS):
            draft = GRAMMARS[task](rng, index)
            if frozenset(draft.parts) not in seen:
                break
        else:
            raise UserError(
                f"synthetic data: the grammar of task '{task}' has no new row after {len(seen)}; ask for fewer rows"
            )
        seen.add(frozenset(draft.parts))
        request = rng.choice(GENERIC if rng.random() < GENERIC_SHARE else REQUESTS[task])
        made.append(Row(request.format(x=SEPARATORS[task].join(draft.parts)), draft.output, task))
    return made


def make(seed: int = 0, train_per_task: int = 300, test_per_task: int = 200) -> Dataset:
    """The synthetic data set: all four tasks, in shuffled order, the same rows for the same arguments everywhere.

    No test input occurs in train, under any request. Raises `UserError` for a count below 1 or past what the
    grammars can give: train and test together may have about 5,000 rows a task (paraphrase knows 2,880 pairs with
    the answer yes).
    """
    for name, count in (("train_per_task", train_per_task), ("test_per_task", test_per_task)):
        if count < 1:
            raise UserError(f"synthetic data: {name} is {count}; expected at least 1")
    train: list[Row] = []
    test: list[Row] = []
    for task in TASKS:
        rng, seen = random.Random(f"{seed}/{task}"), set()
        train += rows(task, train_per_task, rng, seen)
        test += rows(task, test_per_task, rng, seen)
    random.Random(f"{seed}/train").shuffle(train)
    random.Random(f"{seed}/test").shuffle(test)
    return Dataset(tuple(train), tuple(test), "synthetic")
