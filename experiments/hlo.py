"""What the text of a compiled program says: what devices send each other, what a TPU's compiler expects
of it, and what JAX calls its parts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_COLLECTIVE = re.compile(r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_CALLED = re.compile(r"(?:to_apply|calls|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def instructions(text: str) -> Iterator[tuple[str, tuple[int | None, ...]]]:
    """Every instruction that runs, a line each, with the turns of the loops around it (None: known when it runs).

    A loop's own instruction counts as one inside it.
    """
    computations: dict[str, list[str]] = {}
    entry = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$", line)
        if head:
            here = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith("  ") and computations:
            here.append(line)

    def turns(line: str) -> int | None:
        known = re.search(r"known_trip_count\D*(\d+)", line)
        if known:
            return int(known[1])
        condition = "\n".join(computations[re.search(r"condition=%?([\w.\-]+)", line)[1]])
        bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", condition)
        return int(bounds[0]) if len(bounds) == 1 and "direction=LT" in condition else None

    def run(name: str, loops: tuple[int | None, ...]) -> Iterator[tuple[str, tuple[int | None, ...]]]:
        for line in computations[name]:
            if " while(" in line:
                inside = (*loops, turns(line))
                yield line, inside
                yield from run(re.search(r"body=%?([\w.\-]+)", line)[1], inside)
                continue
            yield line, loops
            if " reduce(" not in line and " scatter(" not in line and " sort(" not in line:
                branches = [name.strip(" %") for names in _BRANCHES.findall(line) for name in names.split(",")]
                for called in _CALLED.findall(line) + branches:
                    yield from run(called, loops)

    yield from run(entry, ())


def traffic(text: str) -> dict[str, int]:
    """Bytes that the collectives of a program give each device, by operation; those "in loops" count once a turn."""
    found: dict[str, int] = {}
    for line, loops in instructions(text):
        for shapes, operation, start in _COLLECTIVE.findall(line):
            sizes = [
                _WIDTHS[kind] * math.prod(int(n) for n in axes.split(",") if n)
                for kind, axes in re.findall(rf"({'|'.join(_WIDTHS)})\[([\d,]*)\]", shapes)
            ]
            if start and operation == "all-gather":  # it names its operands, and then what comes of them
                sizes = sizes[len(sizes) // 2 :]
            elif start and operation == "collective-permute":  # and of this one, what it keeps meanwhile, too
                sizes = sizes[1:2]
            name = f"{operation} in loops" if loops else operation
            found[name] = found.get(name, 0) + sum(sizes)
    return found


def names(text: str) -> dict[str, str]:
    """What JAX calls each instruction, scopes of our code in it, by the compiler's name.

    On a CPU products of stacks of matrices lose theirs; they are called what the first of their operands is.
    """
    found: dict[str, str] = {}
    nameless: dict[str, str] = {}
    for name, rest in re.findall(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", text, re.MULTILINE):
        called = re.search(r'op_name="([^"]*)"', rest)
        if called:
            found[name] = called[1]
        elif " dot(" in rest or "__ynn_fusion" in rest:
            nameless[name] = re.search(r"\(%?([\w.\-]+)", rest)[1]
    return found | {name: found[operand] for name, operand in nameless.items() if operand in found}


def cycles(text: str) -> int:
    """Cycles of a core that a TPU's compiler expects, loops whose turns are known when they run taken once."""
    total = 0
    for line, loops in instructions(text):
        expected = re.search(r'"estimated_cycles":"(\d+)"', line)
        if expected and int(expected[1]) < 2**62:  # the largest integer stands for what it has no idea of
            total += int(expected[1]) * math.prod(turns or 1 for turns in loops)
    return total
