"""Mutated recipes: each is refused in one clear message, or taken and then written and read back the same."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from fastcifar.config import load_recipe, shipped_recipes, to_toml
from fastcifar.errors import UserError
from tests.storm.tally import Tally

COUNT = 10_000
LONGEST_MESSAGE = 6000

HOSTILE = st.one_of(
    st.integers(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20), st.booleans(),
    st.sampled_from([0, -1, 2**63, 10**9, 1e300, 5e-324, "", "../../x", "[/y]", "\x00", "a\nb", "crop({[]:1})",
                     "/dev/zero", "x" * 3000, [], {}, [[]], {"name": "x"}, [{}], ["autoaugment"] * 2, False]),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=5)), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just("a"), inner)),
)  # fmt: skip


@cache
def good_recipes() -> list[dict[str, Any]]:
    """Return the shipped recipes, resolved, as tables."""
    return [load_recipe(path).model_dump(exclude_none=True) for path in shipped_recipes()]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Draw the bytes of a recipe file: a shipped recipe with values replaced, keys added, or bytes changed."""
    import copy

    table = copy.deepcopy(draw(st.sampled_from(good_recipes())))
    for _ in range(draw(st.integers(0, 3))):
        _mutate(draw, table)
    try:
        content = tomli_w.dumps(table).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError):  # what TOML cannot say, such as a list with a table beside a number in old writers
        content = repr(table).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        where = draw(st.integers(0, len(content)))
        content = content[:where] + draw(st.binary(max_size=3)) + content[where + draw(st.integers(0, 3)) :]
    return content


def _mutate(draw: st.DrawFn, table: dict[str, Any]) -> None:
    """Replace, add or remove one value somewhere in a table."""
    while True:
        key = draw(st.sampled_from(sorted(table) or ["x"]))
        inside = table.get(key)
        if not isinstance(inside, dict) or not inside or draw(st.integers(0, 3)) == 0:
            break
        table = inside
    action = draw(st.sampled_from(["replace", "replace", "replace", "add", "remove"]))
    if action == "remove":
        table.pop(key, None)
    else:
        table[key if action == "replace" else draw(st.text(max_size=8))] = draw(HOSTILE)


def check(content: bytes) -> None:
    """Load a file; what is taken must be written and read back the same.

    Raises:
        UserError: it was refused, as it may be.
        AssertionError: an unreadable message, or a recipe that does not survive being written.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_bytes(content)
        try:
            recipe = load_recipe(path)
        except UserError as error:
            _check_message(str(error))
            raise
        path.write_text(to_toml(recipe), encoding="utf-8")
        assert load_recipe(path) == recipe


def _check_message(said: str) -> None:
    """A message names the file, can be printed, and can be read in one go."""
    assert "recipe.toml" in said, said
    assert len(said) < LONGEST_MESSAGE, said


def storm(tally: Tally, seed: int, count: int) -> None:
    """Check ``count`` mutated recipes."""

    @seeded(seed)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(mutated())
    def run(content: bytes) -> None:
        tally.check(repr(content)[:300], lambda: check(content))

    run()
