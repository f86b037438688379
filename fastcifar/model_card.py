"""The model card of a run: ``README.md`` in its directory, in the form that the Hugging Face hub reads.

Everything in it comes from the run's own files; what is not known is left out or said to be unknown.
"""

import json
from typing import TYPE_CHECKING, Any

from fastcifar.intervals import wilson_interval
from fastcifar.text import duration

if TYPE_CHECKING:
    from fastcifar.config import CombineRecipe, Recipe

HUB_DATA = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
PROTOCOLS = {
    "last": "the last epoch; nothing was chosen",
    "selected": "the epoch that was best on held-out training images",
    "best": "the epoch that was best on the test set, as published; too high as an estimate",
}


def model_card(
    recipe: "Recipe | CombineRecipe", summary: dict[str, Any], environment: dict[str, Any], images: int | None,
    weights: str | None = None,
) -> str:
    """Return the card as Markdown with a head of YAML.

    Args:
        recipe: resolved.
        summary: the content of ``summary.json``.
        environment: the content of ``environment.json``.
        images: in the test set; None where unknown.
        weights: which (``last``, ``best`` or ``selected``) are in the ``model.safetensors`` beside the card, whose
            accuracy its head then has; None where there is no such file.
    """
    title = recipe.title or recipe.name
    parts = [
        _head(recipe, summary, weights),
        f"# {_plain(title)}",
        _what(recipe, summary),
        "## Accuracy\n\n" + _accuracy(summary, images),
        "## How it was trained\n\n" + _facts(recipe, summary, environment),
        "## Use\n\n" + _use(recipe, weights),
        "## Limits\n\n" + _limits(recipe, summary),
        "## The resolved recipe\n\n" + _recipe(recipe),
    ]
    return "\n\n".join(parts) + "\n"


def _source(recipe: "Recipe | CombineRecipe", summary: dict[str, Any]) -> str:
    data = getattr(recipe, "data", None)
    return data.source if data is not None else str(summary.get("source") or "unknown")


def _head(recipe: "Recipe | CombineRecipe", summary: dict[str, Any], weights: str | None) -> str:
    """Return the YAML; JSON strings are YAML strings, whatever is in them."""
    source = _source(recipe, summary)
    lines = ["library_name: fastcifar", "pipeline_tag: image-classification", "tags:", "- image-classification"]
    if source in HUB_DATA:
        lines += ["datasets:", f"- {HUB_DATA[source]}"]
    entry = summary.get(weights) if weights else summary.get("selected") or summary.get("last")
    if entry:
        lines += [
            "metrics:", "- accuracy", "model-index:", f"- name: {json.dumps(recipe.name)}", "  results:", "  - task:",
            "      type: image-classification", "    dataset:", f"      name: {json.dumps(source)}",
            f"      type: {json.dumps(HUB_DATA.get(source, source))}", "      split: test", "    metrics:",
            "    - type: accuracy", f"      value: {entry['accuracy'] / 100:.4f}",
        ]  # fmt: skip
    return "\n".join(["---", *lines, "---"])


def _what(recipe: "Recipe | CombineRecipe", summary: dict[str, Any]) -> str:
    source, classes = _source(recipe, summary), summary.get("classes")
    model = getattr(recipe, "model", None)
    kind = f"A `{model.name}`" if model is not None else "A combination of trained models"
    known = f" It tells {len(classes)} classes apart: {', '.join(map(_plain, classes[:20]))}." if classes else ""
    state = "" if summary["status"] == "finished" else " **Its training was stopped before the end.**"
    return f"{kind}, trained on {_plain(source)} with fastcifar.{known}{state}"


def _accuracy(summary: dict[str, Any], images: int | None) -> str:
    rows = ["| | accuracy, % | 95% interval | how |", "| --- | --- | --- | --- |"]
    for which, how in PROTOCOLS.items():
        if entry := summary.get(which):
            told = entry.get("protocol") if summary.get("members") else how
            rows.append(f"| {which} | {entry['accuracy']:.2f} | {_interval(entry, images)} | {_cell(told or how)} |")
    if tta := summary.get("tta"):
        rows.append(f"| with {tta['kind']} | {tta['accuracy']:.2f} | {_interval(tta, images)} | the last epoch |")
    if len(rows) == 2:
        return "Not measured yet."
    count = f"On {images:,} test images" if images else "On the test set"
    return "\n".join(rows) + (
        f"\n\n{count}. The interval (Wilson) is of the sampling of test images; another seed may differ by more."
    )


def _interval(entry: dict[str, Any], images: int | None) -> str:
    if not images:
        return "unknown"
    low, high = wilson_interval(round(entry["accuracy"] / 100 * images), images)
    return f"{low:.2f} to {high:.2f}"


def _facts(recipe: "Recipe | CombineRecipe", summary: dict[str, Any], environment: dict[str, Any]) -> str:
    clocks, packages = summary["clocks"], environment.get("packages") or {}
    epochs = f"{summary['epochs_done']} of {summary['epochs']}" if summary["epochs"] else None
    rows = {
        "recipe": f"`{recipe.name}`",
        "epochs": epochs,
        "seed": summary.get("seed"),
        "weights": summary.get("weights"),
        "members": ", ".join(_plain(member["name"]) for member in summary.get("members") or []) or None,
        "hardware": environment.get("hardware"),
        "training": duration(clocks["training_s"]) + f" ({clocks['training_s']:,.1f} s)",
        "compilation and warm-up": duration(clocks["compilation_s"]),
        "in all": duration(clocks["total_s"]),
        "speed": f"{summary['images_per_s']:,.0f} images/s" if summary.get("images_per_s") else None,
        "code": f"revision `{summary['git']}`" if summary.get("git") else "revision unknown",
        "went on": "; ".join(
            f"after epoch {place['epochs_done']} on {place.get('hardware')}, revision {place.get('git')}"
            for place in environment.get("resumed", [])
        ) or None,
        "versions": ", ".join(f"{k} {packages[k]}" for k in ("fastcifar", "torch") if k in packages) or None,
    }
    return "\n".join(f"- **{name}**: {_plain(str(value))}" for name, value in rows.items() if value is not None)


def _use(recipe: "Recipe | CombineRecipe", weights: str | None) -> str:
    if getattr(recipe, "model", None) is None:
        return "A combination has no weights of its own: `logits.npz` holds its probabilities on the test set."
    held = f", of the {weights} epoch," if weights else ", where it was exported,"
    return (
        "```console\n$ fastcifar predict RUN image.png\n$ fastcifar evaluate RUN --data OTHER\n"
        "$ fastcifar export RUN model.onnx\n```\n\n"
        f"`model.safetensors`{held} holds the weights "
        "under torch's names, with the classes and the normalization of the input in its metadata."
    )


def _limits(recipe: "Recipe | CombineRecipe", summary: dict[str, Any]) -> str:
    size = summary.get("image_px", 32)
    lines = [
        f"- It was trained on images of {size} x {size} pixels and answers every image with one of its classes, "
        "whatever is to be seen on it.",
        "- Its accuracy holds for images drawn like the test set. Other cameras, crops or corruptions lower it: "
        "measure with `fastcifar evaluate`.",
        "- Its probabilities are not calibrated; `fastcifar report` shows by how much.",
    ]
    if _source(recipe, summary) == "cifar10":
        lines.append("- About 0.5% of CIFAR-10's test labels are disputed by annotators (Northcutt et al., 2021).")
    if _source(recipe, summary) == "synthetic":
        lines.append("- Its data are synthetic images: it is a test of the program, of no use on photographs.")
    return "\n".join(lines)


def _recipe(recipe: "Recipe | CombineRecipe") -> str:
    from fastcifar.config import to_toml

    text = to_toml(recipe).strip()
    fence = "```"
    while fence in text:  # a title may hold anything
        fence += "`"
    return f"{fence}toml\n{text}\n{fence}"


def _plain(text: str) -> str:
    """Return text that Markdown and HTML leave as it is, as far as a name may hold their signs."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")
