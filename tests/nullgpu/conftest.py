"""Tests that share the reports of one process on the null device share a process of pytest, too.

Else each process of pytest would compile all of it again. Marks do not do: since pytest 9.2 pytest-xdist's
``--dist loadgroup`` no longer sees them.
"""

from typing import Any

import pytest

ALONE = ("test_ledger.py",)
"""Files each of whose tests has a process on the null device of its own."""


def group_of(test: str) -> str:
    """Return what a test's group is called: its file, and what its parameters begin with before a colon.

    Args:
        test: its node id, such as ``tests/nullgpu/test_recipes.py::test_it[wrn: smoke/wrn-200]``.
    """
    file, _, name = test.partition("::")
    if file.endswith(ALONE):
        return test
    group, colon, _ = name.partition("[")[2].partition(": ")
    return f"{file} {group}" if colon else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let pytest-xdist hand out whole groups."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)
