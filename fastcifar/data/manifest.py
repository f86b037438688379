"""The manifest of a store: what it holds, file by file, as a typed model that knows a hash of itself."""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastcifar.errors import UserError, plain, shown

NAME = "manifest.json"
VERSION: Literal[2] = 2
MAX_BYTES = 64 << 20
CURE = "remove the store and convert again"
"""Of a damaged store, at the end of a message: a conversion does not replace what somebody has named."""

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _inside(name: str) -> str:
    """Refuse a file name that leads out of the store."""
    path = PurePosixPath(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts or name == NAME:
        raise ValueError("is not the name of a file in the store")
    return name


class Part(BaseModel):
    """A table of the manifest: no unknown keys, no coerced values, nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FileEntry(Part):
    """One file as it was written: its size, its SHA-256, and its time of change in nanoseconds."""

    bytes: int = Field(ge=0)
    sha256: Hash
    mtime_ns: int


class SplitEntry(Part):
    """How many images ``train`` or ``test`` has."""

    count: int = Field(ge=1, le=2**40)


class Origin(Part):
    """Where the images came from; beyond these keys, what each kind of source has to say of itself."""

    model_config = ConfigDict(extra="allow")

    kind: str
    path: str = ""
    fingerprint: str = ""


class Manifest(Part):
    """Everything that is known of a store.

    Attributes:
        fastcifar_store: the version of this layout.
        format: ``raw``, ``ffcv`` or ``dali``.
        source: the origin.
        content: a hash of classes, pixels and labels, the same in every format.
        classes: their names; a label is a position in this list.
        image_shape: height, width and channels in pixels.
        splits: ``train`` and ``test``.
        notes: what a reader of results should know about this data.
        files: by name, relative to the store's folder.
    """

    fastcifar_store: Literal[2] = VERSION
    format: Literal["raw", "ffcv", "dali"]
    source: Origin
    content: Hash
    classes: list[str] = Field(min_length=1, max_length=1_000_000)
    image_shape: list[Annotated[int, Field(ge=1, le=65_535)]] = Field(min_length=3, max_length=3)
    splits: dict[str, SplitEntry]
    notes: list[str]
    files: dict[Annotated[str, AfterValidator(_inside)], FileEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _both_splits(self) -> "Manifest":
        if set(self.splits) != {"train", "test"}:
            raise ValueError("needs the splits train and test")
        return self

    @property
    def digest(self) -> str:
        """A SHA-256 over all of its values, whatever the order of keys and the white space."""
        return _digest(self.model_dump())

    def write(self, folder: Path) -> None:
        """Write it into a store's folder, with its own hash."""
        table = {**self.model_dump(), "sha256": self.digest}
        (folder / NAME).write_text(json.dumps(table, indent=1) + "\n")


def _digest(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read a store's manifest and check it against its own hash.

    Raises:
        UserError: missing, unreadable, of another version, of wrong types, or changed since it was written.
    """
    table = _read_json(path)
    version = table.get("fastcifar_store")
    if version != VERSION or type(version) is not int:
        update = "; update fastcifar" if type(version) is int and version > VERSION else f"; {CURE}"
        raise UserError(f"{path}: store version {shown(version)}, this fastcifar reads {VERSION}{update}")
    claimed = table.pop("sha256", None)
    try:
        manifest = Manifest.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(plain(str(part)) for part in first["loc"])
        raise UserError(f"{path}: {where}: {first['msg']} ({shown(first['input'])}); {CURE}") from None
    if claimed != manifest.digest:
        raise UserError(f"{path}: changed since it was written (its own SHA-256 differs); {CURE}")
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes are no manifest; {CURE}")
        table = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no store ({NAME} is missing)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable manifest ({plain(str(error), 200)}); {CURE}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: not a readable manifest (no table); {CURE}")
    return table
