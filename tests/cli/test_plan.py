"""``fastcifar plan``: what it says is what the engine would do."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fastcifar.cli import plan
from fastcifar.config import load_recipe
from fastcifar.data.store import resolve_store
from fastcifar.errors import UserError
from fastcifar.models import build_model
from tests.command import fastcifar


def told(name: str, *words: str, times: dict | None = None) -> dict:
    return plan.describe(load_recipe(name, words), None, "x", times or {})


def test_the_published_counts(monkeypatch):
    found = told("wrn-asam")
    assert found["model"]["parameters"] == 10_961_370
    assert found["model"]["gmacs"] == pytest.approx(1.5481, abs=5e-5)
    training = found["training"]
    assert (training["steps_per_epoch"], training["steps"], training["passes_per_step"]) == (391, 39_100, 2)


def test_missing_data_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    data = told("lenet5")["data"]
    assert data["found"] is False
    assert "fastcifar data fetch" in data["where"]


def test_smoke_needs_no_data():
    found = told("smoke")
    assert found["data"]["found"] is True
    assert found["training"]["steps_per_epoch"] == 2000 // load_recipe("smoke").train.batch_size


def image_folder(root: Path, classes: int, px: int) -> None:
    """Write two training and two test images of each class."""
    for split in ("train", "test"):
        for number in range(classes):
            folder = root / split / f"class-{number}"
            folder.mkdir(parents=True)
            for k in range(2):
                Image.new("RGB", (px, px), (number, k, 0)).save(folder / f"{k}.png")


def test_models_are_counted_for_the_datas_own_images_and_classes(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCIFAR_CACHE", str(tmp_path / "cache"))
    image_folder(tmp_path / "images", 3, 48)
    words = ["data.source=folder", "model={name='vit', patch=6}"]  # 6 does not divide 32
    recipe = load_recipe("beyond/vit", words)
    resolve_store(recipe.data, tmp_path / "images")
    found = plan.describe(recipe, tmp_path / "images", "x", {})
    model = build_model(recipe.model, num_classes=3, image_px=48, seed=0)
    assert found["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["memory_mib"]["images"] == pytest.approx(6 * 3 * 48**2 / 2**20, abs=0.05)


def test_data_of_an_earlier_run_are_found_converted(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCIFAR_CACHE", str(tmp_path / "cache"))
    image_folder(tmp_path / "images", 2, 16)
    recipe = load_recipe("lenet5", ["data.source=folder"])
    before = plan.describe(recipe, tmp_path / "images", "x", {})
    assert "converted at first use; taken for 50,000 images" in before["data"]["where"]
    store = resolve_store(recipe.data, tmp_path / "images")
    after = plan.describe(recipe, tmp_path / "images", "x", {})
    assert f"(converted: {store.root})" in after["data"]["where"]
    assert after["training"]["steps_per_epoch"] == 1


def test_nothing_is_predicted_that_was_not_measured():
    assert told("lenet5")["time"]["total_s"] is None
    assert "not measured yet" in plan.lines(told("lenet5"))[-1]


def test_dividing_a_batch_is_told_with_its_predicted_step():
    found = plan.describe(load_recipe("wrn-asam"), None, "h100", {}, devices=3)
    divided = found["divided"]
    assert (divided["smallest"], divided["largest"], divided["all_reduces"]) == (42, 43, 2)
    assert divided["gradient_bytes"] == 4 * found["model"]["parameters"]
    words = "\n".join(plan.lines(found))
    assert "42 or 43 of a batch's 128 images on each of 3; 2 all-reduces of 43.8 MB a step" in words
    assert "predicted, never measured" in words
    own = plan.describe(load_recipe("wrn-asam", ["asam.norm=rank"]), None, "x", {}, devices=2)
    assert (own["divided"]["all_reduces"], own["divided"]["step"]) == (1, None)


def test_batches_that_cannot_be_divided_are_refused():
    with pytest.raises(UserError, match="last batch has 80 samples for 96 ranks"):
        plan.describe(load_recipe("wrn-asam"), None, "x", {}, devices=96)
    with pytest.raises(UserError, match=r"accumulate = 2 needs batches that 3 ranks divide evenly"):
        plan.describe(load_recipe("wrn-asam", ["train.accumulate=2"]), None, "x", {}, devices=3)


def test_the_predicted_all_reduce_is_the_formula():
    """Of 450 GB/s at 75% on one machine; eight ports of 50 GB/s at 75%, or one, between machines."""
    from fastcifar.models.scaling import all_reduce_s

    assert all_reduce_s(1e9, 1) == 0
    assert all_reduce_s(1e9, 8) == pytest.approx(1.75 / 337.5 + 15e-6)
    assert all_reduce_s(1e9, 16) == pytest.approx(1.875 / 300 + 55e-6)
    assert all_reduce_s(1e9, 16, "single") == pytest.approx(1.875 / 37.5 + 55e-6)


def test_activations_grow_with_the_batch_and_the_precision():
    def activations(size: int, precision: str) -> float:
        found = told("wrn-sgd", f"train.batch_size={size}", f"engine.precision={precision}")
        return found["memory_mib"]["activations"]

    small, large = (activations(size, "bf16") for size in (64, 128))
    assert large == pytest.approx(2 * small, rel=0.01)
    assert activations(64, "fp32") == pytest.approx(2 * small, rel=0.05)


def test_saved_bytes_are_those_of_a_real_forward_pass():
    import torch

    from fastcifar.models import memory

    recipe = load_recipe("residual", ["engine.precision=fp32"])
    model = build_model(recipe.model, seed=0).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model(torch.zeros(2, 3, 32, 32).to(memory_format=torch.channels_last))
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // 2
    del result
    assert memory.saved_bytes(recipe) == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("name", ["lenet5", "smoke/wrn-adam", "smoke/wrn-ema"])
def test_buffers_are_counted_as_the_step_makes_them(name):
    import gc

    import torch

    from fastcifar.models import memory
    from fastcifar.train.step import build_step

    gc.collect()  # a step refers to itself, so that an earlier test's may still be there
    recipe = load_recipe(name, ["engine.device=cpu", "engine.precision=fp32"])
    model = build_model(recipe.model, seed=0)
    parameters = sum(p.numel() for p in model.parameters())
    step = build_step(recipe, model, None, None, steps_per_epoch=1, device=torch.device("cpu"))
    size = step.flat.weights.untyped_storage().nbytes()
    storages = {t.untyped_storage().data_ptr() for t in gc.get_objects() if type(t) is torch.Tensor
                and t.untyped_storage().nbytes() == size and t.dtype == torch.float32}  # fmt: skip
    state = memory.memory_mib(recipe, parameters, 0)["weights_and_state"] * 2**20
    assert state == pytest.approx(4 * parameters * len(storages), rel=0.1)


TOO_LARGE = ["model.widen=128"], ["model.depth=100", "model.widen=100"], ["model.widen=32", "train.batch_size=2000"]


@pytest.mark.parametrize("overrides", TOO_LARGE, ids=str)
def test_what_cannot_fit_is_refused_before_anything_is_made(overrides, tmp_path, monkeypatch):
    import torch

    from fastcifar.cli import run_command
    from fastcifar.models import memory

    monkeypatch.setattr(memory, "device_bytes", lambda device: 8 * 2**30)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("wrn-asam", [*overrides, "data.source=synthetic", "engine.device=cpu"])
    for refuse in (
        lambda: plan.describe(recipe, None, "nothing", {}),
        lambda: memory.refuse_what_cannot_fit(recipe, torch.device("cpu")),
        lambda: run_command.run("wrn-asam", [*overrides, "data.source=synthetic", "engine.device=cpu"]),
    ):
        with pytest.raises(UserError, match=r"needs about .* GiB"):
            refuse()
    assert list(tmp_path.iterdir()) == []


def test_memory_is_that_of_a_devices_own_part_of_the_batch(monkeypatch):
    """Where one device could not hold a batch, eight that divide it can, and each has all weights and images."""
    from fastcifar.cli import run_command
    from fastcifar.models import memory

    recipe = load_recipe("wrn-asam", ["model.widen=32", "train.batch_size=1999", "data.source=synthetic",
                                      "train.drop_last=true", "engine.device=cpu"])  # fmt: skip
    alone, divided = (memory.memory_mib(recipe, 1_000_000, 500, devices=devices) for devices in (1, 8))
    assert divided["activations"] == pytest.approx(alone["activations"] * 250 / 1999, abs=0.1)
    assert all(divided[name] == alone[name] for name in ("weights_and_state", "images"))
    in_parts = recipe.model_copy(update={"train": recipe.train.model_copy(update={"accumulate": 3})})
    assert [memory.micro_batch(in_parts, devices) for devices in (1, 2, 8)] == [667, 334, 84]
    monkeypatch.setattr(memory, "device_bytes", lambda device: 20 * 2**30)
    for refuse in (
        lambda devices: plan.describe(recipe, None, "nothing", {}, devices=devices),
        lambda devices: run_command.refuse_early(recipe, None, devices=devices),
    ):
        with pytest.raises(UserError, match=r"needs about .* GiB"):
            refuse(1)
        told = refuse(8)
        assert told is None or any("MiB on each of 8: " in line for line in plan.lines(told))


def test_the_ranks_of_torchrun_count_as_devices(monkeypatch):
    from fastcifar.cli import run_command
    from fastcifar.launch import Place

    def refuse(recipe, data, verify, devices):
        raise UserError(f"{devices} devices")

    monkeypatch.setattr(run_command, "refuse_early", refuse)
    for world in (1, 6):
        with pytest.raises(UserError, match=f"^{world} devices"):
            run_command.lead(load_recipe("wrn-asam"), None, Place(world=world), None, data=None, out=None, resume=None,
                             verify=False, stop_after=None, quiet=True, check_nan=False, profile=None)  # fmt: skip


def test_usual_models_are_not_estimated():
    from fastcifar.config import shipped_recipes
    from fastcifar.models import memory

    recipes = [r for r in map(load_recipe, shipped_recipes()) if not hasattr(r, "combine")]
    assert not any(memory.is_large(recipe) for recipe in recipes)


def test_the_ladder_has_every_training_row():
    table = plan.ladder_table("no such card", {})
    assert len(table["rows"]) == 32
    assert table["measured_rows"] == 0
    assert all(row["total_s"] is None for row in table["rows"])


def test_a_combination_names_its_members():
    assert "wrn-200" in " ".join(plan.lines(plan.combination(load_recipe("stacking"))))


def test_recipe_and_ladder_exclude_each_other():
    for words in ({"recipe": None, "ladder": False}, {"recipe": "lenet5", "ladder": True}):
        with pytest.raises(UserError, match="not both"):
            plan.plan(**words)


def test_json_is_one_object(tmp_path):
    done = fastcifar("plan", "--ladder", "--gpu", "h200", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hardware"] == "h200"


def test_hardware_of_which_nothing_is_known_is_refused_with_what_there_is(tmp_path):
    done = fastcifar("plan", "lenet5", "--gpu", "a100", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "--gpu a100: nothing is known of this hardware" in done.stderr
    assert "data sheets: h100, h200; measured: amd-epyc-2-cores" in done.stderr


@pytest.mark.parametrize("name", ["", " ", "2026", "launches"])
def test_names_that_only_files_bear_are_no_hardware(name):
    with pytest.raises(UserError, match="nothing is known of this hardware"):
        plan.measured(name)


def test_hardware_with_results_or_a_data_sheet_is_known(tmp_path, monkeypatch):
    from fastcifar import locations

    (tmp_path / "2026-01-31-new-card.json").write_text('{"benchmarks": []}')
    monkeypatch.setattr(locations, "results_folders", lambda: [tmp_path])
    assert plan.measured("NEW") == ("NEW", {})
    assert plan.measured("NVIDIA-H100-80GB") == ("NVIDIA-H100-80GB", {})
    assert plan.measured(None)[1] == {}  # this machine's, measured or not
    with pytest.raises(UserError, match=r'did you mean "new-card"\?.*measured: new-card;'):
        plan.measured("new-cart")


def test_a_card_with_a_data_sheet_gets_a_prediction_that_says_what_it_is(monkeypatch):
    recipe = load_recipe("lenet5")
    found = plan.describe(recipe, None, "h200", {})
    assert found["predicted"]["basis"] == "ledger"
    assert found["predicted"]["assumptions"]["card"]["gbs"] == 4800
    text = "\n".join(plan.lines(found))
    assert "H200 SXM (predicted, never measured)" in text
    assert "data sheet" in text
    assert plan.describe(recipe, None, "x", {})["predicted"] is None


def test_a_prediction_without_launches_says_that_it_is_a_floor():
    text = "\n".join(plan.lines(plan.describe(load_recipe("deep"), None, "h200", {})))
    assert "epoch    at least " in text


def test_the_ladder_marks_what_is_only_a_floor(monkeypatch):
    from fastcifar.models import gpu_prediction
    from fastcifar.models.cost import Cost, Operation

    cost = Cost(1, [Operation("convolution", 1, 1)])
    monkeypatch.setattr(gpu_prediction, "known_cost", lambda config: cost)
    table = plan.ladder_table("h100", {})
    bases = {row["recipe"]: row["basis"] for row in table["rows"]}
    assert bases["lenet5"] == bases["wrn-200"] == "ledger"
    assert bases["deep"] == "floor"
    assert "never measured" in plan.ladder_view(table).caption
