"""The page: complete, self-contained, true to the run, and what its script does in a browser."""

import json
import re
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

from fastcifar.analysis.combine import run_combine
from fastcifar.analysis.content import Images, content, data_config, find_images
from fastcifar.analysis.html import build_report
from fastcifar.analysis.sprite import COLUMNS, Sprite
from fastcifar.config.schema import CombineRecipe, DataConfig
from fastcifar.data.store import Split
from fastcifar.errors import UserError
from fastcifar.ladder.page import page as ladder_page
from fastcifar.ladder.rows import jobs_for
from fastcifar.ladder.state import Ledger
from fastcifar.run_directory import RunDirectory, write_atomic
from tests.browser import page as browser  # noqa: F401  a fixture
from tests.conftest import session_seed
from tests.run_directories import logits_for, make_members, make_run, recipe

pytest.importorskip("jinja2")
HOSTILE = '</script><img src="https://example.com/x.png" onerror="document.title=1"> & "quoted"'


@pytest.fixture
def members(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    return make_members(tmp_path, holdout=100)


class Tags(HTMLParser):
    """The elements of a page with their attributes, and the content of its data element."""

    def __init__(self, text):
        super().__init__()
        self.found, self.data, self._inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") == "data"

    def handle_data(self, data):
        self.data += data if self._inside else ""

    def handle_endtag(self, tag):
        self._inside = False


# ---------------------------------------------------------------------------------------------------- without a browser


def test_the_page_needs_nothing_from_outside(members):
    page, _, _ = build_report(list(members.values()))
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "@import" not in page
    assert "url(http" not in page
    tags = Tags(page)
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    policy = next(a["content"] for _, a in tags.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags.found


def test_the_page_says_which_metric_is_which(members):
    page, (values,), compared = build_report([members["m2"]])
    assert values["explained"] == "selected"
    assert compared is None
    assert f"{members['m2'].summary['last']['accuracy']:.2f}%" in page
    assert "chosen on the test set, as published" in page
    assert "Pictures are left out" in page
    assert sum(map(sum, values["confusion"]["counts"])) == 400


def test_the_numbers_are_scikit_learns(members):
    run = members["m1"]
    page, (values,), _ = build_report([run])
    labels, predicted = run.logits("test/labels"), run.logits("test/selected/raw").argmax(1)
    assert values["results"]["selected"]["accuracy"] == pytest.approx(100 * accuracy_score(labels, predicted))
    np.testing.assert_array_equal(values["confusion"]["counts"], confusion_matrix(labels, predicted))
    recall = 100 * recall_score(labels, predicted, average=None)
    np.testing.assert_allclose(values["confusion"]["recall_percent"], recall)
    shown = dict(re.findall(r"<th>(\w+)</th><td><span class=\"range\">.*?<td class=\"n\">([\d.]+)%", page))
    assert shown == {name: f"{value:.1f}" for name, value in zip(values["classes"], recall, strict=True)}
    cells = re.findall(r'data-cell="(\d+),(\d+)"[^>]*>(\d+)<', page)
    assert {(int(i), int(j)): int(n) for i, j, n in cells} == {
        (i, j): n for (i, j), n in np.ndenumerate(confusion_matrix(labels, predicted)) if n
    }


def test_the_intervals_are_wilsons(members):
    _, (values,), _ = build_report([members["m0"]])
    counts = np.array(values["confusion"]["counts"])
    for i, (low, high) in enumerate(values["confusion"]["recall_interval"]):
        theirs = binomtest(int(counts[i, i]), int(counts[i].sum())).proportion_ci(method="wilson")
        assert (low, high) == pytest.approx((100 * theirs.low, 100 * theirs.high))


def test_a_weak_models_suspects_are_not_named(members, tmp_path, rng):
    page, (values,), _ = build_report([members["m0"]])
    assert not values["label_errors"]["test"]["meaningful"]
    assert "none are named" in page
    assert values["label_errors_rule"] in unescape(page)
    labels = rng.integers(10, size=400)
    run = make_run(tmp_path / "good", {"test/labels": labels, "test/last/raw": logits_for(labels, rng, 6.0)})
    assert content(run, Images(list("abcdefghij"), {}))["label_errors"]["test"]["meaningful"]


def test_whatever_a_class_is_called_it_stays_text(members, monkeypatch):
    names = [HOSTILE, *"bcdefghij"]
    monkeypatch.setattr("fastcifar.analysis.html.find_images", lambda run, data: Images(names, {}, HOSTILE))
    page, _, _ = build_report([members["m0"], members["m1"]])
    tags = Tags(page)
    assert HOSTILE not in page
    assert "onerror" not in [key for _, attributes in tags.found for key in attributes]
    assert json.loads(tags.data)["runs"][0]["classes"][0] == HOSTILE
    assert [tag for tag, _ in tags.found].count("script") == 2


def test_a_combination_is_reported_too(members, tmp_path):
    table = {"how": "soft", "members": list(members)}
    run_combine(CombineRecipe.model_validate({"name": "vote", "combine": table}), members, tmp_path / "vote")
    page, _, _ = build_report([RunDirectory.open(tmp_path / "vote")])
    assert "Members" in page


def test_data_that_was_named_and_is_not_there_is_an_error(members, tmp_path):
    with pytest.raises(UserError):
        find_images(members["m0"], tmp_path / "nothing")


def test_a_combination_that_was_moved_with_its_members_still_finds_their_data(tmp_path):
    members = make_members(tmp_path / "here", classes=10)
    made = CombineRecipe.model_validate({"name": "vote", "combine": {"how": "soft", "members": list(members)}})
    vote = run_combine(made, members, tmp_path / "here/vote")
    assert vote["members"][0]["run"].startswith(str(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    source = members["m0"].recipe.data.source
    assert data_config(RunDirectory.open(tmp_path / "there/vote")).source == source
    (tmp_path / "there/m0").rename(tmp_path / "there/m9")
    with pytest.raises(UserError, match=r"vote: its member m0 is neither at .*here/m0 nor beside it"):
        data_config(RunDirectory.open(tmp_path / "there/vote"))


def test_a_sheet_holds_each_picture_once_and_in_its_place(rng):
    images = rng.integers(0, 256, size=(COLUMNS + 3, 8, 8, 3), dtype=np.uint8)
    sprite = Sprite(8)
    assert sprite.add_rows(images, range(len(images))) == list(range(len(images)))
    assert sprite.add_rows(images, [5, 0]) == [5, 0]
    assert sprite.add_rows(None, [5, 0]) == [None, None]
    assert sprite.sheet().shape == (16, 8 * COLUMNS, 3)
    np.testing.assert_array_equal(sprite.sheet()[8:, 16:24], images[COLUMNS + 2])
    assert sprite.address().startswith("data:image/webp;base64,")


# -------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def six(tmp_path_factory, request):
    """Six runs of two recipes on the same 600 test images, which are there too, two of them over 400 epochs."""
    folder, rng = tmp_path_factory.mktemp("six"), np.random.default_rng(session_seed(request.config))
    labels = rng.integers(10, size=600)
    pictures = rng.integers(0, 256, size=(600, 8, 8, 3), dtype=np.uint8)
    names = [HOSTILE, *"bcdefghij"]
    runs = []
    for name, skill in (("weaker", 2.0), ("better", 3.5)):
        for seed in (1, 2, 3):
            arrays = {"test/labels": labels, "test/last/raw": logits_for(labels, rng, skill)}
            runs.append(make_run(folder / f"{name}-{seed}", arrays, recipe(name, seed=seed)))
    for run in (runs[0], runs[1]):
        first = run.metrics()[0]
        run.write_metrics([{**first, "epoch": e, "train_loss": 3 / e} for e in range(1, 401)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastcifar.analysis.html.find_images", lambda run, data: Images(names, {"test": pictures}))
        write_atomic(folder / "one.html", build_report(runs[:1])[0])
        text, values, compared = build_report(runs)
    write_atomic(folder / "report.html", text)
    return folder, values, compared


def test_six_runs_are_one_comparison_that_works_in_a_browser(browser, six):  # noqa: F811
    folder, values, compared = six
    assert (folder / "report.html").stat().st_size < 5e6
    assert [len(group["seeds"]) for group in compared["groups"]] == [3, 3]
    assert len(compared["pairs"]) == 15
    browser.open(folder / "report.html")
    browser.wait("document.documentElement.dataset.ready === 'true'")
    assert browser.eval("document.querySelectorAll('#comparison tbody')[0].rows.length") == 2
    assert browser.eval("document.querySelectorAll('table.pairs tbody tr').length") == 15
    assert browser.eval("[...document.querySelectorAll('section.run')].filter(s => !s.hidden).length") == 1
    assert browser.eval("document.querySelectorAll('.chart.compared polyline.curve').length") >= 3
    assert browser.eval("document.querySelectorAll('.chart.compared polygon.band').length") >= 3

    # A click on a cell shows its images, of the run whose tab is open.
    browser.eval("document.querySelectorAll('.tabs button')[4].click()")
    count = values[4]["confusion"]["counts"][0][0]
    cell = "document.querySelectorAll('section.run')[4].querySelector('[data-cell=\"0,0\"]')"
    browser.eval(f"{cell}.click()")
    shown = "document.querySelectorAll('section.run')[4].querySelector('.shown')"
    assert browser.eval(f"{shown}.querySelectorAll('figure canvas.painted').length") == min(count, 3)
    assert HOSTILE in browser.eval(f"{shown}.querySelector('h3').textContent")
    browser.eval(f"{cell}.click()")
    assert browser.eval(f"{shown}.children.length") == 0
    hard = "document.querySelectorAll('section.run')[4]"
    select = f"const s = {hard}.querySelector('select.filter')"
    browser.eval(f"(() => {{ {select}; s.value = '3'; s.dispatchEvent(new Event('change')); }})()")
    given = browser.eval(f"[...{hard}.querySelectorAll('.images.hard .given')].map(e => e.textContent)")
    assert set(given) == {"d"}

    assert browser.messages() == []
    assert browser.requests() == [(folder / "report.html").as_uri()]


def test_curves_answer_a_pointer_and_zoom(browser, six):  # noqa: F811
    browser.open(six[0] / "one.html", dark=True)
    browser.wait("document.documentElement.dataset.ready === 'true'")
    assert browser.eval("document.querySelector('.run-curve polyline').points.length") == 400
    at = """(() => { const svg = document.querySelector('.run-curve svg'), b = svg.getBoundingClientRect();
      const fire = (type, share) => svg.dispatchEvent(new PointerEvent(type,
        {bubbles: true, clientX: b.left + share * b.width, clientY: b.top + b.height / 2}));
      %s; return document.querySelector('.run-curve .tip').textContent; })()"""
    assert re.match(r"epoch \d+train [\d.]+test", browser.eval(at % "fire('pointermove', .5)"))
    box = "(s => document.querySelector('.run-curve ' + s).getBoundingClientRect().top)"
    assert 0 <= browser.eval(f"{box}('.tip') - {box}('svg')") < 60  # the label lies over its own chart
    browser.eval(at % "fire('pointerdown', .4); fire('pointermove', .6); fire('pointerup', .6)")
    assert 50 < browser.eval("document.querySelector('.run-curve polyline').points.length") < 200
    browser.eval("document.querySelector('.run-curve .reset').click()")
    assert browser.eval("document.querySelector('.run-curve polyline').points.length") == 400
    assert browser.eval("getComputedStyle(document.body).backgroundColor") == "rgb(21, 22, 24)"
    browser.eval("document.querySelector('.theme').click()")
    assert browser.eval("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 252)"
    assert browser.messages() == []


def test_no_page_is_wider_than_its_screen(browser, six, tmp_path):  # noqa: F811
    write_atomic(tmp_path / "ladder.html", ladder_page(Ledger(jobs_for(["lenet5"], 1, tmp_path / "none")).table()))
    for path in (six[0] / "report.html", tmp_path / "ladder.html"):
        for width in (420, 1400):
            browser.open(path, width)
            assert browser.eval("document.documentElement.scrollWidth") <= width
    assert browser.messages() == []


@pytest.mark.real
def test_the_disputed_labels_are_those_of_the_real_test_set(real_store, tmp_path, rng):
    from fastcifar.analysis import disputed

    split: Split = real_store.split("test")
    labels = np.asarray(split.labels, np.int64)
    assert disputed.applies("cifar10", labels)
    made = recipe("real", data=DataConfig(source="cifar10").model_dump())
    run = make_run(tmp_path / "run", {"test/labels": labels, "test/last/raw": logits_for(labels, rng, 3.0)}, made)
    page, (values,), _ = build_report([run], real_store.root)
    assert values["test_set"]["images"] == 54
    assert "What the test set says about itself" in page
    assert len(page) < 5e6
