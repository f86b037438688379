"""Tests that share the reports of one process on the null device share a process of pytest, too.

Else each process of pytest would compile all of it again. Marks do not do: since pytest 9.2 pytest-xdist's
``--dist loadgroup`` no longer sees them.
"""

from typing import Any

import pytest

ALONE = ("test_ledger.py",)
"""Files each of whose tests has a process on the null device of its own."""
LONGEST = "test_a_step_has_no_more_launches_than_committed[pyramid400]"
"""Begun first among those: begun last, it keeps one process busy for two minutes while the other has nothing to do."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.name != LONGEST)


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
