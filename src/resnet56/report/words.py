"""Format numbers and names. Fractions are in [0, 1], and times are in seconds."""

from collections.abc import Sequence
from typing import Any

from resnet56.progress import duration, percent

__all__ = [
    "big",
    "count",
    "duration",
    "listed",
    "loss",
    "p_value",
    "percent",
    "plain",
    "plural",
    "points",
    "quoted",
    "score",
]


def count(number: int) -> str:
    """Format an integer: 10000 -> '10,000'."""
    return f"{number:,}"


def big(number: float) -> str:
    """Format a large number: 853018 -> '853 thousand', 125485696 -> '125.5 million'."""
    if number >= 1e6:
        return f"{number / 1e6:.1f} million"
    return f"{number / 1e3:.0f} thousand" if number >= 1e4 else f"{number:,.0f}"


def loss(nats: float) -> str:
    """Format a loss: 0.26581 -> '0.2658'."""
    return f"{nats:.4f}"


def score(value: float | None) -> str:
    """Format a score: 0.87234 -> '0.8723', None -> a dash."""
    return "\N{EN DASH}" if value is None else f"{value:.4f}"


def points(share: float, *, sign: bool = False) -> str:
    """Format a difference of fractions: 0.0657 -> '6.57 points', or '+6.57 points' with `sign`."""
    value = round(100 * share, 2) + 0.0  # -0.0 + 0.0 is 0.0
    number = f"{value:+.2f}" if sign and value else f"{value:.2f}"
    return number.replace("-", "\N{MINUS SIGN}") + " points"


def p_value(probability: float) -> str:
    """Format a p-value: 0.0312 -> '0.031', 0.00002 -> '< 0.001'."""
    return "< 0.001" if probability < 0.001 else f"{probability:.2g}"


def plural(number: int, one: str, many: str | None = None) -> str:
    """Format a number with a noun: (1, 'epoch') -> '1 epoch', (2, 'epoch') -> '2 epochs'."""
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def listed(items: Sequence[str]) -> str:
    """Join items in a sentence: ['a', 'b'] -> 'a and b', ['a', 'b', 'c'] -> 'a, b, and c'."""
    if len(items) < 3:
        return " and ".join(items)
    return f"{', '.join(items[:-1])}, and {items[-1]}"


def quoted(name: str) -> str:
    """Quote a class name for use in a sentence."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{name}\N{RIGHT DOUBLE QUOTATION MARK}"


def plain(value: Any) -> str:
    """Format a value of a recipe: True -> 'yes', 0.1 -> '0.1', [2, 3] -> '2, 3'."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return str(value)
