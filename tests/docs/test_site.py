"""The documentation site: built strictly, complete, and asking nothing of other hosts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastcifar.config.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]
WORDS = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a test that uses it is skipped by name where mkdocs is not installed."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason=f"documentation site: {package} is not installed")
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*WORDS, "--site-dir", str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text_of(page: Path) -> str:
    return re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))


def test_every_page_is_there_and_in_the_navigation(site):
    start = (site / "index.html").read_text(encoding="utf-8")
    written = {p.relative_to(ROOT / "docs").with_suffix("").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    generated = {"keys", "recipes", "commands", "ladder", "benchmarks", "contributing", "api"}
    for name in written | generated:
        assert (site / name / "index.html").is_file()
        assert f'href="{name}/"' in start


def keys_of(model, prefix=""):
    for key, field in model.model_fields.items():
        nested = getattr(field.annotation, "model_fields", None)
        yield from keys_of(field.annotation, f"{prefix}{key}.") if nested else [f"{prefix}{key}"]


def test_every_key_of_a_recipe_is_listed(site):
    page = text_of(site / "keys" / "index.html")
    tables = {"mix", "model", "optimizer", "asam", "ema", "lookahead"}  # one of several, or none
    for key in keys_of(Recipe):
        assert (f"[{key}]" if key in tables else key) in page


def test_the_reference_has_the_modules(site):
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("fastcifar.run_directory.RunDirectory", "fastcifar.analysis.corruptions.corrupt"):
        assert f'id="{name}"' in page


def test_no_page_loads_anything_from_another_host(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="(https?:[^"]+)"', text)
        loaded += re.findall(r'<link[^>]* rel="(?:stylesheet|preconnect|preload)"[^>]* href="(https?:[^"]+)"', text)
        assert loaded == [], page


def test_links_out_of_the_folder_become_text():
    pytest.importorskip("mkdocs", reason="documentation site: mkdocs is not installed")
    from tools.docs_site import without_outside_links

    given = "[the step](../fastcifar/train/step.py), [a page](walk.md), ![a picture](../x.png)"
    assert without_outside_links(given) == "the step, [a page](walk.md), ![a picture](../x.png)"
