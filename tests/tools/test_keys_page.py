"""docs/keys.md: what the generated page says is what a recipe may write."""

import re

import pytest

from fastcifar.config.operations import OPS, parse_op
from fastcifar.errors import UserError
from tools.keys_page import keys_page

PAGE = keys_page()


def test_truth_values_are_those_of_toml():
    assert '| `engine.working_copy` | "auto" or true or false | `"auto"` |' in PAGE
    assert not re.search(r"^\|.*\b(True|False)\b", PAGE, re.MULTILINE)


def test_every_key_has_its_meaning_as_editors_show_it():
    """The words of recipes/schema.json, in a row each."""
    keys, _, _ = PAGE.partition("## Operations of `augment`")
    meanings = re.findall(r"^\| `[\w.]+` \| .+ \| .+ \| (.+) \|$", keys, re.MULTILINE)
    assert len(meanings) == len(re.findall(r"^\| `", keys, re.MULTILINE)) > 100
    assert [text for text in meanings if not re.fullmatch(r"[`A-Z0-9].*[.)]", text)] == []
    assert "Attributes:" not in keys


def test_every_argument_of_an_operation_has_the_values_that_are_taken():
    """What the page calls the default is it, texts are taken, and numbers beyond the bounds are not."""
    _, _, section = PAGE.partition("## Operations of `augment`")
    for name, kind in OPS.items():
        _, _, rest = section.partition(f"### `{name}(")
        rows = re.findall(r"^\| `(\w+)` \| (.+) \| `(.+)` \| (.+) \|$", rest.partition("### ")[0], re.MULTILINE)
        assert [row[0] for row in rows] == [key for key in kind.model_fields if key != "name"]
        for key, values, default, what in rows:
            assert parse_op(f"{name}({key}={default})") == kind(), (name, key)
            assert what.endswith("."), "an argument without a description"
            for word, bound in re.findall(r"(at least|above|at most) ([\d.]+)", values):
                beyond = {"at least": -1, "above": 0, "at most": 1}[word] + float(bound)
                number = int(beyond) if "whole" in values else beyond
                with pytest.raises(UserError, match=f"{key}: .*(greater|less) than"):
                    parse_op(f"{name}({key}={number})")
            for text in re.findall(r"'\w+'", values):
                assert f"{key}={text}" in str(parse_op(f"{name}({key}={text})")) or text == default
