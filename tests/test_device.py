"""What ``engine.precision = "auto"`` means, and that a run keeps it."""

import pytest
import torch

from fastcifar.config import load_recipe
from fastcifar.config.schema import Recipe
from fastcifar.device import auto_precision, with_precision
from fastcifar.errors import UserError
from fastcifar.open_run import environment_of

CPU = torch.device("cpu")


def bf16_cpu(monkeypatch, avx512: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


def recipe(*settings: str) -> Recipe:
    loaded = load_recipe("lenet5", ["engine.device=cpu", *settings])
    assert isinstance(loaded, Recipe)
    return loaded


def test_a_cpu_trains_in_bf16_only_where_it_has_instructions_for_it(monkeypatch):
    for avx512, amx, expected in ((False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")):
        bf16_cpu(monkeypatch, avx512, amx)
        assert auto_precision(CPU) == expected
        assert with_precision(recipe(), CPU).engine.precision == expected
        assert environment_of(recipe())["precision"] == expected


def test_a_gpu_without_bf16_trains_in_fp32(monkeypatch):
    for native, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, native=native: (
            native or including_emulation
        ))
        assert auto_precision(torch.device("cuda")) == expected


def test_a_precision_that_is_said_stays(monkeypatch):
    bf16_cpu(monkeypatch, True, True)
    said = recipe("engine.precision=fp32")
    assert with_precision(said, CPU) is said
    assert "precision" not in environment_of(said)


def test_a_run_goes_on_in_the_precision_that_it_began_with(monkeypatch):
    """A checkpoint may come from a machine with other instructions."""
    bf16_cpu(monkeypatch, False, False)
    assert with_precision(recipe(), CPU, begun="bf16").engine.precision == "bf16"


def test_a_working_copy_is_refused_where_nothing_has_16_bits(monkeypatch):
    bf16_cpu(monkeypatch, False, False)
    with pytest.raises(UserError, match=r"engine\.working_copy: cpu has no instructions for bf16"):
        with_precision(recipe("engine.working_copy=true"), CPU)
