"""Generated text: what unmeasured, partly measured and measured rows say; the committed files are up to date."""

import json
import math
import statistics

import pytest

from fastcifar.errors import UserError
from fastcifar.ladder.metrics import NOT_MEASURED, difference, mean_of, metrics_of, ours_in_words, read_results
from fastcifar.ladder.rows import ladder_rows, plan
from tests.ladder.fakes import FakeRows
from tests.run_directories import change_recipe
from tools import tables

ENTRY = {
    "id": "lenet5", "seed": 42, "last": 59.8, "best": 60.37, "selected": None, "epochs_done": 20, "epochs": 20,
    "hardware": "a processor, 2 cores", "date": "2026-01-02", "training_s": 60.0, "images_per_s": 17000.0, "git": "abc",
    "complete": True,
}  # fmt: skip
SEEDS = [ENTRY, ENTRY | {"seed": 43, "last": 59.2, "best": 60.0}, ENTRY | {"seed": 44, "last": 60.4, "best": 60.7}]


def row_of(table, name):
    return next(line for line in table.splitlines() if line.startswith(f"| [`{name}`]"))


def test_the_committed_files_are_up_to_date():
    assert not [str(path) for path in tables.out_of_date()], "run `make tables`"


def test_without_results_every_row_says_so():
    lines = tables.ladder_table([]).splitlines()
    assert len(lines) == 2 + 36
    assert all(line.count(NOT_MEASURED) == 3 for line in lines[2:])
    assert all(cell.strip() for line in lines[2:] for cell in line.strip("|").split("|"))


def test_a_measured_row_has_mean_standard_error_and_difference():
    row = row_of(tables.ladder_table(SEEDS), "lenet5")
    error = statistics.stdev([60.37, 60.0, 60.7]) / math.sqrt(3)
    assert f"{(60.37 + 60.0 + 60.7) / 3:.2f} ± {error:.2f} (59.80 ± " in row
    binomial = 100 * math.sqrt(0.5948 * 0.4052 / 10_000)
    assert f"+0.88 ± {math.hypot(error, binomial):.2f}" in row
    assert "3 seeds, a processor, 2 cores, 2026-01-02" in row
    assert NOT_MEASURED not in row


def test_a_partly_trained_row_is_not_measured_yet_but_says_how_far_it_is():
    part = [ENTRY | {"id": "aug-standard", "complete": False, "epochs_done": 20, "epochs": 100, "last": 84.2}]
    row = row_of(tables.ladder_table(part), "aug-standard")
    assert f"{NOT_MEASURED} (84.20 last after 20 of 100 epochs)" in row
    assert row.count(NOT_MEASURED) == 2
    assert ours_in_words(metrics_of(part)).startswith(f"{NOT_MEASURED} (84.20 last after 20 of 100 epochs; a processor")


def test_a_complete_run_outweighs_incomplete_ones():
    metrics = metrics_of([ENTRY | {"seed": 43, "complete": False, "epochs_done": 3, "last": 10.0}, ENTRY])
    assert (metrics.n, metrics.last.mean, metrics.complete) == (1, 59.8, True)


def test_one_seed_has_no_standard_error_of_its_own():
    assert str(mean_of([97.5])) == "97.50"
    assert str(mean_of([97.5, None, 97.7])) == "97.60 ± 0.10"
    assert mean_of([None]) is None
    of_two_runs = difference(mean_of([97.5]), 97.5)
    assert of_two_runs.error == pytest.approx(100 * math.sqrt(2 * 0.975 * 0.025 / 10_000))
    assert of_two_runs.points == 0


def test_filling_is_repeatable_and_leaves_the_rest_alone(tmp_path):
    page = "above\n<!-- ladder:begin -->\nold\n<!-- ladder:end -->\nbelow\n<!-- beyond:begin --><!-- beyond:end -->\n"
    blocks = {"ladder": "A", "beyond": "B"}
    filled = tables.fill(page, blocks, tmp_path)
    assert filled == (
        "above\n<!-- ladder:begin -->\nA\n<!-- ladder:end -->\nbelow\n<!-- beyond:begin -->\nB\n<!-- beyond:end -->\n"
    )
    assert tables.fill(filled, blocks, tmp_path) == filled


@pytest.mark.parametrize(
    ("page", "said"), [("<!-- laddr:begin -->", 'mean "ladder"'), ("<!-- ladder:begin -->", "no <!--")]
)
def test_wrong_markers_are_named(tmp_path, page, said):
    with pytest.raises(UserError, match=said):
        tables.fill(page, {"ladder": "A"}, tmp_path / "README.md")


def test_only_the_line_of_ours_changes_in_a_recipe():
    text = "# head\n# ours: not measured yet\n# run: x\n\ntitle = 'a'\n# ours: in the body\n"
    assert tables.with_ours(text, r"59.80 \1") == text.replace("not measured yet", r"59.80 \1")


@pytest.fixture
def run_dirs(tmp_path):
    """Return run directories of lenet5 with two seeds."""
    jobs = plan(["lenet5"], 2, tmp_path)
    for job in jobs:
        FakeRows()(job, None, lambda text: None)
    return [job.folder for job in jobs]


def test_adding_runs_replaces_the_same_seed(tmp_path, run_dirs):
    path = tmp_path / "results" / "ladder.json"
    tables.add(run_dirs[:1], path)
    tables.add(run_dirs, path)
    rows = read_results(path)
    assert [(row["id"], row["seed"]) for row in rows] == [("lenet5", 42), ("lenet5", 43)]
    assert set(rows[0]) == set(ENTRY)
    assert rows[0]["complete"] is True


def test_a_run_of_other_settings_is_refused(tmp_path, run_dirs):
    change_recipe(run_dirs[0], ("lr = 0.0003", "lr = 0.001"))
    with pytest.raises(UserError, match=r"is no result of lenet5.*optimizer\.lr"):
        tables.add(run_dirs, tmp_path / "ladder.json")


def test_another_precision_loader_or_evaluation_is_the_same_row(tmp_path, run_dirs):
    change_recipe(
        run_dirs[0], ('"bf16"', '"fp32"'), ('tta = "none"', 'tta = "flip"'), ("workers = 2", "workers = 7")
    )
    tables.add(run_dirs, tmp_path / "ladder.json")


def test_a_damaged_results_file_is_named(tmp_path):
    (tmp_path / "ladder.json").write_text(json.dumps({"row": []}))
    with pytest.raises(UserError, match=r"ladder\.json: is not a list"):
        read_results(tmp_path / "ladder.json")


def test_a_benchmark_table_shows_the_newest_full_result_of_each_hardware(tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    row = {"name": "ours", "value": 2.0, "unit": "images/s", "spread": [1.0, 3.0], "n": 5, "baseline": "theirs"}
    row |= {"ratio": 1.5, "ratio_spread": [1.25, 2.0]}

    def report(date, value, hardware="A", quick=False):
        environment = {"hardware": hardware, "date": date, "packages": {"torch": "2.11"}}
        return {"benchmark": "step", "quick": quick, "environment": environment, "results": [row | {"value": value}]}

    old, new = report("2026-01-01", 111.0), report("2026-01-02", 222.0)
    (folder / "a.json").write_text(json.dumps({"benchmarks": [new, report("2026-01-03", 333.0, quick=True)]}))
    (folder / "b.json").write_text(json.dumps({"benchmarks": [old, report("2026-01-01", 444.0, "B")]}))
    text = tables.benchmark_tables(tmp_path)["bench:step"]
    assert "222" in text
    assert "444" in text
    assert "111" not in text
    assert "333" not in text
    assert "| 1.50 (1.25 to 2) theirs |" in text
    assert tables.benchmark_tables(tmp_path)["bench:loaders"] == f"{NOT_MEASURED}: `fastcifar bench loaders`"


def test_the_speed_table_takes_its_rows_from_the_newest_results(tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    file, name, baseline, words = tables.HEADLINES[0]
    row = {"name": name, "value": 654321.0, "unit": "images/s", "spread": [1.0, 3.0], "n": 5, "baseline": baseline}
    row |= {"ratio": 1234.5, "ratio_spread": [0.25, 2000.0]}
    others = [row | {"baseline": "another"}, row | {"name": "another"}]
    environment = {"hardware": "A", "date": "2026-01-01"}
    report = {"benchmark": file, "quick": False, "environment": environment, "results": [*others, row]}
    (folder / "a.json").write_text(json.dumps({"benchmarks": [report]}))
    lines = tables.speed_table(tmp_path).splitlines()[2:]
    assert len(lines) == len(tables.HEADLINES)
    wanted = f"{tables.THEIR_LOADER}, 4 workers | 654,321 images/s | 1234.50 (0.25 to 2,000) | A |"
    assert lines[0] == f"| {words} | {wanted}"
    assert all(line.count(NOT_MEASURED) == 3 for line in lines[1:])


def test_the_ladder_table_has_the_ladders_rows():
    names = [line.split("`")[1] for line in tables.ladder_table([]).splitlines()[2:]]
    assert names == ladder_rows()


def test_the_labels_are_those_that_the_benchmarks_write():
    code = (tables.ROOT / "benchmarks" / "common.py").read_text()
    assert f'THEIR_LOOP = "{tables.THEIR_LOOP}"\n' in code
    assert f'THEIR_LOADER = "{tables.THEIR_LOADER}"\n' in code
