"""The speed network: its whitening layer against sklearn's PCA, and what of it learns."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional as F

from fastcifar.config.schema import SpeedNetConfig
from fastcifar.models import build_model
from fastcifar.models.speednet import EIGENVALUE_FLOOR, BiasBatchNorm2d, SpeedNet

CONFIG = SpeedNetConfig(name="speednet", widths=[16, 16, 16])


def smooth_images(count: int, seed: int = 1) -> Tensor:
    """Return images whose neighbouring pixels and channels resemble each other, as in photographs."""
    noise = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    mixed = torch.einsum("nchw,dc->ndhw", noise, torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, 0.4], [0.1, 0.6, 1.0]]))
    return F.interpolate(mixed, 32, mode="bicubic")


def whitened(images: Tensor) -> SpeedNet:
    model = build_model(CONFIG, seed=1)
    assert isinstance(model, SpeedNet)
    model.fit_images(images)
    return model


def check_against_pca(images: Tensor) -> None:
    layer = whitened(images).whitening
    windows = np.lib.stride_tricks.sliding_window_view(images.double().numpy(), (2, 2), axis=(2, 3))
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    pca = PCA().fit(patches)
    expected = pca.components_ / np.sqrt(pca.explained_variance_ + EIGENVALUE_FLOOR)[:, None]
    ours = layer.weight[:12].reshape(12, 12).double().numpy()[::-1]
    signs = np.sign((ours * expected).sum(1, keepdims=True))
    np.testing.assert_allclose(ours * signs, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(layer.weight[12:], -layer.weight[:12])
    outputs = layer(images.float()).detach()[:, :12].transpose(0, 1).reshape(12, -1)
    shrunk = pca.explained_variance_[::-1] / (pca.explained_variance_[::-1] + EIGENVALUE_FLOOR)
    np.testing.assert_allclose(torch.cov(outputs.double()).numpy(), np.diag(shrunk), atol=5e-3)


def test_whitening_is_pca_of_the_patches():
    check_against_pca(smooth_images(64))


@pytest.mark.real
def test_whitening_is_pca_of_the_patches_of_real_images(real_images: np.ndarray):
    images = torch.from_numpy(real_images[:1000]).permute(0, 3, 1, 2).float() / 127.5 - 1
    check_against_pca(images)


def test_filters_do_not_depend_on_the_sign_that_a_library_returns(monkeypatch: pytest.MonkeyPatch):
    images = smooth_images(16)
    expected, solve = whitened(images).whitening.weight, torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (solve(matrix)[0], -solve(matrix)[1]))
    assert torch.equal(whitened(images).whitening.weight, expected)


def test_only_the_bias_of_the_first_layer_learns_and_only_for_some_epochs():
    model = whitened(smooth_images(16))
    assert [name for name, _ in model.whitening.named_parameters()] == ["bias"]
    for epoch, learns in ((0, True), (CONFIG.whiten_bias_epochs - 1, True), (CONFIG.whiten_bias_epochs, False)):
        model.begin_epoch(epoch)
        model.zero_grad()
        model(smooth_images(4)).square().sum().backward()
        assert bool(model.whitening.bias.grad.any()) is learns
        assert model.head.weight.grad.any()


def test_batch_norm_has_no_scale_to_learn_but_keeps_it_in_its_state():
    norm = BiasBatchNorm2d(4, 0.3)
    assert [name for name, _ in norm.named_parameters()] == ["bias"]
    assert "weight" in norm.state_dict()
    x = torch.randn(8, 4, 3, 3)
    torch.testing.assert_close(norm(x), F.batch_norm(x, None, None, training=True, eps=1e-12))
    torch.testing.assert_close(norm.running_mean, 0.3 * x.mean((0, 2, 3)))


def test_convolutions_start_near_the_identity():
    conv = build_model(CONFIG, seed=1).blocks[1].convs[0]
    x = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(conv(x), x)


def block_by_hand(weights: dict[str, Tensor], x: Tensor, number: int, convs: int) -> Tensor:
    """A block written out from the published description: the sum takes what the second convolution was given."""

    def conv_norm(x: Tensor, layer: int, pool: bool = False) -> Tensor:
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), weights[f"blocks.{number}.convs.{layer}.weight"])
        if pool:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).amax(4)
        centred = x - x.mean((0, 2, 3), keepdim=True)
        bias = weights[f"blocks.{number}.norms.{layer}.bias"][:, None, None]
        return centred / centred.square().mean((0, 2, 3), keepdim=True).sqrt() + bias

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    given = gelu(conv_norm(x, 0, pool=True))
    x = gelu(conv_norm(given, 1))
    return x if convs == 2 else gelu(given + conv_norm(x, 2))


@pytest.mark.parametrize("convs", [2, 3])
def test_the_network_is_the_published_one_written_out(convs: int):
    seed = int(torch.randint(0, 2**31, ()))
    config = SpeedNetConfig(name="speednet", widths=[12, 16, 20], convs_per_block=convs, head_std=1.0, scale=1 / 20)
    model = build_model(config, seed=seed).double()
    images = smooth_images(6, seed).double()
    model.fit_images(images)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    x = F.gelu(F.conv2d(images, weights["whitening.weight"], weights["whitening.bias"]))
    for number in range(3):
        x = block_by_hand(weights, x, number, convs)
    expected = torch.einsum("nc,kc->nk", x.flatten(2).amax(2), weights["head.weight"]) / 20
    torch.testing.assert_close(model(images), expected, msg=lambda text: f"seed {seed}: {text}")


def test_the_head_and_the_first_bias_start_as_told():
    told = CONFIG.model_copy(update={"head_std": 1.0, "whiten_bias_init": "zero"})
    plain, scaled = build_model(CONFIG, seed=1), build_model(told, seed=1)
    assert float(scaled.head.weight.detach().std()) == pytest.approx(1.0)
    ratio = (scaled.head.weight / plain.head.weight).detach()
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])))
    assert not scaled.whitening.bias.any()
    # torch's default of a 2x2 convolution of three channels: uniform within 1 / sqrt(12).
    assert 0.1 < float(plain.whitening.bias.detach().abs().max()) <= 12**-0.5


def test_it_learns_a_batch_by_heart():
    model, images = whitened(smooth_images(32)), smooth_images(32)
    labels = torch.arange(32) % 10
    optimizer = torch.optim.SGD(model.parameters(), 0.2, 0.9, nesterov=True)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert (model(images).argmax(1) == labels).float().mean() > 0.9
