"""The pages: what they share (style, theme switch, charts), read from the files beside this one."""

from functools import cache
from importlib import resources

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The content security policy of each page: the browser itself refuses every request that would leave the file."""


@cache
def asset(name: str) -> str:
    """Return the text of a file of this folder, such as ``style.css``."""
    return resources.files("fastcifar.analysis.page").joinpath(name).read_text("utf-8")
