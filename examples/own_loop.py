"""fastcifar's loader and augmentations in a training loop of one's own: `python examples/own_loop.py [cifar10]`."""

import sys

import torch
from torch import nn
from torch.nn import functional as F

import fastcifar

source = sys.argv[1] if len(sys.argv) > 1 else "synthetic"
train = fastcifar.Loader(source, augment=["crop(4)", "flip", "autoaugment"], batch_size=128, seed=1)
test = fastcifar.Loader(source, split="test", batch_size=1000)

device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(
    nn.Conv2d(3, 32, 5, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
    nn.Linear(512, len(train.classes)),
).to(device)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

for epoch in range(2):
    model.train()
    for images, labels in train:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test)
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test {100 * right / test.samples:.2f}%")
