"""Hooks of mkdocs (mkdocs.yml): the pages that are generated, and the navigation.

- Generated: every shipped recipe, every command, the ladder and the benchmarks (from README.md, which ``make tables``
  writes, as it does docs/keys.md), the API reference, and the start page.
- Navigation: the pages named in `ORDER`, then every other file of docs/, so that a new page needs no entry anywhere.
- Links out of docs/, to files of the repository, become plain text: the site has no copy of these files.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from tools.keys_page import cell

ROOT = Path(__file__).resolve().parents[1]
ORDER = {
    "Start": ["index.md", "tour.md", "commands.md"],
    "Recipes": ["recipes.md", "keys.md", "ladder.md", "benchmarks.md"],
    "Guides": ["data.md", "report.md", "python-api.md", "trackers.md"],
    "Inside": ["walk.md", "robustness.md", "gpu-path.md", "contributing.md", "api.md"],
}
OTHERS = "Guides"
"""The section of pages that `ORDER` does not know."""
API = (
    "fastcifar.api", "fastcifar.api.loader", "fastcifar.augment.standalone", "fastcifar.optim", "fastcifar.track",
    "fastcifar.config", "fastcifar.config.schema", "fastcifar.run_directory", "fastcifar.data.store",
    "fastcifar.data.batch", "fastcifar.data.loaders.base", "fastcifar.augment.augment", "fastcifar.train.ema",
    "fastcifar.analysis.statistics", "fastcifar.analysis.calibration", "fastcifar.analysis.corruptions",
    "fastcifar.analysis.evaluate", "fastcifar.analysis.predict", "fastcifar.analysis.export",
    "fastcifar.analysis.ensemble", "fastcifar.analysis.label_errors", "fastcifar.errors",
)  # fmt: skip
"""The modules of the API reference; `fastcifar` itself comes first where it exports anything."""


# ----------------------------------------------------------------------------------------------------------- the hooks


def on_config(config: Any) -> Any:
    """Write the navigation."""
    written = sorted(p.relative_to(config.docs_dir).as_posix() for p in Path(config.docs_dir).rglob("*.md"))
    known = [page for pages in ORDER.values() for page in pages]
    pages = {*written, *GENERATED}
    groups = {name: [page for page in listed if page in pages] for name, listed in ORDER.items()}
    groups[OTHERS] += [page for page in written if page not in known]
    config.nav = [{name: listed} for name, listed in groups.items() if listed]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages; a file of docs/ of the same name goes before."""
    for name, make in GENERATED.items():
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, content=make()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that leave docs/ into text."""
    return without_outside_links(markdown)


def without_outside_links(markdown: str) -> str:
    """Return Markdown in which ``[text](../file)`` is the text alone."""
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)


# ---------------------------------------------------------------------------------------------------- recipes, commands


def recipes() -> str:
    """Return the page of the shipped recipes."""
    from fastcifar.ladder.rows import catalogue

    rows = ["# The shipped recipes", "", "`fastcifar run NAME` trains one, `fastcifar show NAME` prints all of it.", ""]
    rows += ["| name | what | model | epochs | published, % |", "| --- | --- | --- | --- | --- |"]
    for name, recipe in catalogue().items():
        model = f"`{recipe.model.name}`" if hasattr(recipe, "model") else "a combination"
        epochs = recipe.train.epochs if hasattr(recipe, "train") else "none"
        published = f"{recipe.published.best:.2f}" if recipe.published else "none"
        rows.append(f"| `{name}` | {cell(recipe.title)} | {model} | {epochs} | {published} |")
    return "\n".join(rows) + "\n"


def commands() -> str:
    """Return the page of the command line."""
    import typer

    from fastcifar.cli.main import app

    root = typer.main.get_command(app)
    intro = (
        "# Commands\n\nEvery command takes `--help`; those that print a table or a result take `--json`. "
        "What a command answers goes to stdout, progress, notes and errors to stderr."
    )
    return "\n\n".join([intro, *_command_pages(root, "fastcifar")]) + "\n"


def _command_pages(command: Any, name: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        for word, part in command.commands.items():
            yield from _command_pages(part, f"{name} {word}")
        return
    rows = ["| argument | what | default |", "| --- | --- | --- |"]
    for parameter in command.params:
        words = " ".join(f"`{word}`" for word in (*parameter.opts, *parameter.secondary_opts))
        label = words if parameter.param_type_name == "option" else f"`{(parameter.metavar or parameter.name).upper()}`"
        given = parameter.default
        default = given if isinstance(given, (str, int, float)) and not isinstance(given, bool) else ""
        rows.append(f"| {cell(label)} | {cell(getattr(parameter, 'help', None) or '')} | {cell(str(default))} |")
    yield f"## {name}\n\n{command.help or ''}\n\n" + "\n".join(rows)


# ----------------------------------------------------------------------------------------------- from the repository


def start() -> str:
    """Return the start page: what README.md says of why and how."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return _inside(text[: text.index("\n## The ladder")].replace("](#the-ladder)", "](ladder.md)"))


def ladder() -> str:
    """Return the ladder with its results, as README.md has them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return _inside("# " + text[text.index("## The ladder") + 3 : text.index("\n## Speed")])


def benchmarks() -> str:
    """Return benchmarks/README.md."""
    return _inside((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"))


def contributing() -> str:
    """Return CONTRIBUTING.md."""
    return _inside((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def _inside(text: str) -> str:
    """Let links of a file of the repository lead to pages of docs/, and other files be text."""
    text = re.sub(r"<!--.*?-->\n?", "", text)
    text = re.sub(r"\]\((?:\.\./)?docs/([\w./-]+)\)", r"](\1)", text)
    kept = {*GENERATED, *(p.name for p in (ROOT / "docs").glob("*.md"))}

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        return match.group(0) if target.startswith(("http", "#")) or target in kept else words

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, text)


def api() -> str:
    """Return the API reference: what `mkdocstrings` reads out of each module."""
    import fastcifar

    first = ["fastcifar"] if getattr(fastcifar, "__all__", None) else []
    intro = "# API reference\n\nGenerated from the docstrings; the guides show how the parts fit together."
    return "\n\n".join([intro, *(f"::: {module}" for module in (*first, *API))]) + "\n"


GENERATED = {
    "index.md": start, "recipes.md": recipes, "commands.md": commands, "ladder.md": ladder,
    "benchmarks.md": benchmarks, "contributing.md": contributing, "api.md": api,
}  # fmt: skip
