"""ASAM + SGD + EMA on one model's parameters: the flat parameters' three operations against what torch offers.

Sides: a Python loop over tensors (as public SAM implementations do it), ``torch._foreach_*``, and
``torch.optim.SGD(fused=True)`` with a foreach ascent step and average. Bytes are counted, not estimated: by operator
for everything made of torch calls, by buffer for the Triton kernels. On a GPU every side is also captured as a CUDA
graph, so that launch overhead is out of the comparison, and the share of the measured copy bandwidth is given.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import Row, alternate, device, main, result, timed
from fastcifar.config.schema import EmaConfig, Recipe, SGDConfig
from fastcifar.kernels.sam import Ascent, ascend, norm_squared
from fastcifar.models import build_model
from fastcifar.train.ema import build_averages
from fastcifar.train.flat_parameters import FlatParameters
from fastcifar.train.optimizers import build_optimizer

RHO, LR, MOMENTUM, WEIGHT_DECAY, DECAY = 2.0, 0.1, 0.9, 5e-4, 0.999
SAMPLE_S = 0.05  # the least time that one measure on a GPU takes
# Twice collecting the gradient: reads and writes g; norm: reads w, g; ascent: reads w, g, writes w, saved; step: reads
# saved, g, v, a, writes w, v, a.
LEAST_BYTES = 4 * (4 + 2 + 4 + 7)


class CountBytes(TorchDispatchMode):
    """Adds up the bytes that each operator reads and writes; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.calls = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return out
        self.calls += 1
        self.bytes += _written(func, args, kwargs or {}) + _bytes(args[_skipped(func) :])
        if not any(r.alias_info is not None for r in returns):
            self.bytes += _bytes(out)
        return out


def _bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _written(func: Any, args: Any, kwargs: Any) -> int:
    """Return the bytes of the arguments that the operator changes in place."""
    named = list(zip(func._schema.arguments, args, strict=False))
    named += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
    return sum(_bytes(value) for a, value in named if a.alias_info is not None and a.alias_info.is_write)


def _skipped(func: Any) -> int:
    """Return 1 where the first argument is only written, not read."""
    return int(func._schema.name.split("::")[1] in ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_"))


class Side:
    """One way to take the SAM ascent step and the optimizer step, by gradients that `refill` puts in place."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.stats = [b for b in model.buffers() if b.is_floating_point()]
        self.averages = [t.detach().clone() for t in [*self.parameters, *self.stats]]
        for p in self.parameters:
            p.grad = torch.zeros_like(p)

    def refill(self) -> None:
        """Put gradients in place."""
        for p in self.parameters:
            p.grad.fill_(0.01)  # type: ignore[union-attr]

    def __call__(self) -> None:
        """Do both."""
        with torch.no_grad():
            self.ascend()
            self.optimizer_step()

    def ascend(self) -> None:
        """Save w, go to w + e, clear the gradient."""
        raise NotImplementedError

    def optimizer_step(self) -> None:
        """Go back to w, update, average, clear the gradient."""
        raise NotImplementedError


class FlatSide(Side):
    """fastcifar's; collecting the gradients into the flat buffer is part of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.flat = FlatParameters(model)
        averages = build_averages(self.flat, EmaConfig(decay=DECAY))
        self.ascent = Ascent(RHO, True, 0.0, self.flat.weights.numel())
        self.saved = torch.zeros_like(self.flat.weights)
        config = SGDConfig(name="sgd", lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        self.optimizer = build_optimizer(config, self.flat, averages)
        on_gpu = self.flat.weights.is_cuda
        self.lr: Any = torch.full((1,), LR, device=self.flat.weights.device) if on_gpu else LR
        self.first = [torch.full_like(p, 0.01) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]  # the other sides clear theirs in between

    def refill(self) -> None:
        """Do nothing: each pass brings gradients of its own."""

    def backward(self, grads: list[Tensor]) -> None:
        """Put gradients in place as autograd does, which assigns: a parameter without one would be zeroed by itself."""
        for p, grad in zip(self.parameters, grads, strict=True):
            p.grad = grad

    def ascend(self) -> None:
        """Save w, go to w + e."""
        flat = self.flat
        self.backward(self.first)
        flat.collect_gradients()
        partials = norm_squared(flat.weights, flat.grads, self.ascent)
        ascend(flat.weights, flat.grads, self.saved, partials, self.ascent)

    def optimizer_step(self) -> None:
        """Go back to w, update, average."""
        self.backward(self.second)
        self.flat.collect_gradients()
        self.optimizer.step(self.lr, saved=self.saved)


class LoopSide(Side):
    """A Python loop over tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.saved = [torch.empty_like(p) for p in self.parameters]
        self.momenta = [torch.zeros_like(p) for p in self.parameters]

    def ascend(self) -> None:
        """Save w, go to w + e, clear the gradient."""
        norms = [(p.abs() * p.grad).norm() for p in self.parameters]
        factor = RHO / (torch.stack(norms).norm() + 1e-12)
        for p, saved in zip(self.parameters, self.saved, strict=True):
            saved.copy_(p)
            p.add_(p * p * p.grad * factor)
            p.grad.zero_()  # type: ignore[union-attr]

    def optimizer_step(self) -> None:
        """Go back to w, update, average, clear the gradient."""
        for p, saved, v in zip(self.parameters, self.saved, self.momenta, strict=True):
            p.copy_(saved)
            g = p.grad.add(p, alpha=WEIGHT_DECAY)  # type: ignore[union-attr]
            v.mul_(MOMENTUM).add_(g)
            p.add_(g.add(v, alpha=MOMENTUM), alpha=-LR)
            p.grad.zero_()  # type: ignore[union-attr]
        for average, value in zip(self.averages, [*self.parameters, *self.stats], strict=True):
            average.lerp_(value, 1 - DECAY)


class ForeachSide(Side):
    """``torch._foreach_*`` for the ascent step and the average; torch.optim.SGD, foreach or fused, for the update."""

    def __init__(self, model: nn.Module, fused: bool) -> None:
        super().__init__(model)
        self.saved = [torch.empty_like(p) for p in self.parameters]
        how = {"fused": True} if fused else {"foreach": True}
        settings: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "nesterov": True, "weight_decay": WEIGHT_DECAY}
        self.optimizer = torch.optim.SGD(self.parameters, **settings, **how)

    def ascend(self) -> None:
        """Save w, go to w + e, clear the gradient."""
        grads = [p.grad for p in self.parameters]
        scaled = torch._foreach_abs(self.parameters)
        torch._foreach_mul_(scaled, grads)
        factor = RHO / (torch.stack(torch._foreach_norm(scaled)).norm() + 1e-12)
        torch._foreach_copy_(self.saved, self.parameters)
        torch._foreach_mul_(grads, self.parameters)
        torch._foreach_mul_(grads, self.parameters)
        torch._foreach_mul_(grads, factor)
        torch._foreach_add_(self.parameters, grads)
        torch._foreach_zero_(grads)

    def optimizer_step(self) -> None:
        """Go back to w, update, average, clear the gradient."""
        torch._foreach_copy_(self.parameters, self.saved)
        self.optimizer.step()
        torch._foreach_lerp_(self.averages, [*self.parameters, *self.stats], 1 - DECAY)
        torch._foreach_zero_([p.grad for p in self.parameters])


SIDES: dict[str, Callable[[nn.Module], Side]] = {
    "flat": FlatSide,
    "loop": LoopSide,
    "foreach": lambda model: ForeachSide(model, fused=False),
    "fused SGD": lambda model: ForeachSide(model, fused=True),
}


def make_sides(name: str, where: torch.device) -> dict[str, Side]:
    table = {"name": "t", "model": {"name": name}, "optimizer": {"name": "sgd", "lr": LR}, "train": {"epochs": 1}}
    config = Recipe.model_validate(table).model
    return {side: make(build_model(config, seed=0).to(where)) for side, make in SIDES.items()}


def check(sides: dict[str, Side]) -> None:
    """Make sure that all sides do the same thing before they are timed."""
    for side in sides.values():
        side.refill()
        side()
    ours = [p.detach().clone() for p in sides["flat"].parameters]
    for name, side in sides.items():
        for a, b in zip(ours, side.parameters, strict=True):
            if not torch.allclose(a, b, rtol=1e-4, atol=1e-6):
                raise RuntimeError(f"{name} computes something else than the flat parameters")


def graphed(side: Side) -> Callable[[], None]:
    """Capture one call of a side as a CUDA graph and return its replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            side()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side()
    return graph.replay


def measure(work: Callable[[], None], side: Side, where: torch.device, repeats: int) -> float:
    """Return milliseconds a call: on a GPU the mean of many in a row, elsewhere the median of single ones.

    One call takes a GPU down to 0.2 ms, too short for a pair of events; what lies in the gradients does not change it.
    On a CPU, refilling the gradients is not counted.
    """
    if where.type == "cuda":
        repeats = max(1, round(SAMPLE_S / max(timed(work, where), 1e-6)))
        return 1e3 * timed(lambda: [work() for _ in range(repeats)], where) / repeats
    times = []
    for _ in range(repeats):
        side.refill()
        times.append(timed(work, where))
    return 1e3 * statistics.median(times)


def bytes_of(side: Side, parameters: int, statistics: int) -> tuple[int, int]:
    """Return the bytes that one call moves, and its number of operators or kernels."""
    if isinstance(side, FlatSide) and side.flat.weights.is_cuda:
        return LEAST_BYTES * parameters + 12 * statistics, 5  # two gatherings, norm, ascent, optimizer step
    with CountBytes() as count:
        side()
    return count.bytes, count.calls


def copy_bandwidth(where: torch.device, megabytes: int) -> float:
    """Return the bytes a second of a plain copy, reads and writes added: the median of five."""
    source = torch.ones(megabytes * 2**18, device=where)
    target = torch.empty_like(source)
    seconds = sorted(timed(lambda: target.copy_(source), where) for _ in range(6))[2]
    return 2 * source.numel() * 4 / seconds


def rows_for(name: str, where: torch.device, rounds: int, repeats: int) -> list[Row]:
    sides = make_sides(name, where)
    check(sides)
    n, m = (sum(t.numel() for t in ts) for ts in (sides["flat"].parameters, sides["flat"].stats))
    works: dict[str, tuple[Callable[[], None], Side]] = {side: (s, s) for side, s in sides.items()}
    if where.type == "cuda":
        works |= {f"{side}, graph": (graphed(s), s) for side, s in sides.items()}
    times = alternate({k: lambda w=w: measure(*w, where, repeats) for k, w in works.items()}, rounds)  # type: ignore
    best = "flat, graph" if where.type == "cuda" else "flat"
    rows = [result(f"{name} ({n:,} parameters): {best}", times[best], "ms")]
    for other in works:
        ours = times["flat, graph" if other.endswith("graph") else "flat"]
        if not other.startswith("flat"):
            label = f"{name}: {'flat, graph' if other.endswith('graph') else 'flat'} against {other}"
            rows.append(result(label, ours, "ms", other, times[other], higher_is_better=False))
    counted = {side: bytes_of(s, n, m) for side, s in sides.items()}
    for side, (moved, calls) in counted.items():
        least = (LEAST_BYTES * n + 12 * m) / 1e6
        label = f"{name}: {side} moves (least {least:,.4g} MB, {calls:,} operators)"
        rows.append(result(label, [moved / 1e6], "MB"))
    if where.type == "cuda":
        speed = copy_bandwidth(where, 1024)
        rows.append(result(f"{name}: copy bandwidth", [speed / 1e9], "GB/s"))
        shares = [100 * counted["flat"][0] / (ms / 1e3) / speed for ms in times[best]]
        rows.append(result(f"{name}: flat's share of copy bandwidth", shares, "%"))
    return rows


def run(quick: bool) -> list[Row]:
    where = device()
    if where.type == "cuda":
        names, repeats = (["wrn16_8"] if quick else ["lenet5", "wrn16_8", "pyramidnet110_a150", "wrn28_10"]), 0
    else:
        names, repeats = (["lenet5"] if quick else ["lenet5", "deep_baseline_bn", "wrn16_8"]), 9
    return [row for name in names for row in rows_for(name, where, 3 if quick else 7, repeats)]


if __name__ == "__main__":
    main("optimizer", run)
