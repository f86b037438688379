"""The page: complete, self-contained, and true to the run."""

import re

import pytest

from fastcifar.analysis.combine import run_combine
from fastcifar.analysis.content import find_images
from fastcifar.analysis.html import build_report
from fastcifar.config.schema import CombineRecipe
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory
from tests.run_directories import make_members

pytest.importorskip("matplotlib")


@pytest.fixture
def members(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    return make_members(tmp_path, holdout=100)


def test_the_page_needs_nothing_from_outside(members):
    page, _ = build_report(list(members.values()))
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page
    assert "@import" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "#010101" not in page


def test_the_page_says_which_figure_is_which(members):
    page, (values,) = build_report([members["m2"]])
    assert values["explained"] == "selected"
    assert f"{members['m2'].summary['last']['accuracy']:.2f}%" in page
    assert "chosen on the test set, as published" in page
    assert "Pictures are left out" in page
    assert sum(map(sum, values["confusion"]["counts"])) == 400


def test_a_combination_is_reported_too(members, tmp_path):
    table = {"how": "soft", "members": list(members)}
    run_combine(CombineRecipe.model_validate({"name": "vote", "combine": table}), members, tmp_path / "vote")
    page, _ = build_report([RunDirectory.open(tmp_path / "vote")])
    assert "Members" in page


def test_data_that_was_named_and_is_not_there_is_an_error(members, tmp_path):
    with pytest.raises(UserError):
        find_images(members["m0"], tmp_path / "nothing")
