"""ASAM and an exponential moving average on any module and any torch optimizer: `python examples/sam_and_ema.py`."""

import torch
from torch import nn
from torch.nn import functional as F

import fastcifar

loader = fastcifar.Loader("synthetic", augment=["crop(2)"], batch_size=100, device="cpu")
model = nn.Sequential(
    nn.Conv2d(3, 16, 5, stride=3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1600, 10)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
asam = fastcifar.optim.ASAM(model, optimizer, rho=0.5)
ema = fastcifar.optim.EMA(model, decay=0.9)

for epoch in range(2):
    for images, labels in loader:
        loss = asam.step(lambda: F.cross_entropy(model(images), labels))  # noqa: B023  called at once
        ema.update()
    print(f"epoch {epoch + 1}: loss {float(loss):.3f}")

test = fastcifar.Loader("synthetic", split="test", device="cpu")
with ema.applied(), torch.no_grad():
    model.eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test)
print(f"averaged weights: {100 * right / test.samples:.2f}% of the test set")
