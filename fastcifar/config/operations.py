"""What a recipe may write in ``augment``: one frozen, checked model per operation, and the text form ``crop(4)``."""

import ast
import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastcifar.errors import UserError, nearest, plain


class Op(BaseModel):
    """One augmentation with its settings. ``str(op)`` is the form in which a recipe writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def __str__(self) -> str:
        given = [f"{k}={_write(v)}" for k, v in self.model_dump(exclude={"name"}, exclude_defaults=True).items()]
        return f"{self.name}({', '.join(given)})" if given else self.name  # type: ignore[attr-defined]


def _write(value: Any) -> str:
    """Return a setting as a recipe writes it: truth values as TOML does, texts in quotes that TOML texts can hold."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


class Crop(Op):
    """Pad every side by ``padding_px`` and cut a window of the old size at a uniform offset.

    ``pad``: with black (``zero``), or with the image's own mirror image, its outermost pixels not repeated
    (``reflect``), which needs images larger than ``padding_px``.
    """

    name: Literal["crop"] = "crop"
    padding_px: int = Field(4, ge=0, le=64, description="Pixels added to every side; fewer than the image has.")
    pad: Literal["zero", "reflect"] = Field("zero", description="What they hold: black, or the image's mirror image.")


class Flip(Op):
    """Mirror left to right with probability ``p``.

    With ``alternate``, a sample is mirrored in every second epoch: in the even ones with probability ``p``, once for
    all of them, and in the odd ones if not in the even ones (Jordan, 2024, airbench).
    """

    name: Literal["flip"] = "flip"
    p: float = Field(0.5, ge=0, le=1, description="Probability that a sample is mirrored.")
    alternate: bool = Field(False, description="Mirror each sample in every second epoch instead.")


class Rotate(Op):
    """Turn by a uniform angle in +-``degrees`` (nearest neighbour, zero fill)."""

    name: Literal["rotate"] = "rotate"
    degrees: float = Field(15.0, ge=0, le=180, description="Largest angle, to either side.")


class Cutout(Op):
    """With probability ``p``, set ``holes`` squares of ``size_px`` to black, centred uniformly, clipped at the border.

    DeVries & Taylor, 2017, "Improved regularization of convolutional neural networks with cutout". ``fill = "mean"``
    takes the byte nearest to ``data.mean`` instead, which normalizes to about 0. ``inside`` draws among the squares
    that lie whole in the image, so that no sample loses less than another; it needs images of ``size_px`` or more.
    """

    name: Literal["cutout"] = "cutout"
    size_px: int = Field(16, ge=1, le=256, description="Side of a square in pixels; at most that of the image.")
    p: float = Field(1.0, ge=0, le=1, description="Probability that a sample gets any.")
    holes: int = Field(1, ge=1, le=4, description="How many squares; they may overlap.")
    fill: Literal["black", "mean"] = Field("black", description="Color of the squares: black, or `data.mean`.")
    inside: bool = Field(False, description="Only squares that lie whole in the image, instead of clipped ones.")


class Erase(Op):
    """With probability ``p``, fill one rectangle of random area, aspect and place: random erasing.

    Zhong et al., 2020, "Random erasing data augmentation", with the ranges of torchvision.transforms.RandomErasing: the
    area is ``min_area`` to ``max_area`` of the image, the aspect 0.3 to 3.3, and the rectangle lies whole in the image.
    ``fill`` is that of cutout.
    """

    name: Literal["erase"] = "erase"
    p: float = Field(0.5, ge=0, le=1, description="Probability that a sample gets a rectangle.")
    min_area: float = Field(0.02, gt=0, le=0.5, description="Smallest area, as a share of the image.")
    max_area: float = Field(0.33, gt=0, le=0.5, description="Largest area; not below `min_area`.")
    fill: Literal["black", "mean"] = Field("mean", description="Color of the rectangle: black, or `data.mean`.")

    @model_validator(mode="after")
    def _areas(self) -> "Erase":
        if self.min_area > self.max_area:
            raise ValueError(f"min_area = {self.min_area} is more than max_area = {self.max_area}")
        return self


class AutoAugment(Op):
    """The CIFAR-10 policy of Cubuk et al., 2019: one of 25 sub-policies of two operations per sample."""

    name: Literal["autoaugment"] = "autoaugment"


class RandAugment(Op):
    """``num_ops`` operations of one common magnitude (Cubuk et al., 2020)."""

    name: Literal["randaugment"] = "randaugment"
    num_ops: int = Field(2, ge=1, le=4, description="How many operations a sample gets, one after the other.")
    magnitude: int = Field(9, ge=0, le=30, description="Their strength; 30 is the most.")


class TrivialAugmentWide(Op):
    """One operation of uniform magnitude per sample (Mueller & Hutter, 2021)."""

    name: Literal["trivialaugment"] = "trivialaugment"


class UserOp(Op):
    """An operation of the user's own, by import path: ``mypkg.ops:Grid(3, p=0.5)``; see `fastcifar.config.user_code`.

    Attributes:
        path: ``package.module:Name``.
        called: whether values in parentheses follow, maybe none.
        args: the values without a name; literals.
        kwargs: those with one.
    """

    path: str
    called: bool = False
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The import path, which is what tells one such operation from another."""
        return self.path

    def __str__(self) -> str:
        given = [*map(_write, self.args), *(f"{k}={_write(v)}" for k, v in self.kwargs.items())]
        return f"{self.path}({', '.join(given)})" if self.called else self.path


OPS: dict[str, type[Op]] = {
    "crop": Crop,
    "flip": Flip,
    "rotate": Rotate,
    "cutout": Cutout,
    "erase": Erase,
    "autoaugment": AutoAugment,
    "randaugment": RandAugment,
    "trivialaugment": TrivialAugmentWide,
}


MAX_TEXT = 200
ONCE = ("autoaugment", "randaugment", "trivialaugment")
"""Policies of whole images: each would be a policy of its own if it came twice."""


def check_ops(ops: Sequence[Op]) -> None:
    """Refuse a list of operations that is valid one by one but not together.

    Raises:
        UserError: a policy twice.
    """
    names = [op.name for op in ops]  # type: ignore[attr-defined]
    for name in ONCE:
        if (count := names.count(name)) > 1:
            raise UserError(f"{name} is there {count} times; once is what its authors published")


def check_size(ops: Sequence[Op], side_px: int) -> None:
    """Refuse operations that can leave nothing of an image.

    Args:
        ops: the operations.
        side_px: the shorter side of the images.

    Raises:
        UserError: padding or a hole of at least the image.
    """
    for op in ops:
        if isinstance(op, Crop) and op.padding_px >= side_px:
            raise UserError(f'"{op}": {op.padding_px} px of padding on images of {side_px} px; at most {side_px - 1}')
        if isinstance(op, Cutout) and op.size_px > side_px:
            raise UserError(f'"{op}": a hole of {op.size_px} px in images of {side_px} px; at most {side_px}')


def parse_op(text: str) -> Op:
    """Read one operation such as ``"flip"``, ``"crop(4)"`` or ``"cutout(16, p=0.5)"``.

    Positional arguments fill the fields in their order. A name with a colon is an import path.

    Raises:
        UserError: not of that form, an unknown operation or setting, or a value out of range.
    """
    if ":" in text.partition("(")[0]:
        return _parse_user_op(text.strip())
    name, args, kwargs = _split_call(text)
    if name not in OPS:
        raise UserError(f'unknown augmentation "{plain(name)}"{nearest(name, OPS)}; allowed: {", ".join(OPS)}')
    kind = OPS[name]
    fields = [f for f in kind.model_fields if f != "name"]
    if len(args) > len(fields):
        raise UserError(f'"{text}": {name} takes at most {len(fields)} values ({", ".join(fields) or "none"})')
    given = dict(zip(fields, args, strict=False))
    for key, value in kwargs.items():
        if key not in fields or key in given:
            problem = "is given twice" if key in given else f"is not a setting{nearest(key, fields)}"
            raise UserError(f'"{text}": "{key}" {problem}; allowed: {", ".join(fields) or "none"}')
        given[key] = value
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{first['loc'][0]}: " if first["loc"] else ""
        raise UserError(f'"{text}": {where}{first["msg"].removeprefix("Value error, ")}') from None


IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.\w+)*")


def _parse_user_op(text: str) -> UserOp:
    """Read an operation of the user's own; whether it exists is found out when the whole recipe has been read."""
    path = text.partition("(")[0].rstrip()
    if not IMPORT_PATH.fullmatch(path):
        raise UserError(f'"{plain(text)}" is not of the form "package.module:Name" or "package.module:Name(value)"')
    # The values are read as those of our own operations, under a name that has no colon.
    if path == text:
        return UserOp(path=path)
    try:
        _, args, kwargs = _split_call("op" + text.removeprefix(path)[:MAX_TEXT])
    except UserError:
        raise UserError(f'"{plain(text)}": the values are not of the form "(value, key=value)"') from None
    return UserOp(path=path, called=True, args=tuple(args), kwargs=kwargs)


def _split_call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Split ``name(1, key=2)`` into its name, positional and keyword values (literals only)."""
    problem = UserError(f'"{plain(text)}" is not of the form "name" or "name(value, key=value)"')
    if len(text) > MAX_TEXT or not text.isprintable():
        raise problem
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on strange escapes; they are no literals of ours
            tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, [], {}
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
            raise problem
        keys = [k.arg or "**" for k in tree.keywords]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UserError(f'"{text}": "{twice[0]}" is given twice')
        args = [_literal(a) for a in tree.args]
        return tree.func.id, args, dict(zip(keys, [_literal(k.value) for k in tree.keywords], strict=True))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise problem from None


def _literal(node: ast.expr) -> Any:
    """Return a literal's value; truth values may be written as in TOML, ``true``, or as in Python, ``True``."""
    if isinstance(node, ast.Name) and node.id in ("true", "false"):
        return node.id == "true"
    return ast.literal_eval(node)
