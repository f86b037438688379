"""Run by test_interpreted.py with TRITON_INTERPRET=1: all kernels in Triton's interpreter, in one process.

One, because importing Triton takes longer than most of the kernels.
"""

import traceback
import warnings
from collections.abc import Callable

import torch
from triton.runtime import interpreter

from tests.kernels import interpreted_flat, interpreted_philox
from tests.kernels.augment import interpreted as augment
from tests.kernels.batch_norm import interpreted as batch_norm

Found = list[tuple[str, float, float]]
SUITES: dict[str, Callable[[], Found]] = {
    "philox": interpreted_philox.main,
    "augment": augment.main,
    "flat": interpreted_flat.main,
    "batch_norm": batch_norm.main,
}


def patch_once() -> None:
    """Let the interpreter patch Triton's language at the first call from each module and leave it so.

    It would do so anew at every launch and at every call of a function within a kernel, which takes a quarter of the
    time; nothing but the interpreter uses the language here.
    """
    patch, patched = interpreter._patch_lang, set()

    def first(fn: Callable) -> interpreter._LangPatchScope:
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            patch(fn)
        return interpreter._LangPatchScope()  # nothing to take back

    interpreter._patch_lang = first


def main(seed: int) -> dict[str, Found | str]:
    """Return for each suite a list of (what, error, the error allowed), or the traceback that ended it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    patch_once()
    told: dict[str, Found | str] = {}
    for name, suite in SUITES.items():
        torch.manual_seed(seed)
        try:
            told[name] = suite()
        except Exception:
            told[name] = traceback.format_exc()
    return told
