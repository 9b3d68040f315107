"""Tables of `table1.py`, from summaries of runs by name (`scenario-method-seed`).

Methods may have other seeds than each other. Which count: where A ran with seeds 0 to 4, B with 0 to 9 and C with 0,

- a column shows A and B over 0 to 4, which those with several have in common, and C over 0 (`comparable`);
- the gain of B is over the best baseline that has all of 0 to 9, that of A over the best that has 0 to 4 (`gain`);
- a table of losses leaves out seeds that fedrouter+ has no loss of (`beside`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from experiments import summaries
from experiments.methods import BOUNDS, FIRST, LABELS, METHODS, OURS, SCENARIOS, ordered, own
from fedrouter_jax.leads import interval, told

COLUMNS = tuple(
    (scenario, part) for part in ("personalised", "generalisation") for scenario in ("single", "dual", "all")
)  # of tables, and panels of figures
UNTRAINED = "base model"  # shown first; no baseline, so nobody gains over it
Cells = dict[tuple[str, str, str], dict[int, float]]  # a score of each seed by (scenario, part, method)


def cells(found: dict[str, dict], without: tuple[str, ...] = (), metric: str = "rouge1") -> Cells:
    """What the tables show; the base model is a method. `without` some tasks: the mean over the others.

    All runs of a seed have scored the base model, on other devices by a few thousandths otherwise: those of the method
    that comes first are shown.
    """
    table: Cells = {}
    # Those of other versions have no row, so no row may be compared with them.
    methods = {name: method_of(name) for name in found}
    known = ordered(methods.values())
    runs = [(name, method) for name, method in methods.items() if method in known]
    for name, method in sorted(runs, key=lambda pair: -known.index(pair[1])):  # the first has the word
        scenario, summary = name.partition("-")[0], found[name]
        seed = summary["config"]["seed"]
        trained = {"personalised": "personalised", "generalisation": "generalisation"}
        base = {"personalised": "base", "generalisation": "base_generalisation"}
        for who, parts in ((method, trained), (UNTRAINED, base)):
            for part, score in parts.items():
                if metric not in summary["scores"][score]:
                    continue  # runs of older versions have no loss
                value = summaries.score(summary, score, metric)
                if without:
                    tasks = summary["scores"][score][metric]["per_task"]
                    values = [value for task, value in tasks.items() if task not in without]
                    if not values:
                        continue
                    value = float(np.mean(values))
                table.setdefault((scenario, part, who), {})[seed] = value
    return table


def shown(found: dict[str, dict]) -> dict[str, dict]:
    """The summaries that a table shows: not those of methods that are no more."""
    known = ordered(map(method_of, found))
    return {name: summary for name, summary in found.items() if method_of(name) in known}


def method_of(name: str) -> str:
    """The method in a run's name."""
    return name.partition("-")[2].rpartition("-")[0]


def markdown(found: dict[str, dict], rates: Sequence[str] = ()) -> str:
    """The report: scores of all methods, then by task, then costs; `rates` says which were tried, in lines."""
    lines = ["# Methods by scenario", "", *setting(found), "", *scores(cells(found), tuple(METHODS))]
    pictures = ["", "![scores](table1.png)", *(["", "![leads](leads.png)"] if paired(cells(found)) else []), ""]
    lines += [*pictures, *in_words(found), *leads_by_task(found), *losses(found), *rates]
    lines += [*same_seed(found), "", *by_task(found), ""]
    return "\n".join([*lines, *costs(found), ""])


def in_words(found: dict[str, dict]) -> list[str]:
    """The same table over the tasks that are answered in words, where there are others."""
    tasks = {task for summary in found.values() for task in summary["scores"]["base"]["rouge1"].get("per_task", {})}
    if not tasks & {*LABELS}:
        return []
    labels, others = sorted(tasks & {*LABELS}), sorted(tasks - {*LABELS})
    coin = ", as many of each: hardly better than a coin"
    coin = coin if all(summary["config"]["data"].get("balanced") for summary in found.values()) else ""
    about = f"The mean over these. Without {', '.join(labels)}, yes or no{coin}."
    title = f"## Tasks answered in words: {', '.join(others)}"
    return [title, "", about, "", *scores(cells(found, LABELS), FIRST), ""]


def losses(found: dict[str, dict]) -> list[str]:
    """The same table of the loss of the reference answers, of the runs that have it."""
    table = beside(cells(found, metric="loss"))
    if not table:
        return []
    about = (
        "Cross-entropy of the reference answers in nats a token, mean over a client's rows, then over clients: the "
        "lower the better. Runs of earlier versions do not have it, and who has it for other seeds than fedrouter+ is "
        "left out."
    )
    return ["## Loss of the reference answers", "", about, "", *scores(table, tuple(METHODS), "loss", min), ""]


def scores(table: Cells, shown: tuple[str, ...], title: str = "ROUGE-1", best_of: Callable = max) -> list[str]:
    """The table: mean ± half of the 95 % interval over shared seeds, the best of several rivals bold; gains of ours.

    Of the project's methods those in `shown`; and somebody's own, which have a gain over the baselines, too.
    """
    columns = [column for column in COLUMNS if any(key[:2] == column for key in table)]
    known = {method for _, _, method in table}
    methods = [UNTRAINED, *(method for method in ordered(known) if method in shown or own(method))]
    rivals = [method for method in methods if method not in BOUNDS and method != UNTRAINED]
    lines = [f"| {title} | " + " | ".join(f"{part}, {scenario}" for scenario, part in columns) + " |"]
    lines += ["|---" * (len(columns) + 1) + "|"]
    for method in methods:
        row = []
        for column in columns:
            values = comparable(table, column)
            there = [m for m in rivals if m in values]
            most = max((len(values[m]) for m in there), default=0)
            compared = [m for m in there if len(values[m]) == most]
            alike = len(compared) > 1 and len({tuple(values[m]) for m in compared}) == 1  # seeds
            means = {m: np.mean([*values[m].values()]) for m in compared} if alike else {}
            best = {m for m in means if f"{means[m]:.3f}" == f"{best_of(means.values()):.3f}"}  # equal as it is shown
            row.append(text([*values[method].values()], method in best) if method in values else "")
        lines.append(f"| {named(method)} | {' | '.join(row)} |")
    for ours in (*OURS, *filter(own, methods)):
        if ours in methods and any(len(table.get((*column, ours), {})) > 1 for column in columns):
            gains = " | ".join(gain(table, column, ours, best_of) for column in columns)
            what = "gain over the best baseline" if best_of is max else "more than the best baseline: less is better"
            lines.append(f"| **{ours}, {what}** | {gains} |")
    return lines


def beside(table: Cells, first: str = OURS[0]) -> Cells:
    """The scores of the seeds that `first` has, column by column; all of a column that it has none in."""
    kept: Cells = {}
    for (*column, method), found in table.items():
        seeds = table.get((*column, first), found)
        if same := {seed: value for seed, value in found.items() if seed in seeds}:
            kept[*column, method] = same
    return kept


def comparable(table: Cells, column: tuple[str, str]) -> dict[str, dict[int, float]]:
    """Scores by seed of each method of a column: of the seeds that all with several seeds have; of one, what it has.

    Where those with several seeds have none in common, what they have, and nothing is the best of them.
    """
    scores = {m: found for (*c, m), found in table.items() if tuple(c) == column}
    several = [set(found) for m, found in scores.items() if len(found) > 1 and m != UNTRAINED]
    shared = set.intersection(*several) if several else set()
    return {m: {seed: found[seed] for seed in sorted({*found} & shared or found)} for m, found in scores.items()}


def named(method: str) -> str:
    """A method, and for a reference what it has that others have not."""
    return f"{method} ({BOUNDS[method]})" if method in BOUNDS else method


def same_seed(found: dict[str, dict], scenario: str = "dual", seed: int = 0) -> list[str]:
    """Methods of one seed and scenario, what ran once among them, by their mean of both scores."""
    parts = ("personalised", "generalisation")
    table = cells(found)
    scores = {
        m: [table[scenario, part, m][seed] for part in parts]
        for m in ordered(method for _, _, method in table)
        if seed in table.get((scenario, parts[0], m), {})
    }
    lines = [f"## Seed {seed} of {scenario}: every method on the same rows", ""]
    lines += [f"| method | {' | '.join(parts)} | mean |", "|---" * 4 + "|"]
    for method in sorted(scores, key=lambda m: -np.mean(scores[m])):
        numbers = " | ".join(f"{value:.3f}" for value in [*scores[method], np.mean(scores[method])])
        lines.append(f"| {named(method)} | {numbers} |")
    return lines


def by_task(found: dict[str, dict]) -> list[str]:
    """A row a (scenario, method): personalised / generalisation ROUGE-1 of each task, mean over seeds."""
    groups = grouped(found)
    tasks = _tasks(found)
    lines = ["## Task by task", "", "ROUGE-1 of clients' own tasks / of the mix, mean over seeds.", ""]
    lines += [f"| scenario | method | seeds | {' | '.join(tasks)} |", "|---" * (len(tasks) + 3) + "|"]
    for (scenario, method), same in groups.items():
        cells = []
        for task in tasks:
            both = [
                [per_task[task] for s in same if task in (per_task := s["scores"][part]["rouge1"]["per_task"])]
                for part in ("personalised", "generalisation")
            ]
            cells.append(" / ".join(mean_of(values, len(same)) for values in both))
        lines.append(f"| {scenario} | {method} | {len(same)} | {' | '.join(cells)} |")
    return lines


def mean_of(scores: list[float], count: int) -> str:
    """The mean, and of how many seeds it is where that is not `count`."""
    return f"{np.mean(scores):.3f}" + f" ({len(scores)})" * (len(scores) < count) if scores else "-"


def costs(found: dict[str, dict]) -> list[str]:
    """A row a method: what it took in one scenario, mean over its runs there."""
    groups = grouped(found)
    scenario = next(s for s in SCENARIOS if any(key[0] == s for key in groups))
    lines = [
        f"## Cost ({scenario})",
        "",
        "In all rounds; bytes of adapters and of clusters' centres. Seconds are a sweep's, not a benchmark's.",
        "",
    ]
    lines += [
        "| method | optimiser steps a client | training tokens | MB up | MB down | training, s |",
        "|---" * 6 + "|",
    ]
    for (where, method), same in groups.items():
        if where == scenario:
            shown = ("optimiser_steps_per_client", "tokens", "bytes_up", "bytes_down", "seconds_training")
            mean = {key: np.mean([s["cost"][key] for s in same]) for key in shown}
            steps = mean["optimiser_steps_per_client"] * same[0]["config"]["rounds"]["rounds"]
            lines.append(
                f"| {method} | {steps:.0f} | {mean['tokens']:.0f} | "
                f"{mean['bytes_up'] / 1e6:.1f} | {mean['bytes_down'] / 1e6:.1f} | {mean['seconds_training']:.0f} |"
            )
    return lines


def grouped(found: dict[str, dict]) -> dict[tuple[str, str], list[dict]]:
    """Summaries over seeds by (scenario, method), in the order of both."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for scenario in SCENARIOS:
        for method in ordered(map(method_of, found)):
            same = [found[name] for name in sorted(found) if name.rpartition("-")[0] == f"{scenario}-{method}"]
            if same:
                groups[scenario, method] = same
    return groups


def gain(table: Cells, column: tuple[str, str], who: str, best_of: Callable) -> str:
    """A method over the best baseline that has all its seeds: relative, and in points with its 95 % interval."""
    best = best_baseline(table, column, who, best_of)
    theirs = best and np.mean([table[*column, best][seed] for seed in table[*column, who]])
    if not theirs:
        return ""
    leads = lead(table, column, who, best)
    mean, half = interval(leads)
    relative = round(100 * mean / theirs, 1) + 0.0  # no "-0.0"
    spread = f" ± {half:.3f}; {len(leads)} seeds" if len(leads) > 1 else ""
    return f"{relative:+.1f} % over {best} ({mean:+.3f}{spread})"


def best_baseline(table: Cells, column: tuple[str, str], who: str, best_of: Callable) -> str | None:
    """The best baseline of a column that has all seeds of a method there; None: there is none."""
    seeds = table.get((*column, who), {})
    means = {
        m: np.mean([scores[seed] for seed in seeds])
        for (*c, m), scores in table.items()
        if tuple(c) == column and baseline(m) and {*scores} >= {*seeds} > set()
    }
    return best_of(means, key=means.get) if means else None


def baseline(method: str) -> bool:
    """Whether a method is one of those that ours are measured by."""
    return method not in (*OURS, *BOUNDS, UNTRAINED) and not own(method)


def lead(table: Cells, column: tuple[str, str], who: str, other: str) -> list[float]:
    """How far a method is ahead of another, by the seeds of both."""
    ours, theirs = (table.get((*column, method), {}) for method in (who, other))
    return [ours[seed] - theirs[seed] for seed in sorted({*ours} & {*theirs})]


def paired(table: Cells, who: str = OURS[0]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """The leads of a method over every baseline that shares several seeds with it, of each column that has such."""
    found = {
        column: {m: lead(table, column, who, m) for *c, m in table if tuple(c) == column and baseline(m)}
        for column in COLUMNS
    }
    several = {column: {m: leads for m, leads in all_.items() if len(leads) > 1} for column, all_ in found.items()}
    return {column: leads for column, leads in several.items() if leads}


def leads_by_task(found: dict[str, dict], who: str = OURS[0]) -> list[str]:
    """Where the gain of a method comes from: a row a column of the scores, its lead over the same baseline by task."""
    table, tasks = cells(found), _tasks(found)
    of_task = {task: cells(found, tuple(other for other in tasks if other != task)) for task in tasks}
    lines = [f"| lead of {who} | over | seeds | {' | '.join(tasks)} |", "|---" * (len(tasks) + 3) + "|"]
    for scenario, part in COLUMNS:
        best = best_baseline(table, (scenario, part), who, max)
        if best is None or len(table[scenario, part, who]) < 2:
            continue
        leads = [lead(of_task[task], (scenario, part), who, best) for task in tasks]
        count = len(table[scenario, part, who])  # of which some may not have a task
        row = [told(v) + f" ({len(v)})" * (len(v) < count) if len(v) > 1 else "" for v in leads]
        lines.append(f"| {part}, {scenario} | {best} | {count} | {' | '.join(row)} |")
    about = (
        "ROUGE-1, mean ± half of the 95 % interval of the differences, over the best baseline of all tasks together."
    )
    return ["## Leads by task", "", about, "", *lines, ""] if len(lines) > 2 else []


def _tasks(found: dict[str, dict]) -> list[str]:
    """The tasks of the mix."""
    return sorted({task for s in found.values() for task in s["scores"]["generalisation"]["rouge1"]["per_task"]})


def text(values: list[float], best: bool) -> str:
    """A cell."""
    mean, half = interval(values)
    shown = f"{mean:.3f}" + (f" ± {half:.3f}" if len(values) > 1 else "")
    return f"**{shown}**" if best else shown


def setting(found: dict[str, dict]) -> list[str]:
    """What was run, from the configs themselves."""
    said: dict[tuple[str, str], tuple[dict[float, float], set[str]]] = {}
    for summary in found.values():
        c = summary["config"]
        data, local = c["data"], c["local"]
        kind = "**synthetic** rows" if data["data"] == "synthetic" else f"rows of {data['data']}"
        precision = "" if c["dtype"] == "float32" else f" in {c['dtype']} precision"
        before = (
            f"{c['model']}{precision}, {kind}; {data['clients']} clients, at most {data['train_rows']} training rows "
            f"each; {c['rounds']['rounds']} rounds of {local['steps']} optimiser steps of {local['batch']} rows a "
            f"client in every method"
        )
        after = f"at most {data['test_rows']} test rows a client, {data['mix_rows']} of the mix"
        falls, devices = said.setdefault((before, after), ({}, set()))
        falls[local["learning_rate"]] = local["min_learning_rate"]
        devices.add(summary["device"])
    seeds = sorted({summary["config"]["seed"] for summary in found.values()})
    spread = f"Seeds {seeds}: mean ± half of the 95 % interval." if len(seeds) > 1 else f"Seed {seeds[0]}, once."
    if len({len(same) for same in grouped(found).values()}) > 1:
        spread += (
            " Means are over the seeds that all methods of a column with several have; without ±: one seed. Gains are "
            "over all seeds that a method has, which the table task by task counts."
        )
    lines = []
    for before, after in sorted(said):
        falls, devices = said[before, after]
        peaks = " or ".join(f"{peak:g} to {falls[peak]:g}" for peak in sorted(falls))
        lines.append(f"{before}; learning rate {peaks}; {after}; device {' or '.join(sorted(devices))}.")
    return [*lines, "", f"{spread} Generalisation: the mix of all tasks."]
