"""``fastcifar schema``: the JSON Schema of recipe files, for editors."""

from pathlib import Path
from typing import Annotated

import typer


def schema(
    out: Annotated[Path | None, typer.Option(help="Write it to a file instead of to stdout.")] = None,
    path: Annotated[bool, typer.Option("--path", help="Print where the shipped one lies.")] = False,
) -> None:
    """Print the JSON Schema of a recipe file: `fastcifar schema --out schema.json`.

    An editor with taplo completes and checks a recipe whose first line is `#:schema PATH`.
    """
    import sys

    from fastcifar.config.json_schema import schema_text
    from fastcifar.locations import recipes_folder
    from fastcifar.run_directory import write_atomic

    if path:
        print(recipes_folder() / "schema.json")
    elif out is not None:
        write_atomic(out, schema_text())
    else:
        sys.stdout.write(schema_text())
