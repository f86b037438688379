"""What the shell's completion offers where a recipe is wanted."""

from pathlib import Path


def recipe_names(incomplete: str) -> list[str]:
    """Return the shipped recipes and the TOML files whose names begin with what has been typed."""
    from fastcifar.config import shipped_by_name

    names = [name for name in shipped_by_name() if name.startswith(incomplete)]
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    beside = [str(file) for file in folder.glob("*") if file.suffix == ".toml" or file.is_dir()]
    files = [f"{file}/" if Path(file).is_dir() else file for file in beside if file.startswith(incomplete)]
    return [*names, *(files if incomplete else [file for file in files if file.endswith(".toml")])]
