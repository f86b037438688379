"""Mutated run directories against everything that reads one: refused by name, or read as what the run wrote."""

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.analysis.compare import group_by_recipe, pairs_against_first
from fastcifar.analysis.content import Images, content
from fastcifar.analysis.members import collect
from fastcifar.errors import UserError
from fastcifar.manifest import NAME
from fastcifar.run_directory import RunDirectory
from tests.run_directories import add_weights, make_members
from tests.storm.tally import Tally

COUNT = 1000
TEXTS = (b"", b"{}", b"[]", b"null", b"NaN", b"\xff\xfe\x00", b"[" * 50_000, b'{"format": 1}', b"9" * 5_000, bytes(64))
NUMBERS = (b"NaN", b"-1", b"1e999", b'"x"', b"[1]", b"null", b"1" * 400)


def storm(tally: Tally, seed: int, count: int) -> None:
    """Mutate one file of a run so many times; half of the mutations carry their right hash in the manifest."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        made = make_members(Path(scratch) / "good", (1.0, 1.5), seed=seed, test=30, holdout=20, train=20)
        first, good = made.values()
        import torch

        add_weights(good, "last", {"weight": torch.arange(12.0)})
        expected = read(RunDirectory.open(good.folder), first)
        for number in range(count):
            folder = Path(scratch) / "mutated"
            shutil.copytree(good.folder, folder)
            hashed = chance.random() < 0.5
            what = mutate(folder, chance, hashed)
            tally.check(f"seed {seed}, {number}: {what}", lambda f=folder, h=hashed: judge(f, first, expected, h))
            shutil.rmtree(folder)


def judge(folder: Path, first: RunDirectory, expected: list[Any], hashed: bool) -> None:
    """Read all; what is read without a refusal is what the run wrote, unless its hash was made to fit."""
    found = read(RunDirectory.open(folder), first)
    if not hashed:
        assert repr(found) == repr(expected), "a damaged file was used without a word"


def read(run: RunDirectory, first: RunDirectory) -> list[Any]:
    """Return all that a run directory says, through the analyses that commands are made of."""
    found: list[Any] = [run.recipe, run.summary, run.environment, run.metrics()]
    found += [(key, run.logits(key).tobytes()) for key in run.logits_keys()]
    found.append({name: tensor.tolist() for name, tensor in run.weights("last").items()})
    classes = run.logits("test/last/raw").shape[1]
    page = content(run, Images([str(k) for k in range(classes)], {}), hard=3)
    found.append({key: value for key, value in page.items() if key != "run"})
    found += [group_by_recipe([first, run])[0]["last"], pairs_against_first([first, run])]
    found.append(np.asarray(collect({"a": first, "b": run}, "holdout", "selected").logits).sum())
    return found


def mutate(folder: Path, chance: random.Random, hashed: bool) -> str:
    """Change one file in one way; return in words what was done."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and ".lock" not in p.name)
    name = chance.choice(names)
    data, how = changed((folder / name).read_bytes(), chance)
    if hashed and name != NAME:
        run = RunDirectory(folder)
        try:
            run.commit({name: data} if data is not None else {}, remove=[name] if data is None else [])
        except UserError as error:
            raise AssertionError("the storm itself could not write") from error
    elif data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data)
    return f"{name}: {how}{', with its hash' if hashed else ''}"


def changed(data: bytes, chance: random.Random) -> tuple[bytes | None, str]:
    """Return other content (None: no file) and in words what was done."""
    how = chance.choice(("flip", "cut", "text", "number", "remove", "grow", "zero"))
    place = chance.randrange(max(len(data), 1))
    if how == "flip":
        flipped = bytearray(data or b"x")
        flipped[place] ^= 1 << chance.randrange(8)
        return bytes(flipped), f"bit of byte {place} flipped"
    if how == "number":
        digits = [i for i, byte in enumerate(data[:100_000]) if chr(byte).isdigit()]
        at = chance.choice(digits) if digits else 0
        return data[:at] + chance.choice(NUMBERS) + data[at + 1 :], f"another number at {at}"
    simple = {
        "cut": data[:place], "text": chance.choice(TEXTS), "grow": data + data[:place],
        "zero": data[:place] + bytes(min(64, len(data) - place)) + data[place + 64 :],
    }  # fmt: skip
    return simple.get(how), how
