"""ShakeDrop: its factors, their statistics, its two directions, and that nothing waits for the host."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from fastcifar.config.schema import PyramidNetConfig, WideResNetConfig
from fastcifar.kernels.philox import Stream, philox
from fastcifar.models import bind_counter, build_model
from fastcifar.models.shakedrop import Gate, Shake, ShakeDraws, ShakeDrop, death_rates

PYRAMID = PyramidNetConfig(name="pyramidnet", depth=8, alpha=4, shakedrop=0.5)
WRN = WideResNetConfig(name="wide_resnet", depth=10, widen=1, dropout=0.0, shakedrop=0.5)
BLOCKS = 6
Z = 5.0
"""Statistical tests accept five standard errors: a right implementation fails one comparison in 1.7 million."""


def draws(gate: Gate, seed: int = 3, last: float = 0.5) -> tuple[ShakeDraws, Tensor]:
    module, counter = ShakeDraws(death_rates(last, BLOCKS), gate), torch.zeros(1, dtype=torch.int64)
    bind_counter(module, counter, seed)
    return module, counter


def many(gate: Gate, passes: int, batch: int) -> Tensor:
    """Return the factors of many forward passes: float32 (passes, L, 2, B)."""
    module, counter = draws(gate)
    return torch.stack([module(batch) for _ in range(passes) if counter.add_(1) is not None])


def test_death_rates_follow_the_linear_schedule():
    assert death_rates(0.5, 5) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    rates = [m.death_rate for m in build_model(PYRAMID, seed=1).modules() if isinstance(m, ShakeDrop)]
    assert rates == pytest.approx([1 / 6, 2 / 6, 3 / 6])


@pytest.mark.parametrize(("gate", "passes", "batch"), [("batch", 1500, 2), ("sample", 2, 5000)])
def test_gates_follow_the_linear_schedule(gate: Gate, passes: int, batch: int):
    alive = (many(gate, passes, batch) == 1).all(2)
    if gate == "batch":
        assert torch.equal(alive, alive[..., :1].expand_as(alive))
        alive = alive[..., :1]
    alive = alive.transpose(0, 1).reshape(BLOCKS, -1)
    for row, rate in zip(alive, death_rates(0.5, BLOCKS), strict=True):
        error = (rate * (1 - rate) / row.numel()) ** 0.5
        assert abs(row.double().mean() - (1 - rate)) < Z * error


def test_factors_are_uniform_and_independent():
    scales = many("sample", 2, 5000).transpose(0, 1)
    for row in scales:
        alpha, beta = row[:, 0].flatten(), row[:, 1].flatten()
        dead = alpha != 1
        alpha, beta = alpha[dead].numpy(), beta[dead].numpy()
        assert stats.kstest(alpha, "uniform", args=(-1, 2)).pvalue > 1e-6
        assert stats.kstest(beta, "uniform", args=(0, 1)).pvalue > 1e-6
        assert abs(stats.pearsonr(alpha, beta).statistic) < Z / len(alpha) ** 0.5


@pytest.mark.parametrize(("gate", "passes", "batch"), [("batch", 1500, 2), ("sample", 2, 5000)])
def test_the_expectation_in_training_is_the_scale_in_evaluation(gate: Gate, passes: int, batch: int):
    scales = many(gate, passes, batch)
    for i, rate in enumerate(death_rates(0.5, BLOCKS)):
        drop = ShakeDrop(rate)
        x = torch.ones(batch, 1, 1, 1, dtype=torch.float64)
        outputs = torch.stack([drop.train()(x, each[i]) for each in scales])
        # Samples of one batch share their gate: the batch mean is the independent unit.
        units = outputs.mean(1) if gate == "batch" else outputs
        error = units.std() / units.numel() ** 0.5
        assert abs(units.mean() - drop.eval()(x, None)[0]) < Z * error
        assert drop(x, None)[0].item() == pytest.approx(1 - rate)


def test_backward_uses_beta_not_alpha():
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    alpha, beta = torch.tensor([-0.7, 0.2, 1.0, 0.9]), torch.tensor([0.3, 0.8, 1.0, 0.1])
    y = Shake.apply(x, alpha, beta)
    incoming = torch.randn_like(y)
    y.backward(incoming)
    torch.testing.assert_close(y.detach(), x.detach() * alpha.double().view(4, 1, 1, 1))
    torch.testing.assert_close(x.grad, incoming * beta.double().view(4, 1, 1, 1))


def test_draws_are_the_stated_words_of_philox():
    module, counter = draws("batch", seed=2**40 + 5)
    counter.fill_(77)
    scales = module(9)
    for i, rate in enumerate(death_rates(0.5, BLOCKS)):
        alpha, beta, _, gate = philox(2**40 + 5, torch.arange(9), 77, i, Stream.SHAKEDROP)
        if gate[0] / 2**32 >= rate:
            assert torch.equal(scales[i], torch.ones(2, 9))
        else:
            torch.testing.assert_close(scales[i, 0].double(), alpha.double() / 2**31 - 1, rtol=0, atol=2e-7)
            torch.testing.assert_close(scales[i, 1].double(), beta.double() / 2**32, rtol=0, atol=2e-7)


def test_draws_depend_on_the_counter_and_the_seed_alone():
    (a, count_a), (b, count_b), (c, _) = draws("sample"), draws("sample"), draws("sample", seed=4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = a(8)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(first, b(8))
    assert not torch.equal(first, c(8))
    count_a.add_(1)
    assert not torch.equal(first, a(8))
    count_b.add_(1)
    assert torch.equal(a(8)[:, :, :5], b(5))


def test_without_a_counter_training_is_refused_and_evaluation_is_not():
    model = build_model(PYRAMID, seed=1)
    with pytest.raises(RuntimeError, match="bind_counter"):
        model(torch.zeros(2, 3, 32, 32))
    model.eval()(torch.zeros(2, 3, 32, 32))


def test_no_state_of_its_own_and_none_to_move():
    plain = build_model(PYRAMID.model_copy(update={"shakedrop": 0.0}), seed=1)
    model = build_model(PYRAMID, seed=1)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())


def bound(config, dtype: torch.dtype = torch.float64):
    model, counter = build_model(config, seed=2).to(dtype), torch.zeros(1, dtype=torch.int64)
    bind_counter(model, counter, seed=9)
    return model, counter


@pytest.mark.parametrize("config", [PYRAMID, WRN], ids=lambda config: config.name)
def test_both_directions_inside_a_network(config):
    """The same network with ShakeDrop written as a sum of a scaled and a detached term, in float64."""
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    (ours, count), (reference, count_reference) = bound(config), bound(config)
    for module in reference.modules():
        if isinstance(module, ShakeDrop):
            module.forward = two_terms
    for _ in range(3):
        count.add_(1), count_reference.add_(1)
        y, expected = ours(x), reference(x)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward(), expected.square().sum().backward()
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-8)


def two_terms(branch: Tensor, scales: Tensor) -> Tensor:
    alpha, beta = scales.double()[:, :, None, None, None]
    return beta * branch + ((alpha - beta) * branch).detach()


@pytest.mark.parametrize("gate", ["batch", "sample"])
def test_nothing_waits_for_the_host(gate: Gate):
    """On the meta device there are no values: reading one, or branching on one, raises."""
    model = build_model(PYRAMID.model_copy(update={"shakedrop_gate": gate}), seed=2).to("meta")
    counter = torch.zeros(1, dtype=torch.int64, device="meta")
    bind_counter(model, counter, seed=9)
    counter.add_(1)
    model(torch.zeros(4, 3, 32, 32, device="meta")).sum().backward()


def test_autocast_keeps_bf16_and_channels_last():
    model, counter = bound(PYRAMID, torch.float32)
    seen = []
    for module in model.modules():
        if isinstance(module, ShakeDrop):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    counter.add_(1)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)).sum().backward()
    assert [y.dtype for y in seen] == [torch.bfloat16] * 3
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)
    assert all(p.grad.isfinite().all() for p in model.parameters())


# torch 2.11's compiler itself makes an instance of autograd.Function for each that it traces.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_one_compiled_graph_for_every_gate():
    """Forward passes with other gates reuse the one graph, and agree with eager in values and gradients."""
    from torch._dynamo.testing import CompileCounterWithBackend

    aligned = PYRAMID.model_copy(update={"align": 8})
    (eager, count), (model, count_compiled) = bound(aligned), bound(aligned)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    kept = set()
    for _ in range(6):
        count.add_(1), count_compiled.add_(1)
        y, expected = compiled(x), eager(x)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward(), expected.square().sum().backward()
        kept.add(tuple((eager.draws(3)[:, 0, 0] == 1).tolist()))
    assert len(kept) > 1
    assert backend.frame_count == 1
    for a, b in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.gpu
def test_a_captured_graph_draws_new_gates_at_each_replay():
    model, counter = build_model(PYRAMID, seed=2).cuda(), torch.zeros(1, dtype=torch.int64, device="cuda")
    bind_counter(model, counter, seed=9)
    x = torch.randn(4, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)

    def forward_backward() -> Tensor:
        counter.add_(1)
        loss = model(x).square().sum()
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = forward_backward()
    captured = []
    for _ in range(8):
        graph.replay()
        captured.append(loss.item())
    counter.fill_(1)
    eager = [forward_backward().item() for _ in range(8)]
    assert len(set(captured)) > 1
    assert captured == pytest.approx(eager, rel=1e-3)
