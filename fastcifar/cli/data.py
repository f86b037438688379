"""``fastcifar data``: get CIFAR, convert it into a store, check a store to the byte, say what is there."""

import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastcifar.console import answers, err, out, progress_bar
from fastcifar.errors import UserError

app = typer.Typer(help="Get, convert, check and describe data sets.", no_args_is_help=True)

Kind = Literal["cifar10", "cifar100", "folder", "synthetic"]
Format = Literal["raw", "ffcv", "dali"]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object to stdout")]
Data = Annotated[
    Path | None, typer.Option(help="where the data is; without it FASTCIFAR_DATA, then ./data", show_default=False)
]
Named = Annotated[Kind, typer.Argument(help="which data set")]


@app.command()
def fetch(
    name: Annotated[Literal["cifar10", "cifar100"], typer.Argument(help="which data set")] = "cifar10",
    folder: Annotated[Path, typer.Option("--out", help="the folder to put it in")] = Path("data"),
    json_: Json = False,
) -> None:
    """Download CIFAR through torchvision, which checks its hash, and check every file of it."""
    from fastcifar.data.sources import find_source, read_source

    _download(name, folder)
    source = find_source(folder, name)
    with progress_bar() as progress:
        data = read_source(source, progress)
    counts = {split: len(content) for split, content in data.splits.items()}
    _say_notes(data.notes)
    err.print(f"{name} is in {source.path}: {_counts(counts)}")
    if json_:
        out({"name": name, "path": str(source.path), "splits": counts, "notes": data.notes})


def _download(name: str, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchvision import datasets

        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kind(str(folder), download=True)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{name} could not be downloaded into {folder} ({reason}); try again, or get the archive by other "
                f"means and put it, as it is, into {folder}"
            ) from None


@app.command()
def convert(
    to: Annotated[Format, typer.Option("--to", help="the format of the store")],
    name: Named = "cifar10",
    data: Data = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="the store's folder; by default data/NAME-FORMAT", show_default=False)
    ] = None,
    json_: Json = False,
) -> None:
    """Convert a release, an image folder or a store into a store; the second time nothing is left to do."""
    from fastcifar.data import store

    source = _source(name, data)
    place = folder or Path("data") / f"{name}-{to}"
    with progress_bar() as progress:
        made, written = store.convert(source, to, place, progress)
    _say_notes(made.notes)
    counts = {split: made.count(split) for split in made.manifest.splits}
    err.print(f"{place}: {'written' if written else 'already there, unchanged'} ({to}, {_counts(counts)})")
    if json_:
        out({**_describe(made), "written": written})


def _source(name: str, data: Path | None) -> Any:
    from fastcifar.data.sources import Source
    from fastcifar.data.store import locate

    return Source.synthetic() if name == "synthetic" else locate(name, data)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="the store's folder")],
    json_: Json = False,
) -> None:
    """Check every byte of a store against its manifest; a damaged file is named, with exit status 2."""
    from fastcifar.data import store

    with progress_bar() as progress:
        checked = store.verify(folder, progress)
    files = checked.manifest.files
    total = sum(file.bytes for file in files.values())
    err.print(f"{folder}: {len(files)} files, {total:,} bytes, all as the manifest says")
    if json_:
        out({**_describe(checked), "verified": True})


@app.command()
def info(name: Named = "cifar10", data: Data = None, json_: Json = False) -> None:
    """Say what data a recipe would find, where, and what is to be known about it."""
    from fastcifar.data.store import Store, converted

    found = _source(name, data)
    if isinstance(found, Store):
        about = _describe(found)
    else:
        release, store = found.release.layout if found.release else None, converted(found)
        about = {"path": str(found.path), "kind": found.kind, "format": None, "release": release}
        about["converted"] = None if store is None else str(store.root)
    _show(about, json_)
    if json_:
        out(about)


def _describe(store: Any) -> dict[str, Any]:
    manifest = store.manifest
    return {
        "path": str(store.root),
        "kind": manifest.source.kind,
        "format": store.format,
        "splits": {name: split.count for name, split in manifest.splits.items()},
        "classes": store.classes,
        "image_shape": list(store.image_shape),
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "content": manifest.content,
        "source": manifest.source.model_dump(),
        "notes": store.notes,
    }


def _show(about: dict[str, Any], json_: bool) -> None:
    from rich.table import Table

    table = Table(show_header=False)
    for key in ("path", "kind", "release", "converted", "format", "image_shape", "bytes", "content"):
        if about.get(key) is not None:
            table.add_row(key, str(about[key]))
    if "splits" in about:
        table.add_row("images", _counts(about["splits"]))
        table.add_row("classes", f"{len(about['classes'])}: {', '.join(about['classes'][:10])}")
    answers(json_).print(table)
    if about["format"] is None and about["converted"] is None:
        answers(json_).print("Not converted yet: a run does it once, or `fastcifar data convert --to raw`.")
    _say_notes(about.get("notes", []))


def _counts(splits: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in splits.items())


def _say_notes(notes: list[str]) -> None:
    for note in notes:
        err.print(f"note: {note}", style="yellow", markup=False)
