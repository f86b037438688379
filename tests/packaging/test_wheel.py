"""The wheel, installed outside the clone, does what the clone does: the same answers and the same weights.

The wheel is built once with the pinned build backend and installed without its dependencies, which are this
environment's own, so that nothing is fetched. Both sides run one script in a process of their own.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="the build backend is not installed")

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 500  # for processes that take some seconds on a quiet machine
ANSWERS = {
    "recipes": ["recipes", "*", "--json"],
    "show": ["show", "speed94"],
    "plan": ["plan", "smoke", "--json"],
    "dry-run": ["ladder", "--dry-run", "--json"],
    "version": ["--version"],
}
SCRIPT = """
import json, sys
from pathlib import Path
from typer.testing import CliRunner
import fastcifar
from fastcifar.cli.main import app
from fastcifar.environment import git_revision
from fastcifar.locations import install_command

def ask(words):
    done = CliRunner().invoke(app, words)
    return done.stdout if done.exit_code == 0 else f"{done.exit_code}: {done.output} {done.exception!r}"

trained = ask(["run", "smoke", "--set", "train.epochs=6", "--out", "smoke", "--quiet", "--json"])
page = ask(["report", "smoke", "--json"])
told = {"file": fastcifar.__file__, "git": git_revision(), "install": install_command("ffcv"), "trained": trained}
told |= {"page": page, "answers": {name: ask(words) for name, words in json.loads(sys.argv[1]).items()}}
Path("told.json").write_text(json.dumps(told))
"""


def execute(command: list[str], cwd: Path, **variables: str) -> None:
    """Run a command without the variables that could lead back into the clone."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "FASTCIFAR_DATA")}
    done = subprocess.run(command, cwd=cwd, env=kept | variables, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"


def side(folder: Path, cache: Path, site: Path | None) -> dict:
    """Run the script in a new folder, with the package in ``site`` before all others, and return what it told."""
    folder.mkdir()
    variables = {"OMP_NUM_THREADS": "1", "FASTCIFAR_CACHE": str(cache)}
    variables |= {"PYTHONPATH": str(site)} if site else {}
    execute([sys.executable, "-c", SCRIPT, json.dumps(ANSWERS)], folder, **variables)
    return json.loads((folder / "told.json").read_text()) | {"folder": folder}


def install(wheel: Path, site: Path) -> None:
    """Install a wheel into a folder, without dependencies and without a network: with uv or, failing that, pip."""
    uv = shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)
    command = [uv, "pip", "install", "--offline"] if uv else [sys.executable, "-m", "pip", "install", "--no-index"]
    python = ["--python", sys.executable] if uv else []
    execute([*command, *python, "--no-deps", "--target", str(site), str(wheel)], wheel.parent)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    execute([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def sides(wheel, tmp_path_factory, cache) -> tuple[dict, dict]:
    """What the clone and the installed wheel told."""
    folder = tmp_path_factory.mktemp("sides")
    install(wheel, folder / "site")
    return side(folder / "clone", cache, None), side(folder / "wheel", cache, folder / "site")


def test_the_wheel_holds_every_recipe_and_what_the_benchmarks_need(wheel):
    wanted = [path for name in ("fastcifar", "recipes", "benchmarks") for path in committed(name)]
    inside = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert [path for path in wanted if path not in inside] == []
    assert {path.parts[0] for path in inside} == {"fastcifar", wheel.name.partition("-py3")[0] + ".dist-info"}


def committed(folder: str) -> list[Path]:
    """Return where in a wheel the files of a top-level folder belong."""
    suffixes = {".py", ".toml", ".json", ".html", ".typed"}
    files = [p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.suffix in suffixes or p.name == "py.typed"]
    return [file if folder == "fastcifar" else "fastcifar" / file for file in files]


def test_each_side_ran_its_own_files(sides):
    clone, wheel = sides
    assert Path(clone["file"]).is_relative_to(ROOT)
    assert not Path(wheel["file"]).is_relative_to(ROOT)
    assert wheel["git"] is None
    if (ROOT / ".git").exists():
        assert clone["git"]


def test_advice_fits_where_the_reader_is(sides):
    clone, wheel = sides
    assert "make environment" in clone["install"]
    assert wheel["install"].endswith("pip install 'fastcifar[ffcv]'") or " 'fastcifar[ffcv]'" in wheel["install"]
    assert "make" not in wheel["install"].split()


@pytest.mark.parametrize("name", ANSWERS)
def test_both_answer_alike(sides, name):
    clone, wheel = sides
    assert wheel["answers"][name] == clone["answers"][name]
    assert not clone["answers"][name].startswith(("1:", "2:"))


def test_smoke_trains_to_the_same_weights_bit_for_bit(sides):
    clone, wheel = (each["folder"] / "smoke" / "weights" for each in sides)
    names = sorted(path.name for path in clone.iterdir())
    assert names
    assert names == sorted(path.name for path in wheel.iterdir())
    assert [name for name in names if (clone / name).read_bytes() != (wheel / name).read_bytes()] == []
    assert json.loads(sides[1]["trained"])["epochs_done"] == 6


def test_the_wheel_reports_its_run(sides):
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    assert json.loads(sides[1]["page"])
    assert (sides[1]["folder"] / "smoke" / "report.html").is_file()
