"""A package of somebody else's, as a user writes one, and a folder to work in beside it."""

import sys
from pathlib import Path

import pytest

SOURCES = {
    "__init__.py": "",
    "nets.py": '''
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 5, stride=4), nn.BatchNorm2d(width)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


class Tied(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes, width=num_classes)
        self.again = nn.Linear(num_classes, num_classes)
        self.again.weight = self.head.weight

    def forward(self, x):
        return self.again(super().forward(x))


class Masked(Net):
    def __init__(self, num_classes, persistent=True):
        super().__init__(num_classes)
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1), persistent=persistent)


class Flat(nn.Module):
    def __init__(self, num_classes, image_px):
        super().__init__()
        self.head = nn.Linear(3 * image_px**2, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1))


class Frozen(Net):
    def learning_epochs(self):
        from fastcifar.models.hooks import Learning

        return {"haed.bias": Learning(1, fade=False)}


def thousand(**options):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))


def double(num_classes):
    return Net(num_classes).double()


def broken(num_classes):
    raise RuntimeError("no such thing")


number = 3
''',
    "opt.py": '''
import torch


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "steps": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] += 1
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["average"], state["count"], state["spare"] = torch.zeros_like(p), 0, None
                state["count"] += 1
                p.mul_(1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] / state["count"] ** 0.1
                p.sub_(torch.sign(state["average"].lerp(p.grad, 1 - first)) * rate)
                state["average"].lerp_(p.grad, 1 - second)


class Plain(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)


class ScheduleFree(torch.optim.SGD):
    def train(self):
        pass

    def eval(self):
        pass


class NotOne:
    pass
''',
    "ops.py": '''
import torch


class Grid:
    """Black lines at a random distance from the edge, on half of the samples."""

    def __init__(self, step=8, p=0.5):
        self.step, self.p = step, p

    def augment(self, images, draws):
        on = draws.uniform(1)[:, 0] < self.p
        first = draws.integers(self.step, first=1)
        columns = torch.arange(images.shape[3], device=images.device)
        lines = (columns % self.step == first) & on[:, None]
        return images.masked_fill(lines[:, None, None, :], 0)


class Nothing:
    def augment(self, images, draws):
        return images


class Float:
    def augment(self, images, draws):
        return images / 255


class Shadow:
    def __init__(self, by=2):
        self.by = by

    def __call__(self, image):
        return image.point(lambda value: value // self.by)


class TensorShadow:
    takes = "tensor"

    def __call__(self, image):
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        return image // 2


def only_black(image):
    if image.getbbox():
        raise ValueError("too bright")
    return image


def grey(image):
    return image.convert("L")


def mirror(image):
    return image.transpose(0)
''',
    "bad.py": "import a_package_that_is_not_there\n",
    "raises.py": "raise ValueError('on import')\n",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory):
    """The working directory, with the package ``theirs`` in it, importable as where a command is typed."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "theirs").mkdir()
    for name, text in SOURCES.items():
        (folder / "theirs" / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        yield folder
    forget("theirs")


def forget(package: str) -> None:
    """Let the next import read the files again."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return name
