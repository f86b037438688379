"""Training: from a recipe to a trained, evaluated and recorded model.

The package can be called: ``fastcifar.train(recipe, ...)`` is `fastcifar.api.train`. Python binds a package to its name
in the package above it, so that a function of the same name there would be lost at the first import from here.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A module that hands calls on to `fastcifar.api.train`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `fastcifar.api.train`."""
        # By name: what is above this package is not to be imported by it but when it is called from there.
        return import_module("fastcifar.api").train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
