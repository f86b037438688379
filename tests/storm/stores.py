"""Damaged stores: verify notices every change, training never sees one, and every message is a clear one."""

import contextlib
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from fastcifar.data import store as stores
from fastcifar.data.formats import Split
from fastcifar.data.manifest import Manifest
from fastcifar.data.store import FORMATS, Store, open_store, verify
from fastcifar.errors import UserError
from tests.storm.recipes import HOSTILE
from tests.storm.tally import Tally

COUNT = 1_000
KEYS = ("fastcifar_store", "format", "source", "content", "classes", "image_shape", "splits", "notes", "files",
        "sha256")  # fmt: skip
SPECIAL = st.sampled_from([["b", "a", "c"], [8, 9, 3], [9, 8, 1], {"train": {"count": 11}, "test": {"count": 12}},
                           "ffcv"])  # fmt: skip
EDITS = st.one_of(
    st.tuples(st.just("manifest"), st.sampled_from(KEYS), st.one_of(HOSTILE, SPECIAL)),
    st.tuples(st.just("flip"), st.integers(0), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.integers(0), st.integers(1, 2000)),
    st.tuples(st.just("remove"), st.integers(0), st.none()),
    st.tuples(st.just("add"), st.just(0), st.none()),
)
DAMAGE = st.tuples(st.sampled_from(FORMATS), st.lists(EDITS, min_size=1, max_size=2), st.booleans())


@cache
def original(to: str) -> Path:
    """Return a good store of twelve images and three classes in each split; removed when the program ends."""
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="fastcifar-storm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    random = np.random.default_rng(0)
    splits = {n: Split(random.integers(0, 256, (12, 9, 8, 3), np.uint8), np.arange(12) % 3) for n in ("train", "test")}
    data = stores.DataSet(splits, ["a", "b", "c"], {"kind": "folder"}, [])
    stores._write(data, to, folder / to, stores.no_progress)
    return folder / to


def damage(root: Path, edits: list[tuple[str, Any, Any]], sealed: bool) -> None:
    """Apply edits; data files keep their times, and a ``sealed`` manifest gets the hash that goes with it."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != "manifest.json")
    for kind, which, value in edits:
        if kind == "manifest":
            table = json.loads((root / "manifest.json").read_text())
            (root / "manifest.json").write_text(json.dumps({**table, which: value}))
        elif kind == "add":
            (root / "foreign").write_text("mine")
        elif (path := files[which % len(files)]).exists():
            _damage_file(path, kind, which, value)
    with contextlib.suppress(Exception):
        table = json.loads((root / "manifest.json").read_text())
        table.pop("sha256")
        if sealed:
            Manifest.model_validate(table).write(root)


def _damage_file(path: Path, kind: str, which: int, value: int) -> None:
    if kind == "remove":
        return path.unlink()
    found, content = path.stat(), bytearray(path.read_bytes())
    if kind == "cut":
        content = content[: max(len(content) - value, 0)]
    elif content:
        content[which % len(content)] ^= 1 << value
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def same_data(one: Store, other: Store) -> bool:
    """Return whether two stores hold the same classes, images and labels."""
    pairs = [(one.split(name), other.split(name)) for name in ("train", "test")]
    return one.classes == other.classes and all(
        np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels) for a, b in pairs
    )


def check(given_damage: tuple[str, list[tuple[str, Any, Any]], bool]) -> None:
    """Damage a copy of a store and use it.

    Raises:
        UserError: the damage was noticed.
        AssertionError: it was not, and the data are others.
    """
    to, edits, sealed = given_damage
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(original(to), Path(folder) / "set"))
        damage(root, edits, sealed)
        good = open_store(original(to))
        with contextlib.suppress(UserError):
            used = open_store(root)
            used.split("train")
            used.labels("test")
            # Who seals a changed manifest says what is true of the data; only `verify` can know better.
            assert sealed or same_data(used, good), "damaged data were used without a word"
        assert same_data(verify(root), good), "verify passed other data"


def storm(tally: Tally, seed: int, count: int) -> None:
    """Check ``count`` damaged stores, in a cache of their own."""

    @seeded(seed)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(DAMAGE)
    def run(drawn: tuple[str, list[tuple[str, Any, Any]], bool]) -> None:
        tally.check(repr(drawn)[:300], lambda: check(drawn))

    with tempfile.TemporaryDirectory(prefix="fastcifar-storm-") as cache_folder:
        before = os.environ.get("FASTCIFAR_CACHE")
        os.environ["FASTCIFAR_CACHE"] = cache_folder
        try:
            run()
        finally:
            os.environ.pop("FASTCIFAR_CACHE") if before is None else os.environ.update(FASTCIFAR_CACHE=before)
