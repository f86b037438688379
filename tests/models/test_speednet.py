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
    norm = BiasBatchNorm2d(4)
    assert [name for name, _ in norm.named_parameters()] == ["bias"]
    assert "weight" in norm.state_dict()
    x = torch.randn(8, 4, 3, 3)
    torch.testing.assert_close(norm(x), F.batch_norm(x, None, None, training=True))


def test_convolutions_start_near_the_identity():
    conv = build_model(CONFIG, seed=1).blocks[1].convs[0]
    x = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(conv(x), x)


def test_it_learns_a_batch_by_heart():
    model, images = whitened(smooth_images(32)), smooth_images(32)
    labels = torch.arange(32) % 10
    optimizer = torch.optim.SGD(model.parameters(), 0.2, 0.9, nesterov=True)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert (model(images).argmax(1) == labels).float().mean() > 0.9
