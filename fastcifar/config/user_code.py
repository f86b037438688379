"""Code of the user's own that a recipe names by import path: ``"mypkg.nets:MyNet"``, ``"timm:resnet18"``.

Before Python's own import path comes the working directory, as with ``python -m``, so that a file beside the recipe is
found where the command is typed. Such a recipe executes that code: read it before you train a stranger's recipe.

Nothing is imported before a recipe names it. A recipe's code is looked at when the recipe is loaded, so that a wrong
path is one message; reading the results of a run needs none of it.
"""

import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from fastcifar.config.operations import IMPORT_PATH, UserOp
from fastcifar.errors import UserError, nearest, plain, root_cause
from fastcifar.locations import install_command

TIMM = "timm"
MOST_FILES = 2000
"""Of a package without a version, this many files are hashed; a folder with more is no package of models."""


def is_import_path(name: object) -> bool:
    """Return whether a name means code of the user's own: whatever has a colon."""
    return isinstance(name, str) and ":" in name


def import_path(name: str) -> str:
    """Return an import path that has the right form.

    Raises:
        ValueError: it has another.
    """
    if not IMPORT_PATH.fullmatch(name):
        raise ValueError(f'"{plain(name)}" is not of the form "package.module:Name"')
    return name


# -------------------------------------------------------------------------------------------------------------- find


def find(path: str, key: str) -> Any:
    """Return what an import path names.

    Args:
        path: ``package.module:Name``, or ``package.module:Outer.Inner``.
        key: where the recipe says so, for messages: ``model.name``.

    Raises:
        UserError: there is no such module or name in it, or importing it fails.
    """
    module_name, _, names = path.partition(":")
    found: Any = _import(module_name, f'{key}: "{path}"')
    for name in names.split("."):
        if not hasattr(found, name):
            near = nearest(name, [n for n in dir(found) if not n.startswith("_")])
            raise UserError(f'{key}: "{path}": {_place(found)} has no "{name}"{near}')
        found = getattr(found, name)
    return found


def _import(name: str, where: str) -> ModuleType:
    _put_working_directory_first()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if not f"{name}.".startswith(f"{missing}."):  # the user's module is there, and imports one that is not
            raise UserError(f'{where}: importing {name} failed: there is no module "{missing}"; install it') from None
        if missing == TIMM:
            raise UserError(f"{where}: needs timm, which is not installed: {install_command(TIMM)}") from None
        raise UserError(
            f'{where}: there is no module "{missing}", neither in the working directory nor installed; '
            "go to the folder that holds it, or install its package"
        ) from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: importing {name} failed: {_in_words(error)}") from None


def _put_working_directory_first() -> None:
    """Do as ``python -m`` does; for good, because models import more of their package later, and workers are forked."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()  # a module that was written a moment ago is found too


def _place(found: Any) -> str:
    file = getattr(found, "__file__", None)
    return Path(file).name if file else getattr(found, "__name__", type(found).__name__)


def _in_words(error: BaseException) -> str:
    """Return an error of the user's own code in one line, with its place."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    cause = root_cause(error)
    return f"{cause if type(error).__name__ in cause else f'{type(error).__name__}: {cause}'}{at}"


def call(what: Callable[..., Any], key: str, *args: Any, **kwargs: Any) -> Any:
    """Return ``what(*args, **kwargs)``; an error in it becomes one message with its place in the user's code.

    Raises:
        UserError: it failed.
    """
    try:
        return what(*args, **kwargs)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: {_in_words(error)}") from error


def parameters(what: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a callable by name; none where it does not tell (some are written in C)."""
    try:
        return inspect.signature(what).parameters
    except (ValueError, TypeError):
        return {}


def accepts(what: Callable[..., Any], name: str) -> bool:
    """Return whether a callable has a parameter of that name that can be given by name."""
    found = parameters(what).get(name)
    return found is not None and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)


def check_options(what: Callable[..., Any], options: Mapping[str, Any], key: str, *, given: Sequence[str] = ()) -> None:
    """Refuse options that a callable does not take, before anything is made with them.

    Args:
        what: the callable.
        options: by name.
        key: where the recipe has them: ``model.options``.
        given: names that are handed over besides, and so are not missing.

    Raises:
        UserError: an unknown option, or one that is missing.
    """
    known = parameters(what)
    if not known or any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    named = [name for name in known if accepts(what, name)]
    for name in options:
        if name not in named:
            takes = ", ".join(named) or "none"
            raise UserError(f'{key}: unknown option "{name}"{nearest(name, named)}; {_name(what)} takes: {takes}')
    needed = [name for name in named if known[name].default is inspect.Parameter.empty]
    missing = [name for name in needed if name not in options and name not in given]
    if missing:
        raise UserError(f"{key}: {_name(what)} needs {', '.join(missing)}")


def _name(what: Any) -> str:
    return getattr(what, "__qualname__", type(what).__name__)


# ------------------------------------------------------------------------------------------------ what recipes can name


def model_builder(path: str) -> Callable[..., Any]:
    """Return what makes a model: a class or function of the user's own, or timm's for ``timm:NAME``.

    Raises:
        UserError: there is none of that name.
    """
    module, _, name = path.partition(":")
    if module != TIMM:
        builder = find(path, "model.name")
        if not callable(builder):
            raise UserError(f'model.name: "{path}" is of type {_name(builder)}, which makes no model')
        return builder
    timm = _import(TIMM, f'model.name: "{path}"')
    if not timm.is_model(name):
        raise UserError(f'model.name: "{path}": timm has no model "{name}"{nearest(name, timm.list_models())}')

    def create(**options: Any) -> Any:
        return timm.create_model(name, **options)

    return create


def offered(builder: Callable[..., Any], path: str, num_classes: int, image_px: int) -> dict[str, int]:
    """Return what a builder is told beside its options: of ``num_classes`` and ``image_px`` what its signature has."""
    facts = {"num_classes": num_classes, "image_px": image_px}
    if path.startswith(f"{TIMM}:"):
        return {"num_classes": num_classes}
    return {name: value for name, value in facts.items() if accepts(builder, name)}


def optimizer_class(path: str) -> Callable[..., Any]:
    """Return the class of an optimizer, or a function that returns one.

    Raises:
        UserError: there is none of that name, or it is no `torch.optim.Optimizer`, or one that needs a closure.
    """
    import torch

    found = find(path, "optimizer.name")
    if isinstance(found, type) and not issubclass(found, torch.optim.Optimizer):
        raise UserError(f'optimizer.name: "{path}" is not a subclass of torch.optim.Optimizer')
    if not callable(found):
        raise UserError(f'optimizer.name: "{path}" is {_name(found)}, not a subclass of torch.optim.Optimizer')
    closure = parameters(getattr(found, "step", None)).get("closure")  # type: ignore[arg-type]
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(f'optimizer.name: "{path}": its step needs a closure; here is one gradient a step')
    return found


def operation(op: UserOp) -> Any:
    """Return an augmentation of the user's own.

    ``path(...)`` is what calling it returns; ``path`` alone is an instance of a class, or else the object itself.

    Raises:
        UserError: there is none of that name, or it cannot be made with these values.
    """
    found = find(op.path, "augment")
    if op.called or isinstance(found, type):
        return call(found, f'augment: "{op}"', *op.args, **op.kwargs)
    return found


def check_operation(op: UserOp, where: str) -> None:
    """Refuse an augmentation that cannot be used where the recipe has it.

    Args:
        op: the augmentation.
        where: ``device`` or ``loader``, as `AugmentConfig` has it.

    Raises:
        UserError: it cannot be made, or is of the other kind.
    """
    made = operation(op)
    if where == "device" and not callable(getattr(made, "augment", None)):
        raise UserError(
            f'augment: "{op}" has no method augment(images, draws), which an operation on the training device needs; '
            'a transform of single images takes augment = {ops = [...], where = "loader"}'
        )
    if where == "loader" and not callable(made):
        raise UserError(f'augment: "{op}" is not callable; augment.where = "loader" needs a transform of an image')


def check_user_code(recipe: Any) -> None:
    """Find all that a recipe names by import path, and check its options; a recipe that names nothing costs nothing.

    Args:
        recipe: a `fastcifar.config.Recipe`, or a combination, which names none.

    Raises:
        UserError: something cannot be found or does not take its options.
    """
    if not list(user_paths(recipe)):
        return
    model, optimizer = recipe.model, recipe.optimizer
    if is_import_path(model.name):
        builder = model_builder(model.name)
        check_options(builder, model.options, "model.options", given=("num_classes", "image_px"))
    if is_import_path(optimizer.name):
        made = optimizer_class(optimizer.name)
        check_options(made, optimizer.options, "optimizer.options", given=_given_to_optimizer(made))
        if optimizer.weight_decay and not accepts(made, "weight_decay"):
            raise UserError(f"optimizer.weight_decay: {_name(made)} takes none; remove it")
    for op in recipe.augment.ops:
        if isinstance(op, UserOp):
            check_operation(op, recipe.augment.where)


def _given_to_optimizer(made: Callable[..., Any]) -> list[str]:
    """Return what an optimizer gets beside its options: its first argument, whatever its name, and the rates."""
    return [*list(parameters(made))[:1], "lr", "weight_decay"]


def user_paths(recipe: Any) -> Iterator[str]:
    """Yield the import paths that a recipe names."""
    for table in ("model", "optimizer"):
        name = getattr(getattr(recipe, table, None), "name", None)
        if is_import_path(name):
            yield str(name)
    augment = getattr(recipe, "augment", None)
    yield from (op.path for op in getattr(augment, "ops", []) if isinstance(op, UserOp))


# ------------------------------------------------------------------------------------------------------------- record


def record(recipe: Any) -> dict[str, dict[str, str]]:
    """Return for each import path ``package`` and ``version`` where it is of an installed one, else ``sha256``."""
    return {path: _identity(path) for path in user_paths(recipe)}


def _identity(path: str) -> dict[str, str]:
    top = path.partition(":")[0].partition(".")[0]
    distributions = _distributions(tuple(sys.path)).get(top, [])
    if distributions:
        return {"package": distributions[0], "version": metadata.version(distributions[0])}
    module = _import(top, path)
    file = getattr(module, "__file__", None)
    folders = [Path(folder) for folder in getattr(module, "__path__", [])]
    files = sorted(f for folder in folders for f in folder.rglob("*.py"))[:MOST_FILES] or ([Path(file)] if file else [])
    digest = hashlib.sha256()
    for each in files:
        digest.update(each.name.encode() + b"\0" + each.read_bytes())
    return {"sha256": digest.hexdigest()} if files else {}


@cache
def _distributions(path: tuple[str, ...]) -> Mapping[str, list[str]]:
    """Return which distributions hold a package, on this `sys.path`: reading all of them takes half a second."""
    return metadata.packages_distributions()


def changes(recipe: Any, recorded: Any) -> list[str]:
    """Return in words what of a run's own code is not what the run began with.

    Args:
        recipe: the run's.
        recorded: what `record` returned when it began.
    """
    before = recorded if isinstance(recorded, dict) else {}
    return [
        f"{path} has changed since the run began ({identity_in_words(before[path])} then, {identity_in_words(now)} now)"
        for path, now in record(recipe).items()
        if path in before and before[path] != now
    ]


def identity_in_words(identity: Any) -> str:
    """Return what `record` has of one path: a package with its version, or the first digits of a hash."""
    if not isinstance(identity, dict) or not identity:
        return "unknown"
    if "version" in identity:
        return f"{identity.get('package')} {identity['version']}"
    return f"sha256 {str(identity.get('sha256'))[:12]}"
