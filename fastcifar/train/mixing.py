"""CutMix and Mixup of a batch that several ranks divide."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastcifar.data.batch import Batch
from fastcifar.kernels.mix import Target
from fastcifar.train.ranks import Ranks

Mix = Callable[[Tensor, Tensor, Any, Any], tuple[Tensor, Target]]


def mixed(mix: Mix, images: Tensor, batch: Batch, epoch: Any, step: Any, ranks: Ranks) -> tuple[Tensor, Target]:
    """Return this rank's part of the mixed global batch, the same images as on one device bit for bit.

    An image is mixed with any other of the batch, so the ranks first put the augmented batch together: in bf16
    2 B C H W bytes, 0.8 MB for 128 images of CIFAR-10. Mixing all of it on each of them costs less than that.

    Args:
        mix: (images, labels, epoch, step) -> (images, target); see `fastcifar.augment.mix`.
        images: this rank's, (B, C, H, W), channels-last.
        batch: where they come from.
        epoch: from 0, as ``mix`` takes it.
        step: likewise.
        ranks: those that divide the batch.
    """
    share = batch.share
    if share is None:
        return mix(images, batch.labels, epoch, step)
    own = slice(share.first, share.first + len(images))
    whole = ranks.assemble(images.permute(0, 2, 3, 1).contiguous(), share).permute(0, 3, 1, 2)
    images, (labels_a, labels_b, lam) = mix(whole, ranks.assemble(batch.labels, share), epoch, step)
    return images[own], Target(labels_a[own], labels_b[own], lam[own] if lam.ndim else lam)
