"""Generated text: what unmeasured, partly measured and measured rows say; the committed files are up to date."""

import json
import math
import re
import statistics

import pytest
from scipy.stats import t

from fastcifar.analysis.statistics import difference, mean_of
from fastcifar.errors import UserError
from fastcifar.ladder.metrics import NOT_MEASURED, metrics_of, ours_in_short, ours_in_words, recorded
from fastcifar.ladder.rows import ladder_rows
from tools import tables

STAGES = ["Baseline", "Deep baseline", "Augmentation", "Residual", "Wide residual", "Pyramid", "Combined"]
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


def test_without_results_there_is_one_line_per_stage_and_no_table():
    text = tables.ladder_table([])
    assert text.startswith(NOT_MEASURED.capitalize())
    stages = [line.split(":")[0] for line in text.splitlines()[2:]]
    assert stages == [f"- {s}" for s in STAGES]
    assert "[`wrn-200`](recipes/wrn-200.toml) 97.07 (96.99)" in text
    assert "|" not in text


def test_a_measured_row_has_mean_standard_error_and_difference():
    row = row_of(tables.ladder_table(SEEDS), "lenet5")
    error = statistics.stdev([60.37, 60.0, 60.7]) / math.sqrt(3)
    assert f"{(60.37 + 60.0 + 60.7) / 3:.2f} ± {error:.2f} (59.80 ± " in row
    binomial = 100 * math.sqrt(0.5948 * 0.4052 / 10_000)
    assert f"+0.88 ± {math.hypot(error, binomial):.2f}" in row
    # The published run is one more of ours under the null hypothesis: a deviation wider than the error of the mean.
    statistic = ((60.37 + 60.0 + 60.7) / 3 - 59.48) / (error * math.sqrt(3 + 1))
    assert f"| {2 * t.sf(statistic, 2):.3f} | 3 seeds, a processor, 2 cores, 2026-01-02" in row
    assert "[`lenet5`](recipes/lenet5.toml) 59.48" not in tables.ladder_table(SEEDS)


def test_the_precision_of_runs_that_say_theirs_is_named():
    row = row_of(tables.ladder_table([entry | {"precision": "fp32"} for entry in SEEDS]), "lenet5")
    assert "| 3 seeds in fp32, a processor" in row
    assert "(n = 1 in fp32; a processor" in ours_in_words([metrics_of([ENTRY | {"precision": "fp32"}])])
    mixed = [SEEDS[0] | {"precision": "fp32"}, *SEEDS[1:]]
    assert f"| {len(SEEDS)} seeds in fp32 (1 of {len(SEEDS)}), a" in row_of(tables.ladder_table(mixed), "lenet5")


def test_each_hardware_has_its_own_line_and_the_one_of_most_seeds_comes_first():
    other = ENTRY | {"hardware": "a GPU", "best": 60.5, "last": 60.5}
    first, second = [line for line in tables.ladder_table([other, *SEEDS]).splitlines() if "`lenet5`" in line]
    assert "| 3 seeds, a processor, 2 cores, 2026-01-02 |" in first
    assert "| 60.50 (60.50) |" in second
    assert "| 1 seed, a GPU, 2026-01-02 |" in second
    found = recorded("lenet5", [other, *SEEDS])
    assert re.search(r"\(n = 3; a processor, .*\); 60.50 last, .*\(n = 1; a GPU, ", ours_in_words(found))
    assert ours_in_short(found).endswith(" (3)")
    assert "rows 1 have been trained" in (text := tables.measured_so_far([other, *SEEDS]))
    assert "on a processor, 2 cores; a GPU." in text


def test_what_nobody_measured_says_so():
    assert (ours_in_words([]), ours_in_short([])) == (NOT_MEASURED, "")


def test_one_seed_has_no_p_value():
    assert "| n = 1: no test |" in row_of(tables.ladder_table([ENTRY]), "lenet5")


def test_a_partly_trained_row_is_not_measured_yet_but_says_how_far_it_is():
    part = [ENTRY | {"id": "aug-standard", "complete": False, "epochs_done": 20, "epochs": 100, "last": 84.2}]
    assert "aug-standard.toml) 90.01 (ours 84.20 last after 20 of 100 epochs)" in tables.ladder_table(part)
    words = ours_in_words([metrics_of(part)])
    assert words.startswith(f"{NOT_MEASURED} (84.20 last after 20 of 100 epochs; a processor")


def test_test_time_augmentation_is_told_beside_the_plain_accuracy():
    seeds = [seed | {"tta": tta} for seed, tta in zip(SEEDS, (61.0, 61.2, 61.4), strict=True)]
    assert "; 61.20 ± 0.12 with TTA |" in row_of(tables.ladder_table(seeds), "lenet5")
    assert ", 61.20 ± 0.12 last with TTA (n = 3" in ours_in_words([metrics_of(seeds)])
    assert "TTA" not in ours_in_words([metrics_of(SEEDS)])


def test_a_complete_run_outweighs_incomplete_ones():
    metrics = metrics_of([ENTRY | {"seed": 43, "complete": False, "epochs_done": 3, "last": 10.0}, ENTRY])
    assert (metrics.n, metrics.last.mean, metrics.complete) == (1, 59.8, True)


def test_of_a_recipe_that_was_given_fewer_epochs_the_newer_runs_count():
    newer = ENTRY | {"seed": 45, "date": "2026-06-01", "epochs_done": 8, "epochs": 8, "last": 58.0}
    metrics = metrics_of([*SEEDS, newer])
    assert (metrics.n, metrics.last.mean, metrics.epochs) == (1, 58.0, 8)
    assert metrics_of([*SEEDS, newer | {"complete": False}]).n == len(SEEDS)


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


def test_a_complete_benchmark_is_shown_before_a_newer_unfinished_one(tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    file, name, baseline, _ = tables.HEADLINES[0]
    row = {"name": name, "unit": "images/s", "spread": [1.0, 3.0], "n": 5, "baseline": baseline}
    row |= {"ratio": 1.5, "ratio_spread": [1.25, 2.0]}

    def report(date, value, **more):
        environment = {"hardware": "A", "date": date}
        return {"benchmark": file, "environment": environment, "results": [row | {"value": value}], **more}

    unfinished = report("2026-01-02", 222.0, complete=False)
    (folder / "b.json").write_text(json.dumps({"benchmarks": [unfinished]}))
    assert "222" in tables.benchmark_tables(tmp_path)[f"bench:{file}"]
    (folder / "a.json").write_text(json.dumps({"benchmarks": [report("2026-01-01", 111.0)]}))
    for text in (tables.benchmark_tables(tmp_path)[f"bench:{file}"], tables.speed_table(tmp_path)):
        assert "111" in text
        assert "222" not in text


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
    assert sorted(re.findall(r"`(.+?)`", tables.ladder_table(SEEDS))) == sorted(ladder_rows())


def test_the_labels_are_those_that_the_benchmarks_write():
    code = (tables.ROOT / "benchmarks" / "common.py").read_text()
    assert f'THEIR_LOOP = "{tables.THEIR_LOOP}"\n' in code
    assert f'THEIR_LOADER = "{tables.THEIR_LOADER}"\n' in code


def test_what_has_been_measured_is_counted():
    assert "none has been trained" in tables.measured_so_far([])
    text = tables.measured_so_far(SEEDS)
    assert "Of these 36 rows 1 have been trained to the end here so far, on a processor, 2 cores." in text
    part = [ENTRY | {"complete": False, "epochs_done": 3}]
    assert "none has been trained" in tables.measured_so_far(part)
