"""The documents that tests hold against what is committed, and how they tell it."""

from pathlib import Path

from experiments import summaries

ROOT = Path(__file__).resolve().parents[1]
RESULTS, BENCH = ROOT / "docs" / "results", ROOT / "docs" / "bench"
README, SAID, SAID_OF_SPEED = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md", "docs/speed.md")
)


def told(values) -> str:
    """A mean and half of its interval."""
    return " ± ".join(f"{value:.3f}".replace("0.", ".") for value in summaries.interval(values))
