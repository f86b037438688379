"""The wheel, installed outside the clone, does what the clone does: the same answers and the same weights.

The wheel is built once with the pinned build backend and installed without its dependencies, which are this
environment's own, so that nothing is fetched. Both sides run one script: the clone in this process, which has imported
everything, the wheel in one of its own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("hatchling", reason="the build backend is not installed")

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 500  # for processes that take some seconds on a quiet machine
ANSWERS = {
    "recipes": ["recipes", "lenet5*", "--json"],
    "show": ["show", "speed94"],
    "plan": ["plan", "smoke", "--json"],
    "dry-run": ["ladder", "--dry-run", "--json"],
    "version": ["--version"],
}
FREE_MEMORY = re.compile(r"[\d.]+ [GM]iB free")  # in the reason for a loader; it is another one every second
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

trained = ask(["run", "smoke", "--set", "train.epochs=3", "--out", "smoke", "--quiet", "--json"])
told = {"compiler": "torch._dynamo" in sys.modules, "trained": trained}
told |= {"file": fastcifar.__file__, "git": git_revision(), "install": install_command("ffcv")}
told |= {"answers": {name: ask(words) for name, words in json.loads(sys.argv[1]).items()}}
Path("told.json").write_text(json.dumps(told))
"""


def execute(command: list[str], cwd: Path, **variables: str) -> None:
    """Run a command without the variables that could lead back into the clone."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "FASTCIFAR_DATA")}
    done = subprocess.run(command, cwd=cwd, env=kept | variables, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"


def told_in(folder: Path) -> dict:
    return json.loads((folder / "told.json").read_text()) | {"folder": folder}


def share_compiled(site: Path) -> None:
    """Let the installed files use what numba has compiled of the clone's: compiling it again takes many seconds.

    numba goes by a file's time and size; here files are compared byte by byte.
    """
    for compiled in (ROOT / "fastcifar").rglob("__pycache__/*.nb[ic]"):
        source = compiled.parents[1] / (compiled.name.split(".")[0].partition("-")[0] + ".py")
        installed = site / source.relative_to(ROOT)
        if installed.read_bytes() == source.read_bytes():
            os.utime(installed, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
            (installed.parent / "__pycache__").mkdir(exist_ok=True)
            shutil.copy(compiled, installed.parent / "__pycache__")


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
def in_clone(tmp_path_factory, cache) -> dict:
    """What the clone told."""
    folder = tmp_path_factory.mktemp("clone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("FASTCIFAR_DATA", raising=False)
        patch.setattr(sys, "argv", ["-c", json.dumps(ANSWERS)])
        exec(SCRIPT, {"__name__": "script"})
    return told_in(folder)


@pytest.fixture(scope="module")
def in_wheel(wheel, in_clone, tmp_path_factory, cache) -> dict:
    """What the installed wheel told; it also writes the report of its run. After the clone, which has compiled."""
    site, folder = tmp_path_factory.mktemp("wheel") / "site", tmp_path_factory.mktemp("work")
    install(wheel, site)
    share_compiled(site)
    answers = json.dumps(ANSWERS | {"page": ["report", "smoke", "--json"]})
    variables = {"OMP_NUM_THREADS": "1", "FASTCIFAR_CACHE": str(cache), "PYTHONPATH": str(site)}
    execute([sys.executable, "-c", SCRIPT, answers], folder, **variables)
    return told_in(folder)


def test_the_wheel_holds_every_recipe_and_what_the_benchmarks_need(wheel):
    wanted = [path for name in ("fastcifar", "recipes", "records", "benchmarks") for path in committed(name)]
    inside = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert [path for path in wanted if path not in inside] == []
    assert not [path for path in inside if path.parent.name.startswith("seed-")]  # logs stay in the clone
    assert {path.parts[0] for path in inside} == {"fastcifar", wheel.name.partition("-py3")[0] + ".dist-info"}


def committed(folder: str) -> list[Path]:
    """Return where in a wheel the files of a top-level folder belong."""
    suffixes = {".py", ".toml", ".json", ".html", ".typed"}
    pattern = "*/record.json" if folder == "records" else "*"
    files = [p.relative_to(ROOT) for p in (ROOT / folder).rglob(pattern) if p.suffix in suffixes]
    return [file if folder == "fastcifar" else "fastcifar" / file for file in files]


def test_the_clone_runs_its_own_files(in_clone):
    assert Path(in_clone["file"]).is_relative_to(ROOT)
    assert "make environment" in in_clone["install"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        assert in_clone["git"]


def test_the_wheel_runs_its_own_files(in_wheel):
    assert not Path(in_wheel["file"]).is_relative_to(ROOT)
    assert in_wheel["git"] is None
    assert in_wheel["install"].endswith(" 'fastcifar[ffcv]'")
    assert "make" not in in_wheel["install"].split()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's step is compiled")
def test_training_on_a_cpu_imports_no_compiler(in_wheel):
    """torch._dynamo takes as long to import as torch itself."""
    assert in_wheel["compiler"] is False


@pytest.mark.parametrize("name", ANSWERS)
def test_both_answer_alike(in_clone, in_wheel, name):
    clone, wheel = (FREE_MEMORY.sub("", each["answers"][name]) for each in (in_clone, in_wheel))
    assert wheel == clone
    assert not clone.startswith(("1:", "2:"))


def test_smoke_trains_to_the_same_weights_bit_for_bit(in_clone, in_wheel):
    clone, wheel = (each["folder"] / "smoke" / "weights" for each in (in_clone, in_wheel))
    names = sorted(path.name for path in clone.iterdir())
    assert names
    assert names == sorted(path.name for path in wheel.iterdir())
    assert [name for name in names if (clone / name).read_bytes() != (wheel / name).read_bytes()] == []
    assert json.loads(in_wheel["trained"])["last"]["epoch"] == 3


def test_the_wheel_reports_its_run(in_wheel):
    pytest.importorskip("jinja2", reason="the extra `report` is not installed")
    assert json.loads(in_wheel["answers"]["page"])
    assert (in_wheel["folder"] / "smoke" / "report.html").is_file()
