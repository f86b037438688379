"""The GPU kernel compiled for sm_90, and on a device; test_interpreted.py runs it in Triton's interpreter."""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastcifar.augment.augment import build_augment, check_shared_memory
from fastcifar.config.operations import parse_op
from fastcifar.config.schema import AugmentConfig
from fastcifar.data.batch import Batch
from fastcifar.errors import UserError
from fastcifar.kernels.augment import triton as gpu
from fastcifar.kernels.augment.decisions import build_program

AUTOAUGMENT = ["crop(4)", "flip", "autoaugment", "cutout(16, p=0.5)"]


@pytest.mark.parametrize(
    ("ops", "lead"),
    [
        (["crop(4)", "flip", "rotate(15)"], 3),
        (["flip", "crop(4)", "rotate(15)", "flip"], 3),
        (["crop(4)", "crop(4)"], 1),
        (AUTOAUGMENT, 2),
        (["cutout(8)", "crop(4)"], 0),
        (["trivialaugment"], 0),
        ([], 0),
    ],
)
def test_what_is_folded_into_the_reading(ops, lead):
    assert gpu.leading_slots(build_program([parse_op(op) for op in ops], 32, 32)) == lead


def test_images_that_shared_memory_cannot_hold_are_refused(monkeypatch):
    """Only where something is left to do after the reading: a GPU's launch would fail in the first step."""
    device, h100 = torch.device("cuda"), SimpleNamespace(shared_memory_per_block_optin=232_448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)

    def wanted(ops, side_px):
        tables = gpu.Tables(build_program([parse_op(op) for op in ops], side_px, side_px), 0, torch.device("cpu"))
        return gpu.shared_bytes(tables, side_px, side_px)

    for ops, side_px in ((AUTOAUGMENT, 181), (["crop(4)", "flip"], 224)):
        check_shared_memory(wanted(ops, side_px), (side_px, side_px, 3), device)
    with pytest.raises(UserError, match=r"augment: images of 182x182 pixels take 262,144 bytes .*, which has 232,448"):
        check_shared_memory(wanted(AUTOAUGMENT, 182), (182, 182, 3), device)
    check_shared_memory(wanted(AUTOAUGMENT, 182), (182, 182, 3), torch.device("cpu"))


def compiled():
    """Compile the AutoAugment kernel for sm_90, with no device."""
    types = ["*u8", "*i64", "*i64", "*i64", "*i64", "*i32", "*i32", "*fp64", "*bf16", "*bf16"]
    names = gpu.augment_kernel.arg_names
    constants = {"SLOTS": 5, "LEAD": 2, "H": 32, "W": 32, "BLOCK": 1024}
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    source = ASTSource(fn=gpu.augment_kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": gpu.WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def test_the_sm_90_kernel_spills_nothing_and_rounds_as_written(tmp_path, capsys):
    kernel = compiled()
    program = build_program([parse_op(op) for op in AUTOAUGMENT], 32, 32)
    assert kernel.metadata.shared == gpu.shared_bytes(gpu.Tables(program, 0, torch.device("cpu")), 32, 32)
    assert not re.search(r"\bfma\.", kernel.asm["ptx"])  # it would round a blend once instead of twice
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    dump = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    dump = dump[dump.index("augment_kernel") :]
    registers, stack, local = (int(re.search(rf"{k}:(\d+)", dump)[1]) for k in ("REG", "STACK", "LOCAL"))
    with capsys.disabled():
        print(f"\nsm_90 augment_kernel: {registers} registers, {stack + local} bytes spilled, ", end="")
        print(f"{kernel.metadata.shared} bytes of shared memory, {kernel.metadata.num_warps} warps")
    assert stack == local == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "ops",
    [
        ["crop(4)", "flip", "rotate(15)"],
        AUTOAUGMENT,
        ["trivialaugment", "randaugment(2, 9)"],
        ["crop(2, pad='reflect')", "flip(alternate=true)", "cutout(12, fill='mean', inside=true)"],
    ],
    ids=" ".join,
)
def test_the_device_equals_the_cpu(ops, dtype):
    images = torch.randint(0, 256, (4096, 32, 32, 3), dtype=torch.uint8)
    images[::3] //= 7
    rows, index = torch.randperm(4096), torch.arange(4096) + 7
    options = {"mean": [0.5] * 3, "std": [0.25] * 3, "image_shape": (32, 32, 3), "seed": 42, "dtype": dtype}
    here, there = (build_augment(AugmentConfig(ops=ops), device=torch.device(d), **options) for d in ("cpu", "cuda"))
    moved = Batch(images.cuda(), rows.cuda(), index.cuda(), index.cuda())
    got = there(moved, torch.tensor([3], device="cuda"))
    assert torch.equal(got.cpu(), here(Batch(images, rows, index, index), 3))
    decisions = gpu.decide_on_device(index.cuda(), torch.tensor([3], device="cuda"), there._tables)
    assert torch.equal(decisions.cpu(), torch.from_numpy(here.decisions(index.numpy(), 3)))
