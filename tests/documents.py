"""The documents that tests hold against what is committed, and how they tell it."""

from pathlib import Path

from fedrouter_jax.leads import interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS, BENCH = ROOT / "docs" / "results", ROOT / "docs" / "bench"
README, SAID, SAID_OF_SPEED = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md", "docs/speed.md")
)


def told(values) -> str:
    """A mean and half of its interval."""
    return " ± ".join(f"{value:.3f}".replace("0.", ".") for value in interval(values))


def first_table(path: Path) -> list[dict[str, str]]:
    """The rows of a file's first table: cells without bold by the names of their columns, the first by none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next(i for i, line in enumerate(lines[start:], start) if not line.startswith("|"))
    names, _, *rows = ([cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines[start:end])
    return [dict(zip(["", *names[1:]], row, strict=True)) for row in rows]
