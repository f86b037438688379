"""The commands that explain, compare, combine and hand on trained runs, through the command line's own entrance."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import fastcifar
from fastcifar.cli.main import main
from fastcifar.config import load_recipe
from fastcifar.models import build_model
from fastcifar.run_directory import RunDirectory
from tests.run_directories import accuracy, add_weights, change_recipe, make_members, stopped


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """Run ``fastcifar WORDS`` in a folder with the runs m0, m1 and m2; return (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["fastcifar", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capfd.readouterr()

    return call


@pytest.fixture
def runs(tmp_path):
    runs = make_members(tmp_path, test=200, holdout=400, train=150)
    for number, run in enumerate(runs.values()):
        for which in ("last", "best", "selected"):
            add_weights(run, which, build_model(run.recipe.model, seed=number).state_dict())
    return runs


def test_report_writes_its_page_into_the_run(call, runs):
    code, out, err = call("report", "m0")
    assert (code, err) == (0, "")
    assert out == "m0/report.html\n"
    assert "<html" in (runs["m0"].folder / "report.html").read_text()


def test_report_as_json_names_the_page_and_the_runs(call, runs):
    code, out, _ = call("report", "m0", "m1", "--out", "page.html", "--json")
    found = json.loads(out)
    assert (code, found["report"], len(found["runs"])) == (0, "page.html", 2)


def test_compare_shows_metrics_and_the_test(call, runs):
    code, out, err = call("compare", "m0", "m2")
    assert (code, err) == (0, "")
    assert f"{runs['m2'].summary['last']['accuracy']:.2f}" in out
    assert "p = " in out
    _, out, _ = call("compare", "m0", "m2", "--json")
    assert json.loads(out)["mcnemar"][0]["p_value"] < 1e-3


def test_compare_names_what_it_leaves_out_and_how_to_finish_it(call, runs, tmp_path):
    for name in ("m1", "m2"):
        change_recipe(tmp_path / name, (f'name = "{name}"', 'name = "m0"'), ("seed = 42", f"seed = {name[1]}"))
    stopped(runs["m2"])
    code, out, err = call("compare", "m0", "m1", "m2")
    mean = np.mean([runs[name].summary["last"]["accuracy"] for name in ("m0", "m1")])
    assert (code, f" {mean:.2f} ± " in out) == (0, True)
    note = "left out of the means: m2 (stopped at epoch 1 of 3); finish it with `fastcifar run --resume m2`"
    assert err == f"{note}\n"
    assert "m2, stopped at epoch 1 of 3, p = " in out
    code, out, err = call("compare", "m0", "m1", "m2", "--json")
    assert (json.loads(out)["left_out"], err) == (["m2"], f"{note}\n")
    assert call("report", "m0", "m1", "m2")[2] == f"{note}\n"
    assert f"{note}." in (tmp_path / "m0/report.html").read_text()


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_run_given_twice_is_refused(call, runs, command):
    code, _, err = call(command, "m0", "m1", "./m0")
    assert (code, err) == (2, "fastcifar: RUN...: m0 is given twice\n")


def test_a_published_accuracy_beside_another_recipe_says_so(call, runs, tmp_path):
    for name in ("m0", "m1"):
        new = (f'name = "{name}"', 'name = "lenet5"\npublished = { best = 59.48 }')
        change_recipe(tmp_path / name, new, ("epochs = 3", f"epochs = {3 + int(name[1])}"))
    code, out, _ = call("compare", "m0", "m1", "--json")
    first, second = json.loads(out)["recipes"]
    assert (code, first["published"], second["published"]) == (0, 59.48, 59.48)
    assert "train.epochs" in first["recipe_differs"]
    told = f"published 59.48% (this recipe differs: {', '.join(first['recipe_differs'])})"
    assert f"lenet5 (m0): {told}\n" in call("compare", "m0", "m1")[1]
    groups = json.loads(call("report", "m0", "m1", "--json")[1])["comparison"]["groups"]
    assert [group["recipe_differs"] for group in groups] == [first["recipe_differs"], second["recipe_differs"]]
    assert told in (tmp_path / "m0/report.html").read_text()


def test_an_unfinished_member_is_marked(call, runs):
    stopped(runs["m1"], 2)
    code, out, err = call("ensemble", "m0", "m1")
    assert (code, "m1, stopped at epoch 2 of 3 " in out) == (0, True)
    assert err == "unfinished member: m1 (stopped at epoch 2 of 3); finish it with `fastcifar run --resume m1`\n"
    code, out, _ = call("ensemble", "m0", "m1", "--json", "--out", "vote")
    entries = json.loads(out)["members"]
    assert [entry["status"] for entry in entries] == ["finished", "stopped"]
    assert (entries[1]["epochs_done"], entries[1]["epochs"]) == (2, 3)
    assert call("report", "vote")[0] == 0
    assert "<th>m1, stopped at epoch 2 of 3</th>" in (runs["m0"].folder.parent / "vote/report.html").read_text()


def test_a_combination_says_which_runs_it_took(call, runs, tmp_path):
    change_recipe(tmp_path / "m1", ('name = "m1"', 'name = "lenet5"'))
    (tmp_path / "vote.toml").write_text("[combine]\nhow = 'soft'\nmembers = ['m0', 'lenet5']\n")
    code, out, err = call("run", "vote.toml", "--out", "vote", "--json")
    assert code == 0, err
    accuracies = [runs[name].summary["last"]["accuracy"] for name in ("m0", "m1")]
    lines = [f"member m0: m0, {accuracies[0]:.2f}%", f"member lenet5: m1, {accuracies[1]:.2f}%"]
    assert err.splitlines()[:2] == lines
    keys = json.loads(out)["members"][1]["recipe_differs"]
    assert "train.epochs" in keys
    assert err.splitlines()[2] == f"note: member lenet5 (m1) differs from the shipped recipe: {', '.join(keys)}"
    assert json.loads(out)["recipe_differs"] == [f"lenet5: {key}" for key in keys]


def test_ensemble_tells_the_accuracy_of_the_mean_softmax(call, runs):
    code, out, _ = call("ensemble", "m0", "m1", "m2", "--json", "--out", "vote")
    labels = runs["m0"].logits("test/labels")
    odds = [np.exp(run.logits("test/last/raw").astype(np.float64)) for run in runs.values()]
    mean = sum(p / p.sum(1, keepdims=True) for p in odds)
    assert code == 0
    assert json.loads(out)["last"]["accuracy"] == pytest.approx(accuracy(mean, labels))
    assert call("ensemble", "m0", "m1", "--out", "vote")[0] == 2


@pytest.mark.parametrize("options", [["--fit-weights"], ["--vote", "hard"], ["--weights", "0.2,0.3,0.5"]])
def test_ensemble_votes_as_it_is_told(call, runs, options):
    code, out, err = call("ensemble", "m0", "m1", "m2", *options)
    assert (code, err) == (0, "")
    assert runs["m0"].recipe.name in out


def test_a_combination_under_test_time_augmentation_says_so_beside_its_members_accuracies_under_it(call, runs):
    for number, run in enumerate(runs.values()):
        arrays = {key: run.logits(key) for key in run.logits_keys()}
        run.write_logits({**arrays, "test/last/raw/tta": arrays["test/last/raw"]})
        run.write_summary(run.summary | {"tta": {"kind": "flip", "accuracy": 71.0 + number, "loss": 1.0}})
    _, out, _ = call("ensemble", "m0", "m1", "--tta", "--out", "vote")
    assert ("last, TTA" in out, "71.00" in out, "72.00" in out) == (True, True, True)
    assert f"{runs['m0'].summary['last']['accuracy']:.2f}" not in out
    recorded = RunDirectory.open(Path("vote")).summary
    assert recorded["combined"]["last"]["tta"]
    assert recorded["last"]["protocol"] == "members at their last epoch, under test-time augmentation"
    assert [member["tta"] for member in recorded["members"]] == [71.0, 72.0]


@pytest.mark.parametrize("protocol", ["honest", "published"])
def test_stack_names_its_protocol(call, runs, protocol):
    code, out, _ = call("stack", "m0", "m1", "--meta", "logistic", "--protocol", protocol, "--json")
    assert code == 0
    assert json.loads(out)["last"]["protocol"].startswith(protocol)


def test_a_combination_without_its_members_is_refused_before_its_folder_is_made(call, runs, tmp_path):
    before = set(tmp_path.iterdir())
    for words in ([], ["--out", "vote"], ["--out", "vote", "--resume", "auto"]):
        code, _, err = call("run", "ensemble-soft", *words)
        assert (code, err.count("\n")) == (2, 1)
        assert "train it first (`fastcifar run " in err
    with pytest.raises(fastcifar.UserError, match="train it first"):
        fastcifar.train("ensemble-soft")
    assert set(tmp_path.iterdir()) == before


def test_a_finished_combination_is_shown_though_its_members_are_gone(call, runs, tmp_path):
    (tmp_path / "vote.toml").write_text("[combine]\nhow = 'soft'\nmembers = ['m0', 'm1']\n")
    assert call("run", "vote.toml", "--out", "vote")[0] == 0
    runs["m1"].clear()
    for words in ("--resume vote", "vote.toml --resume vote", "vote.toml --out vote --resume auto"):
        assert call("run", *words.split())[0] == 0


@pytest.mark.parametrize("name", ["ensemble-fitted", "stacking-honest"])
def test_honest_combinations_run_as_recipes(call, runs, name):
    members = load_recipe(f"beyond/{name}").combine.members
    for member, run in zip(members, runs.values(), strict=True):
        change_recipe(run.folder, (f'name = "{run.folder.name}"', f'name = "{member}"'))
    code, out, err = call("run", f"beyond/{name}", "--out", "combined", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert [member["name"] for member in summary["members"]] == members
    best = max(run.summary["selected"]["accuracy"] for run in runs.values())
    assert summary["selected"]["accuracy"] > best - 2
    logits = RunDirectory.open("combined").logits("test/selected/raw")
    assert summary["selected"]["accuracy"] == accuracy(logits, labels(runs))


def labels(runs):
    return runs["m0"].logits("test/labels")


def test_predict_lists_classes_of_an_image(call, runs):
    Image.new("RGB", (50, 40), "red").save("red.png")
    code, out, err = call("predict", "m0", "red.png", "--top", "2")
    assert (code, err) == (0, "")
    assert out.startswith("red.png: ")
    assert out.count("%") == 2
    _, out, _ = call("predict", "m0", "red.png", "--json", "--weights", "best")
    assert sum(c["probability"] for c in json.loads(out)["predictions"][0]["classes"]) <= 1


def test_export_writes_the_state_dict(call, runs):
    code, out, _ = call("export", "m0", "model.safetensors", "--weights", "last", "--json")
    assert (code, json.loads(out)["file"]) == (0, "model.safetensors")
    mine, written = load_file("m0/weights/last.safetensors"), load_file("model.safetensors")
    assert all(np.array_equal(mine[name], written[name]) for name in mine)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "nowhere"], "nowhere"),
        (["report", "m0", "--out", "no/folder/page.html"], "there is no folder no/folder"),
        (["compare", "m0"], "at least two"),
        (["ensemble", "m0", "m0"], "twice"),
        (["ensemble", "m0", "m1", "--weights", "1"], "weight"),
        (["ensemble", "m0", "m1", "--weights", "a,b"], "0.5,0.25,0.25"),
        (["ensemble", "m0", "m1", "--vote", "hard", "--fit-weights"], "--fit-weights"),
        (["stack", "m0"], "at least two"),
        (["stack", "m0", "nowhere"], "nowhere"),
        (["predict", "m0", "nothing.png"], "nothing.png"),
        (["predict", "m0", "m0/recipe.toml"], "recipe.toml"),
        (["predict", "m0", "m0/recipe.toml", "--weights", "bset"], "best"),
        (["export", "m0", "model.onxx"], ".onnx"),
        (["export", "m0", "no/folder/model.onnx"], "no/folder"),
    ],
    ids=" ".join,
)
def test_bad_input_gives_one_line_and_status_2(call, runs, words, message):
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("fastcifar: ")
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1
