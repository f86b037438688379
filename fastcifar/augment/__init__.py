"""Augmentation: decisions made once, a kernel each for CPU and GPU, and mixing. Import from its modules.

`Augmentation` is the public one, for any training loop; it is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcifar.augment.standalone import Augmentation

__all__ = ["Augmentation"]


def __getattr__(name: str) -> Any:
    """Import `Augmentation` when it is first used."""
    if name != "Augmentation":
        raise AttributeError(f"module 'fastcifar.augment' has no attribute {name!r}")
    from fastcifar.augment.standalone import Augmentation

    return Augmentation
