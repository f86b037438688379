import json

from tests.storm import results
from tests.storm.tally import Tally

PAGE = f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n"


def test_a_subject_replaces_its_own_row_alone(tmp_path):
    page = tmp_path / "robustness.md"
    page.write_text(PAGE)
    results.record(Tally("kills", survived=3, reached={"killed": 3}), seed=1, seconds=61, docs=tmp_path)
    results.record(Tally("recipes", refused=9_000, failed=1), seed=2, seconds=600, docs=tmp_path)
    results.record(Tally("kills", survived=4, reached={"killed": 4}), seed=3, seconds=240, docs=tmp_path)
    lines = page.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert "old" not in lines
    rows = [[cell.strip() for cell in line.split("|")[1:8]] for line in lines if line.startswith("|")]
    assert rows[2:] == [
        ["kills", "4", "0", "4", "0", "3", "4"],
        ["recipes", "9,001", "9,000", "0", "1", "2", "10"],
    ]
    assert "- kills: killed 4" in lines
    assert json.loads((tmp_path / "storm.json").read_text())["kills"]["seed"] == 3
