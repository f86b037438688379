"""What ``--set`` of a sweep may say: a fixed value, or a space of values to search.

Four spaces: ``log(a, b)`` and ``uniform(a, b)`` of real numbers, ``int(a, b)`` of whole ones, bounds included, and a
list of alternatives, ``[0.5, 1, 2]``. Everything else is a value as ``fastcifar run --set`` takes it. A value that is
a list itself is written as the only alternative: ``augment=[["crop(4)", "flip"]]``.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastcifar.config.toml import parse_toml
from fastcifar.errors import UserError, nearest, plain

if TYPE_CHECKING:
    from optuna import Trial

KINDS = ("log", "uniform", "int")
GRAMMAR = 'a space is "log(a, b)", "uniform(a, b)", "int(a, b)" or a list such as "[0.5, 1, 2]"'
MOST_CHOICES = 1000


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included.

    Attributes:
        key: the recipe's key, such as ``optimizer.lr``.
        kind: ``log``: equally likely in each power of ten; ``uniform``; or ``int``.
        low, high: the bounds; whole numbers for ``int``, above 0 for ``log``.
    """

    key: str
    kind: str
    low: float
    high: float

    def suggest(self, trial: "Trial") -> str:
        """Return a value of the trial as the text of ``--set``."""
        if self.kind == "int":
            return f"{self.key}={trial.suggest_int(self.key, int(self.low), int(self.high))}"
        return f"{self.key}={trial.suggest_float(self.key, self.low, self.high, log=self.kind == 'log')!r}"

    def ends(self) -> list[str]:
        """Return the settings at the bounds, which a recipe must accept before the search begins."""
        return [f"{self.key}={value!r}" for value in (self.low, self.high)]

    def all_values(self) -> list[Any] | None:
        """Return every value that Optuna may choose, or None where there are too many to list."""
        if self.kind != "int" or self.high - self.low >= MOST_CHOICES:
            return None
        return list(range(int(self.low), int(self.high) + 1))


@dataclass(frozen=True)
class Choices:
    """Alternatives without an order.

    Attributes:
        key: the recipe's key.
        texts: each alternative as TOML; Optuna stores texts, whatever they stand for.
    """

    key: str
    texts: tuple[str, ...]

    def suggest(self, trial: "Trial") -> str:
        """Return a value of the trial as the text of ``--set``."""
        return f"{self.key}={trial.suggest_categorical(self.key, self.texts)}"

    def ends(self) -> list[str]:
        """Return all settings, which a recipe must accept before the search begins."""
        return [f"{self.key}={text}" for text in self.texts]

    def all_values(self) -> list[Any] | None:
        """Return every value that Optuna may choose."""
        return list(self.texts)


Space = Range | Choices


def split_settings(settings: Sequence[str]) -> tuple[list[str], list[Space]]:
    """Return the fixed settings as they are, and the spaces.

    Raises:
        UserError: a space is not written as one is, or a key has two.
    """
    fixed: list[str] = []
    spaces: dict[str, Space] = {}
    for text in settings:
        space = parse_space(text)
        if space is None:
            fixed.append(text)
        elif space.key in spaces:
            raise UserError(f"--set {plain(text)}: {space.key} has a space already; give it one")
        else:
            spaces[space.key] = space
    return fixed, list(spaces.values())


def parse_space(text: str) -> Space | None:
    """Return the space that a ``key=value`` describes; None where it is a plain value.

    Raises:
        UserError: it is meant to be a space and is not one.
    """
    key, _, value = (part.strip() for part in text.partition("="))
    if value.startswith("["):
        return _choices(text, key, value)
    call = re.fullmatch(r"([A-Za-z_]+)\s*\((.*)\)", value)
    return _range(text, key, call[1], call[2]) if call else None


def _choices(text: str, key: str, value: str) -> Choices:
    try:
        alternatives = parse_toml(f"value = {value}")["value"]
    except (ValueError, UserError):
        raise UserError(f"--set {plain(text)}: {plain(value)} is not a valid TOML list") from None
    texts = tuple(in_toml(alternative) for alternative in alternatives)
    if not texts or len(texts) > MOST_CHOICES:
        raise UserError(f"--set {plain(text)}: a list of alternatives has 1 to {MOST_CHOICES:,}; this has {len(texts)}")
    twice = next((t for t in texts if texts.count(t) > 1), None)
    if twice is not None:
        raise UserError(f"--set {plain(text)}: names {plain(twice)} twice")
    return Choices(key, texts)


def _range(text: str, key: str, kind: str, inside: str) -> Range:
    if kind not in KINDS:
        raise UserError(f"--set {plain(text)}: there is no {plain(kind)}(){nearest(kind, KINDS)}; {GRAMMAR}")
    words = [word.strip() for word in inside.split(",")]
    if len(words) != 2:
        raise UserError(f"--set {plain(text)}: {kind} takes two numbers, its bounds, such as {kind}(1, 10)")
    low, high = (_number(text, kind, word) for word in words)
    if low >= high:
        raise UserError(f"--set {plain(text)}: the lower bound comes first: {plain(words[0])} is not below {words[1]}")
    if kind == "log" and low <= 0:
        raise UserError(f"--set {plain(text)}: log needs bounds above 0; uniform takes any")
    return Range(key, kind, low, high)


def _number(text: str, kind: str, word: str) -> float:
    try:
        number = int(word) if kind == "int" else float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or abs(number) > 2**53:
        what = "a whole number" if kind == "int" else "a number"
        raise UserError(f"--set {plain(text)}: {plain(word)} is not {what}")
    return number


def in_toml(value: Any) -> str:
    """Return a plain value as TOML on one line, as ``--set`` reads it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {in_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(in_toml, value)) + "]"
    # Texts, numbers and truth values are the same in JSON; dates, which no recipe has, stay as TOML writes them.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | int | float | bool) else str(value)
