"""Plain float64 transcriptions of what the step does, tensor by tensor, and a small real model to run them on."""

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Net(nn.Module):
    """Convolutions (one of them 1x1), BatchNorm, biases: tensors of sizes that are multiples of nothing.

    SiLU, because it is smooth: where rounding puts an input of ReLU on the other side of zero, its gradient jumps, and
    50 steps later float32 and float64 differ by 1e-3 without any fault (1 of 40 seeds, and others on another CPU).
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 7, 3, bias=False)
        self.norm = nn.BatchNorm2d(7)
        self.second = nn.Conv2d(7, 5, 1)
        self.head = nn.Linear(5 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(self.first(x)))
        return self.head(nn.functional.avg_pool2d(nn.functional.silu(self.second(x)), 2).flatten(1))


def make_net(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net().to(memory_format=torch.channels_last)


def make_data(seed: int, steps: int, batch: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Return float32 batches that a model can learn: (B, 3, 8, 8) with labels (B,)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, 3, 8, 8, generator=generator)
    labels = [torch.randint(0, 10, (batch,), generator=generator) for _ in range(steps)]
    return [(centres[y] + 0.5 * torch.randn(batch, 3, 8, 8, generator=generator), y) for y in labels]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def perturb(model: nn.Module, *, rho: float, adaptive: bool, eta: float, weights_only: bool) -> dict[str, Tensor]:
    """Ascend as the papers write it: one norm over all tensors, e = rho T^2 g / (||T g|| + 1e-12); return the old w."""
    scales = {}
    for name, p in model.named_parameters():
        scaled = adaptive and (not weights_only or name.endswith("weight"))
        scales[name] = p.detach().abs() + eta if scaled else torch.ones_like(p)
    norm = torch.stack([(scales[n] * p.grad).norm() for n, p in model.named_parameters()]).norm()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.data += rho * scales[name] ** 2 * p.grad / (norm + 1e-12)
    return before


def train_reference(
    model: nn.Module, data: list[tuple[Tensor, Tensor]], make_optimizer, sam=None, decay: float | None = None, clip=0.0,
    sam_from: int = 0,
) -> tuple[nn.Module, nn.Module | None]:
    """Train a float64 copy, tensor by tensor, with torch.optim and swa_utils; return it and its average."""
    model = copy.deepcopy(model).double()
    optimizer = make_optimizer(model.parameters())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None
    if average is not None:
        average.n_averaged += 1  # no warm-up: the average starts at the initial weights
    for step, (x, y) in enumerate(data):
        optimizer.zero_grad()
        loss_of(model, x.double(), y).backward()
        if sam is not None and step >= sam_from:
            before = perturb(model, **sam)
            optimizer.zero_grad()
            loss_of(model, x.double(), y).backward()
            for name, p in model.named_parameters():
                p.data = before[name]
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if average is not None:
            average.update_parameters(model)
    return model, average.module if average is not None else None


def error(found: dict[str, Tensor], expected: nn.Module) -> float:
    """Return ||found - expected|| / ||expected|| over all floating-point entries of a state dict."""
    state = {n: t.double() for n, t in expected.state_dict().items() if t.is_floating_point()}
    difference = torch.cat([(found[n].double() - t).flatten() for n, t in state.items()])
    return float(difference.norm() / torch.cat([t.flatten() for t in state.values()]).norm())
