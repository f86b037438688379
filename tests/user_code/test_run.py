"""A model, an operation and an optimizer of somebody else's: trained, resumed, planned, exported, predicted."""

import json
import shutil

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from fastcifar.run_directory import RunDirectory
from tests.command import fastcifar
from tests.train.tiny import assert_same_run
from tests.user_code.conftest import forget, write

RECIPE = """
name = "theirs"
data = { source = "synthetic", subset = 200, test_subset = 100, loader = { name = "resident" } }
augment = ["crop(2)", "theirs.ops:Grid(6, p=0.9)", "flip"]
model = { name = "theirs.nets:Net", options = { width = 6 } }
optimizer = { name = "theirs.opt:Lion", lr = 3e-3, weight_decay = 0.01, options = { betas = [0.8, 0.9] } }
schedule = { name = "cosine" }
asam = { rho = 0.1 }
ema = { decay = 0.9 }
train = { epochs = 3, batch_size = 32 }
engine = { device = "cpu" }
"""


@pytest.fixture(scope="module")
def trained(workplace):
    write(workplace, "theirs.toml", RECIPE)
    done = fastcifar("run", "theirs.toml", "--out", "whole", "--quiet", cwd=workplace)
    assert done.returncode == 0, done.stderr
    return workplace


def test_a_run_says_whose_code_it_ran(trained):
    recorded = RunDirectory.open(trained / "whole").environment["user_code"]
    assert list(recorded) == ["theirs.nets:Net", "theirs.opt:Lion", "theirs.ops:Grid"]
    assert all(len(of["sha256"]) == 64 for of in recorded.values())


def test_a_resumed_run_comes_to_the_same_bits(trained):
    done = fastcifar("run", "theirs.toml", "--out", "parts", "--stop-after", "1", "--quiet", cwd=trained)
    assert done.returncode == 0, done.stderr
    done = fastcifar("run", "--resume", "parts", "--quiet", cwd=trained)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_run(trained / "whole", trained / "parts")


def test_the_plan_says_what_is_not_ours(trained):
    done = fastcifar("plan", "theirs.toml", cwd=trained)
    assert "theirs.nets:Net: 538 parameters" in done.stdout
    assert "theirs.opt:Lion, without the fused update" in done.stdout
    told = json.loads(fastcifar("plan", "theirs.toml", "--json", cwd=trained).stdout)
    assert told["optimizer"] == {"name": "theirs.opt:Lion", "fused": False}
    assert told["model"]["gmacs"] == pytest.approx((6 * 75 * 49 + 60) / 1e9)
    assert told["memory_mib"]["activations"] > 0


def test_it_is_exported_reported_and_predicted(trained, synthetic_store):
    from PIL import Image

    done = fastcifar("export", "whole", "model.safetensors", cwd=trained)
    assert done.returncode == 0, done.stderr
    with safe_open(trained / "model.safetensors", "np") as file:
        assert "head.weight" in file.keys()
    done = fastcifar("report", "whole", "--out", "report", "--json", cwd=trained)
    assert done.returncode == 0, done.stderr
    Image.fromarray(synthetic_store.split("test").images[0]).save(trained / "image.png")
    done = fastcifar("predict", "whole", "image.png", "--json", cwd=trained)
    assert len(json.loads(done.stdout)["predictions"][0]["classes"]) == 3


def test_tied_weights_are_trained_kept_and_exported(trained):
    """Both names have one memory, which safetensors refuses to write."""
    words = ["--set", "model={name='theirs.nets:Tied'}", "--set", "train.epochs=1", "--quiet"]
    done = fastcifar("run", "theirs.toml", "--out", "tied", *words, cwd=trained)
    assert done.returncode == 0, done.stderr
    done = fastcifar("export", "tied", "tied.safetensors", cwd=trained)
    assert done.returncode == 0, done.stderr
    for path in (trained / "tied" / "weights" / "last.safetensors", trained / "tied.safetensors"):
        kept = load_file(path)
        assert (kept["head.weight"] == kept["again.weight"]).all()
        assert kept["head.weight"].any()


def test_where_the_code_is_gone_the_results_can_still_be_read(trained, tmp_path):
    """In a folder from which the package cannot be imported."""
    shutil.copytree(trained / "whole", tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        forget("theirs")
        patch.setattr("sys.path", [p for p in __import__("sys").path if str(trained) not in p])
        assert fastcifar("compare", "run", "run", "--json", cwd=tmp_path).returncode in (0, 2)
        assert RunDirectory.open(tmp_path / "run").recipe.model.name == "theirs.nets:Net"
        done = fastcifar("predict", "run", "image.png", cwd=tmp_path)
        assert done.returncode == 2
        assert 'there is no module "theirs"' in done.stderr


def test_changed_code_is_noticed_when_a_run_goes_on(trained, tmp_path):
    for name in ("theirs", "theirs.toml"):
        copy = shutil.copytree if (trained / name).is_dir() else shutil.copy
        copy(trained / name, tmp_path / name)
    forget("theirs")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        words = ["--quiet", "--set", "train.epochs=2"]
        assert fastcifar("run", "theirs.toml", "--out", "r", "--stop-after", "1", *words, cwd=tmp_path).returncode == 0
        with (tmp_path / "theirs" / "nets.py").open("a") as file:
            file.write("# another line\n")
        forget("theirs")
        done = fastcifar("run", "--resume", "r", "--quiet", cwd=tmp_path)
    forget("theirs")
    assert done.returncode == 0
    assert "theirs.nets:Net has changed since the run began" in " ".join(done.stderr.split())
