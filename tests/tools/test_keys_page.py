"""docs/keys.md: what the generated page says is what a recipe may write."""

import re

from tools.keys_page import keys_page

PAGE = keys_page()


def test_truth_values_are_those_of_toml():
    assert '| `engine.working_copy` | "auto" or true or false | `"auto"` |' in PAGE
    assert not re.search(r"^\|.*\b(True|False)\b", PAGE, re.MULTILINE)
