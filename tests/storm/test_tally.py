import sys
import time
import types

import pytest

from fastcifar.errors import UserError
from tests.storm import __main__ as entry
from tests.storm.tally import Tally, table


def fail():
    return 1 / 0


def refuse():
    raise UserError("no")


def hang():
    try:
        time.sleep(30)
    except Exception:
        pytest.fail("a hang was swallowed")


def test_every_end_is_counted_as_what_it_is():
    tally = Tally("things")
    for what, action in (("good", lambda: None), ("bad", refuse), ("broken", fail)):
        tally.check(what, action)
    tally.check("endless", hang, limit_s=1)
    assert (tally.tried, tally.survived, tally.refused, tally.failed) == (4, 1, 1, 2)
    assert tally.failures[0].startswith("broken: ZeroDivisionError")
    assert tally.failures[1].startswith("endless: Hang")


def test_table():
    text = table([Tally("recipes", refused=9_000, survived=1_000), Tally("stores", failed=3)])
    assert [line.split() for line in text.splitlines()] == [
        "| subject | tried | refused | survived | failed |".split(),
        "| ------- | -----: | ------: | -------: | -----: |".split(),
        "| recipes | 10,000 | 9,000 | 1,000 | 0 |".split(),
        "| stores | 3 | 0 | 0 | 3 |".split(),
    ]


@pytest.mark.parametrize(("action", "status"), [(refuse, 0), (fail, 1)])
def test_the_command_runs_subjects_and_its_status_tells_of_failures(monkeypatch, capsys, action, status):
    def storm(tally, seed, count):
        for k in range(count):
            tally.check(f"seed {seed}, {k}", action)

    module = types.SimpleNamespace(COUNT=5, storm=storm)
    monkeypatch.setitem(sys.modules, "tests.storm.made_up", module)
    monkeypatch.setattr(entry, "SUBJECTS", ("made_up",))
    assert entry.main(["--seed", "7", "--count", "3"]) == status
    shown = capsys.readouterr()
    assert "| made up | 3 " in shown.out
    assert "seed 7" in shown.err
