"""Teachers' logits of every augmented image, computed once for an epoch, kept in float16, read by all later runs.

Which crop, flip or mixture an image gets in an epoch is a hash of (seed, epoch, sample), so that two runs of the same
seed, images, augmentations and batches see the same pixels, whatever their models are. An epoch of 50,000 images and
ten classes takes 1 MB for each teacher: for some tens or hundreds of epochs, not for thousands. Whoever fills the cache
learns from the same float16 numbers as whoever reads it. Where nothing is changed at random, an image is the same in
every epoch, and one table serves all of them and all seeds.

Shapes in the docstrings: T teachers, M images of the whole training set, K classes, B samples.
"""

import hashlib
import io
import json
import zipfile

import numpy as np
import torch
from torch import Tensor

from fastcifar.cache import cache_folder
from fastcifar.config.schema import Recipe
from fastcifar.config.user_code import record
from fastcifar.logits_file import write_arrays
from fastcifar.run_directory import refuse_disk, write_atomic
from fastcifar.teachers import teachers_digest

VERSION = 2
"""Of what is kept: raise it when the same recipe would see other pixels."""


def is_still(recipe: Recipe) -> bool:
    """Return whether a run sees every image of its training set in each epoch, and the same pixels of it."""
    return not (recipe.augment.ops or recipe.mix or recipe.data.resize or recipe.train.drop_last)


def plan_key(recipe: Recipe, content: str, device: torch.device) -> str:
    """Return a hash of all that decides what the teachers say of an epoch's images.

    Args:
        recipe: with a ``distill`` table, and the order of the samples that the loader has instead of a plan.
        content: a hash of the data set.
        device: its kind decides the rounding.
    """
    assert recipe.distill is not None
    data, train = recipe.data.model_dump(exclude={"loader", "test_subset"}), recipe.train
    order = recipe.data.loader.order
    seed = None if is_still(recipe) and not (recipe.data.subset or recipe.data.holdout) else recipe.seed
    plan = {
        "version": VERSION, "teachers": teachers_digest(recipe.distill), "content": content, "seed": seed,
        "data": data, "augment": recipe.augment.model_dump(), "precision": recipe.engine.precision,
        "device": device.type, "code": record(recipe), "mix": recipe.mix and recipe.mix.model_dump(),
        "epochs": train.epochs if recipe.mix or recipe.data.resize else None,
        # Who is mixed with whom, and who is left out, depends on the batches; else they do not matter.
        "batches": [train.batch_size, train.drop_last, order] if recipe.mix or train.drop_last else None,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


class TeacherLogits:
    """The logits of one epoch on the device, and those of others on disk.

    Args:
        recipe: as in `plan_key`.
        shape: (T, M, K).
        content: a hash of the data set.
        device: where the student trains.

    Attributes:
        folder: where the epochs' files are, in the cache.
    """

    def __init__(self, recipe: Recipe, shape: tuple[int, int, int], content: str, device: torch.device):
        self.folder = cache_folder() / "teacher-logits" / plan_key(recipe, content, device)[:32]
        self._still = is_still(recipe)
        self._table = torch.zeros(shape, dtype=torch.float16, device=device)

    def kept_as(self, epoch: int) -> int:
        """Return under which epoch's number an epoch's logits are kept."""
        return 0 if self._still else epoch

    def load(self, epoch: int) -> bool:
        """Put an epoch's logits into place, if they are there and whole; return whether they are."""
        path = self.folder / f"epoch-{self.kept_as(epoch)}.npz"
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                found = file["logits"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False
        if found.dtype != np.float16 or found.shape != tuple(self._table.shape):
            return False
        self._table.copy_(torch.from_numpy(found))
        return True

    def put(self, indices: Tensor, logits: Tensor) -> None:
        """Take in the logits (T, B, K) of the images with these indices, int64 (B,)."""
        self._table.index_copy_(1, indices, logits.to(torch.float16))

    def save(self, epoch: int) -> None:
        """Keep what is in place as an epoch's logits.

        Raises:
            UserError: the disk is full or the cache cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse_disk(self.folder, error)
        path = self.folder / f"epoch-{self.kept_as(epoch)}.npz"
        write_atomic(path, write_arrays({"logits": self._table.cpu().numpy()}))

    def of(self, indices: Tensor) -> Tensor:
        """Return the logits (T, B, K), float16, of the images with these indices, int64 (B,)."""
        return self._table.index_select(1, indices)
