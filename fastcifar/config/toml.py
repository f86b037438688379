"""TOML from anywhere: read within limits, so that no file hangs, fills memory or ends in a traceback; and written.

TOML itself sets no limits; these are far above what a recipe needs.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastcifar.errors import UserError, shown
from fastcifar.regular_file import open_regular

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
INT_RANGE = range(-(2**63), 2**63)  # what TOML promises; Python's own integers go on for ever


def read_toml(path: Path) -> dict[str, Any]:
    """Return a file's table.

    Raises:
        UserError: not a regular file, unreadable, too large, not UTF-8, not TOML, nested too deeply.
    """
    content = _read(path)
    try:
        return parse_toml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except ValueError as error:
        raise UserError(f"{path}: is not valid TOML: {_in_words(error)}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read(path: Path) -> bytes:
    """Read a regular file of at most `MAX_BYTES`; a pipe or a device would never end, or wait for ever."""
    with open_regular(path) as file:
        try:
            content = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content or b"") > MAX_BYTES:
        raise UserError(f"{path}: is larger than {MAX_BYTES:,} bytes; a recipe is a few hundred")
    return content or b""


def parse_toml(text: str) -> dict[str, Any]:
    """Return the table of a TOML text.

    Raises:
        ValueError: not TOML (`tomllib.TOMLDecodeError` is one), or a number of more digits than Python reads.
        UserError: nested too deeply, or an integer of more than 64 bits.
    """
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise UserError(f"is nested more than {MAX_DEPTH} levels deep") from None
    for depth, value in _walk(table):
        if depth > MAX_DEPTH:
            raise UserError(f"is nested more than {MAX_DEPTH} levels deep")
        if type(value) is int and value not in INT_RANGE:
            raise UserError(f"{hex(value)[:20]}... is an integer of more than 64 bits")
    return table


def _walk(table: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """Yield every value with its depth, without recursion, not below `MAX_DEPTH` + 1."""
    waiting: list[tuple[int, Any]] = [(0, table)]
    while waiting:
        depth, value = waiting.pop()
        yield depth, value
        if depth <= MAX_DEPTH and isinstance(value, dict | list):
            waiting += [(depth + 1, v) for v in (value.values() if isinstance(value, dict) else value)]


def _in_words(error: ValueError) -> str:
    """Return the parser's message without Python's own advice on long numbers."""
    if isinstance(error, tomllib.TOMLDecodeError):
        message = str(error)
        return message if message.isprintable() and len(message) < 200 else shown(message, 200)
    return "a number of too many digits"


def write_toml(table: dict[str, Any]) -> str:
    """Return a table as TOML text."""
    import tomli_w

    return tomli_w.dumps(table)
