"""ShakeDrop's draws as an operator: what torch asks of one, and the kernel on sm_90. Values: test_interpreted.py."""

import pytest
import torch

from fastcifar.kernels.shakedrop import draw_scales, reference, triton
from tests.kernels.sm90 import compile_for_sm90, resources

ARGUMENTS = (torch.tensor([2**22, 2**23]), torch.tensor([5]), torch.tensor([42]), 6, False)


def test_it_is_a_proper_operator() -> None:
    torch.library.opcheck(draw_scales, ARGUMENTS, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(draw_scales(*ARGUMENTS), reference.scales(*ARGUMENTS[:2], 42, *ARGUMENTS[3:]))


def test_dynamo_sees_one_node() -> None:
    """Inductor fails to compile Philox's constants on CUDA; an opaque operator never reaches it."""
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compiler.reset()
    torch.compile(lambda *a: draw_scales(*a), backend=backend, fullgraph=True)(*ARGUMENTS)
    assert [str(target) for target in seen] == ["fastcifar.draw_shakedrop_scales.default"]


@pytest.mark.parametrize("per_sample", [True, False])
def test_compiles_for_sm90_without_spills(per_sample: bool) -> None:
    types = {"out": "*fp32", "thresholds": "*i64", "counter": "*i64", "seed_at": "*i64"}
    constants = {"PER_SAMPLE": per_sample, "SAMPLES": triton.SAMPLES}
    used = resources(compile_for_sm90(triton.scales_kernel, constants, types, 4))
    assert used["LOCAL"] == used["STACK"] == 0


@pytest.mark.gpu
def test_the_gpu_draws_the_same_bits() -> None:
    thresholds, counter = torch.randint(0, 2**24, (54,)), torch.randint(0, 2**32, (1,))
    given = thresholds, counter, torch.tensor([2**62 + 7])
    for per_sample in (True, False):
        found = draw_scales(*(t.cuda() for t in given), 130, per_sample).cpu()
        assert torch.equal(found, draw_scales(*given, 130, per_sample))
