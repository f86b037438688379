"""Combination recipes end to end, from run directories to a run directory."""

import json
import shutil

import numpy as np
import pytest
from scipy.special import softmax

from fastcifar.analysis.combine import combine_run, results_of, run_combine
from fastcifar.analysis.compare import pairs_against_first
from fastcifar.analysis.members import collect, open_members
from fastcifar.config.schema import CombineRecipe
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory
from tests.run_directories import accuracy, make_members, make_run, recipe


def combination(how, members, **options):
    table = {"how": how, "members": list(members), **options}
    return CombineRecipe.model_validate({"name": f"ensemble-{how}", "combine": table})


def test_soft_voting_is_recorded_like_a_run(tmp_path):
    members = make_members(tmp_path)
    summary = run_combine(combination("soft", members), members, tmp_path / "out")
    run = RunDirectory.open(tmp_path / "out")
    labels = run.logits("test/labels")
    mean = np.mean([softmax(m.logits("test/best/raw").astype(np.float64), axis=1) for m in members.values()], axis=0)
    np.testing.assert_allclose(softmax(run.logits("test/best/raw"), axis=1), mean, atol=1e-5)
    assert summary == run.summary == json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["best"]["accuracy"] == pytest.approx(accuracy(mean, labels))
    assert "on the test set" in summary["best"]["protocol"]
    assert summary["selected"] is None
    assert summary["status"] == "finished"
    assert run.recipe == combination("soft", members)


def test_the_default_folder_lies_beside_the_members(tmp_path):
    members = make_members(tmp_path)
    run_combine(combination("hard", members), members)
    assert RunDirectory.open(tmp_path / "ensemble-hard").summary["how"] == "hard"


def test_a_recipe_run_finds_the_newest_finished_members(tmp_path):
    members = make_members(tmp_path)
    run = RunDirectory.create(tmp_path / "combined", combination("soft", members), {})
    summary = combine_run(run)
    assert [m["run"] for m in summary["members"]] == [str(m.folder) for m in members.values()]
    with pytest.raises(UserError, match="no run of absent"):
        combine_run(RunDirectory.create(tmp_path / "other", combination("soft", ["m0", "absent"]), {}))


def test_damaged_and_edited_runs_beside_the_members_are_passed_over(tmp_path):
    members = make_members(tmp_path)
    for name in ("edited", "damaged"):
        shutil.copytree(members["m0"].folder, tmp_path / name)
    edited = tmp_path / "edited" / "recipe.toml"
    edited.write_text(edited.read_text().replace("epochs = 3", "epochs = 4"))
    (tmp_path / "damaged" / "summary.json").write_bytes(b"{")
    (tmp_path / "unreadable").symlink_to("x" * 300)
    for name in ("edited", "damaged"):  # each would be refused by itself
        with pytest.raises(UserError):
            _ = (found := RunDirectory.open(tmp_path / name)).finished and found.recipe
    summary = combine_run(RunDirectory.create(tmp_path / "combined", combination("soft", members), {}))
    assert [m["run"] for m in summary["members"]] == [str(m.folder) for m in members.values()]


def test_given_weights_follow_the_recipes_order(tmp_path):
    members = make_members(tmp_path)
    names = ["m2", "m0"]
    run_combine(combination("weighted", names, weights=[0.9, 0.1]), members, tmp_path / "out")
    p = [softmax(members[n].logits("test/last/raw").astype(np.float64), axis=1) for n in names]
    got = softmax(RunDirectory.open(tmp_path / "out").logits("test/last/raw"), axis=1)
    np.testing.assert_allclose(got, 0.9 * p[0] + 0.1 * p[1], atol=1e-5)


def test_fitted_weights_come_from_the_holdout(tmp_path):
    members = make_members(tmp_path, (0.0, 1.0, 2.0), holdout=500)
    summary = run_combine(combination("weighted", members), members, tmp_path / "out")
    fitted = summary["combined"]["selected"]
    assert fitted["weights"][2] == max(fitted["weights"])
    assert fitted["cv_loss"] <= fitted["equal_weights_cv_loss"]


@pytest.mark.parametrize("meta", ["mlp", "logistic"])
def test_honest_stacking_scores_once(tmp_path, meta):
    members = make_members(tmp_path, holdout=300, classes=4)
    summary = run_combine(combination("stacking", members, meta=meta), members, tmp_path / "out")
    assert summary["best"] is None
    assert summary["last"]["accuracy"] == summary["selected"]["accuracy"]
    assert summary["selected"]["protocol"].startswith("honest")


@pytest.mark.parametrize("protocol", ["honest", "published"])
def test_stacking_takes_the_last_epoch_with_test_time_augmentation(tmp_path, protocol):
    """Runs keep no other epoch's logits of it."""
    members = make_members(tmp_path, holdout=300, train=300, classes=4)
    for member in members.values():
        arrays = {key: member.logits(key) for key in member.logits_keys()}
        member.write_logits({**arrays, "test/last/raw/tta": arrays["test/last/raw"]})
    done = results_of(combination("stacking", members, protocol=protocol, meta="logistic"), members, tta=True)
    last = done.summary()["last"]
    assert last["accuracy"] > 50
    assert last["protocol"].endswith(", under test-time augmentation")


def test_runs_on_other_images_with_equal_labels_are_told_apart(tmp_path):
    """An image folder's labels are sorted by class: those of two sets may be the same."""
    members = make_members(tmp_path, test=30)
    runs = list(members.values())
    for number, run in enumerate(runs):
        run.write_summary(run.summary | {"content": "ab"[number % 2] * 64, "classes": list("abcdefghij")})
    members = {name: RunDirectory.open(run.folder) for name, run in members.items()}
    with pytest.raises(UserError, match=r"differs from .* in its images"):
        run_combine(combination("soft", members), members, tmp_path / "out")
    first, second, third = members.values()
    with pytest.raises(UserError, match="was not evaluated on the test images"):
        pairs_against_first([first, second])
    assert len(pairs_against_first([first, third])) == 1
    alike = {"m0": first, "m2": third}
    assert run_combine(combination("soft", alike), alike, tmp_path / "same")["classes"] == list("abcdefghij")


def test_published_stacking_is_labelled_as_what_it_is(tmp_path):
    members = make_members(tmp_path, train=300)
    summary = run_combine(combination("stacking", members, protocol="published"), members, tmp_path / "out")
    assert "chosen on the test set" in summary["best"]["protocol"]
    by_epoch = summary["combined"]["best"]["test_accuracy_by_epoch"]
    assert summary["best"]["accuracy"] == max(by_epoch) == by_epoch[summary["best"]["epoch"] - 1]
    assert summary["last"]["accuracy"] == by_epoch[-1]
    assert summary["last"]["epoch"] == summary["combined"]["last"]["meta_epoch"] == len(by_epoch)
    assert "chosen" not in summary["last"]["protocol"]
    assert summary["selected"] is None


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"how": "stacking"}, "data.holdout = 5000"),
        ({"how": "weighted"}, "data.holdout = 5000"),
        ({"how": "stacking", "protocol": "published"}, "eval.train_logits = true"),
    ],
)
def test_what_a_member_lacks_is_said_with_the_cure(tmp_path, options, fix):
    members = make_members(tmp_path)
    options = {"members": list(members), **options}
    with pytest.raises(UserError, match="m0") as error:
        run_combine(CombineRecipe.model_validate({"name": "c", "combine": options}), members, tmp_path / "out")
    assert fix in str(error.value)


def change(run, **arrays):
    """Rewrite some of a run's logits (slashes for double underscores)."""
    old = {key: run.logits(key) for key in run.logits_keys()}
    run.write_logits({**old, **{k.replace("__", "/"): v for k, v in arrays.items()}})
    return RunDirectory.open(run.folder)


def test_members_with_other_holdout_rows_are_refused_by_name(tmp_path):
    members = make_members(tmp_path, holdout=300)
    members["m1"] = change(members["m1"], holdout__indices=np.arange(1, 301))
    with pytest.raises(UserError, match="m1: differs from m0 in its holdout rows"):
        collect(members, "holdout", "selected")


def test_members_with_other_labels_are_refused_by_name(tmp_path):
    members = make_members(tmp_path)
    members["m2"] = change(members["m2"], test__labels=np.zeros(400, np.int64))
    with pytest.raises(UserError, match="m2: differs from m0 in its test labels"):
        collect(members, "test", "last")


def test_members_with_other_classes_or_images_are_refused(tmp_path):
    members = make_members(tmp_path / "a") | {"b": make_members(tmp_path / "b", classes=5)["m0"]}
    with pytest.raises(UserError, match="b: differs from m0 in its number of classes"):
        collect(members, "test", "last")
    members = make_members(tmp_path / "c") | {"d": make_members(tmp_path / "d", test=399)["m0"]}
    with pytest.raises(UserError, match="d: differs from m0 in its test labels"):
        collect(members, "test", "last")


def test_another_data_set_is_refused_even_with_equal_labels(tmp_path):
    members = make_members(tmp_path)
    arrays = {key: members["m0"].logits(key) for key in members["m0"].logits_keys()}
    made = recipe("s", data={"source": "synthetic"})
    members["s"] = make_run(tmp_path / "s", arrays, made)
    with pytest.raises(UserError, match="s: differs from m0 in its data set"):
        collect(members, "test", "last")


def test_logits_that_are_not_finite_are_refused(tmp_path):
    members = make_members(tmp_path)
    members["m1"] = change(members["m1"], test__last__raw=np.full((400, 10), np.nan, np.float32))
    with pytest.raises(UserError, match=r"m1: .*not all finite"):
        collect(members, "test", "last")


def test_a_combination_can_be_a_member(tmp_path):
    members = make_members(tmp_path)
    run_combine(combination("soft", members), members)
    members["soft"] = RunDirectory.open(tmp_path / "ensemble-soft")
    assert collect(members, "test", "best").logits.shape == (4, 400, 10)


def test_runs_are_named_by_recipe_or_folder(tmp_path):
    members = make_members(tmp_path)
    folders = [run.folder for run in members.values()]
    assert list(open_members(folders)) == ["m0", "m1", "m2"]
    arrays = {key: members["m0"].logits(key) for key in members["m0"].logits_keys()}
    same = make_run(tmp_path / "same", arrays, recipe("m0"))
    assert list(open_members([folders[0], same.folder])) == ["m0", "same"]
    with pytest.raises(UserError, match="given twice"):
        open_members([folders[0], folders[0]])
    with pytest.raises(UserError, match="at least two"):
        open_members(folders[:1])
