"""The set-up script, with stand-ins for uv, apt-get and pkg-config on PATH: what it does on which machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "cat", "cksum", "dirname", "env", "grep", "id", "rm", "touch", "tr", "mkdir", "chmod")
UV = """#!{bash}
echo "uv $*" >>"$CALLS"
case "$*" in
  venv*) mkdir -p .venv/bin && printf '#!{bash}\\nexec "{python}" "$@"\\n' >.venv/bin/python
         chmod +x .venv/bin/python;;
  *ffcv==*) exit "${{FFCV_STATUS:-0}}";;
  *nvidia-dali-cuda120==*) exit "${{DALI_STATUS:-0}}";;
esac
"""


class Machine:
    """A folder with a copy of what set-up reads, and a PATH with nothing but stand-ins and a few plain tools."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.calls = folder / "clone", folder / "bin", folder / "calls"
        (self.root / "tools").mkdir(parents=True)
        (self.root / "fastcifar").mkdir()
        self.bin.mkdir()
        for name in ("requirements.lock", "pyproject.toml", "fastcifar/__init__.py", "tools/setup.sh"):
            shutil.copy(ROOT / name, self.root / name)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.tool("python3", f'#!{self.bin}/bash\nexec "{sys.executable}" "$@"\n')
        self.tool("uv", UV.format(bash=self.bin / "bash", python=sys.executable))

    def tool(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def says(self, name: str, status: int) -> None:
        """Put a stand-in on PATH that notes its call and ends with a status."""
        self.tool(name, f'#!{self.bin}/bash\necho "{name} $*" >>"$CALLS"\nexit {status}\n')

    def setup(self, **extra: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "CALLS": str(self.calls), **extra}
        command = [str(self.bin / "bash"), "tools/setup.sh"]
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)

    def log(self) -> str:
        return self.calls.read_text() if self.calls.exists() else ""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_everything_is_installed_once(machine):
    machine.says("pkg-config", 0)
    first = machine.setup()
    assert first.returncode == 0, first.stderr
    log = machine.log()
    assert log.count("ffcv==") == log.count("nvidia-dali-cuda120==") == log.count("--editable") == 1
    assert "apt-get" not in log
    assert machine.setup().returncode == 0
    assert machine.log() == log, "the second call did something"


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml", "fastcifar/__init__.py"])
def test_a_changed_lock_or_project_is_installed_again(machine, name):
    machine.says("pkg-config", 0)
    machine.setup()
    before = machine.log().count("--requirements")
    with (machine.root / name).open("a") as file:
        file.write("\n")
    machine.setup()
    assert machine.log().count("--requirements") == before + 1
    assert machine.log().count("uv venv") == 1, "the environment was made anew"


def test_the_base_is_installed_without_ffcv_dali_and_uv(machine):
    machine.says("pkg-config", 0)
    machine.setup()
    base = (machine.root / ".venv" / "requirements.txt").read_text()
    assert "torch==" in base
    assert not any(f"\n{name}==" in base for name in ("ffcv", "nvidia-dali-cuda120", "uv"))


def test_without_the_system_packages_ffcv_is_left_out_and_they_are_named(machine):
    machine.says("pkg-config", 1)
    done = machine.setup()
    assert done.returncode == 0
    assert "libopencv-dev libturbojpeg0-dev" in done.stderr
    assert "ffcv==" not in machine.log()
    assert list((machine.root / ".venv").glob(".ready-*"))


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs root, as apt-get does")
def test_root_on_a_debian_gets_them_by_apt(machine):
    works = f'#!{machine.bin}/bash\necho "apt-get $*" >>"$CALLS"\n: >"$CALLS.installed"\n'
    machine.tool("apt-get", works)
    machine.tool("pkg-config", f'#!{machine.bin}/bash\n[ -e "$CALLS.installed" ]\n')
    assert machine.setup().returncode == 0
    assert "install --no-install-recommends pkg-config libopencv-dev libturbojpeg0-dev" in machine.log()
    assert "ffcv==" in machine.log()


def test_a_failed_apt_leaves_the_rest_standing(machine):
    machine.says("pkg-config", 1)
    machine.says("apt-get", 100)
    done = machine.setup()
    assert done.returncode == 0
    assert "going on without ffcv" in done.stderr


@pytest.mark.parametrize(("variable", "name"), [("FFCV_STATUS", "ffcv"), ("DALI_STATUS", "DALI")])
def test_a_failed_optional_package_leaves_the_rest_standing(machine, variable, name):
    machine.says("pkg-config", 0)
    done = machine.setup(**{variable: "1"})
    assert done.returncode == 0
    assert f"going on without {name}" in done.stderr
    assert list((machine.root / ".venv").glob(".ready-*"))


def test_an_old_python_is_named(machine):
    machine.tool("python3", f"#!{machine.bin}/bash\necho 3.10\n")
    done = machine.setup()
    assert done.returncode == 2
    assert "Python 3.10" in done.stderr
    assert "3.11 or newer" in done.stderr


def test_no_python_is_named(machine):
    (machine.bin / "python3").unlink()
    done = machine.setup()
    assert done.returncode == 2
    assert "install Python 3.11" in done.stderr


def test_the_lock_pins_everything_without_addresses():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert all("==" in line for line in lines)
    assert not any("://" in line or "--" in line or " @ " in line for line in lines)
