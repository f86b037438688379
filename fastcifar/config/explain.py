"""Turn pydantic's errors into messages that say which key is wrong and what to write instead."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fastcifar.config.schema import BY_IMPORT_PATH, OURS, PRESETS, Recipe
from fastcifar.errors import closest, did_you_mean, nearest, plain, shown

MOST_PROBLEMS = 10
MOST_PLACES = 3
OTHER_NAMES = {
    "learning_rate": "lr", "wd": "weight_decay", "l2": "weight_decay", "min_lr": "final", "eta_min": "final",
    "warmup": "warmup_epochs", "bs": "batch_size", "batch": "batch_size", "num_epochs": "epochs",
    "max_epochs": "epochs", "num_workers": "workers", "grad_accum": "accumulate",
    "gradient_accumulation_steps": "accumulate", "clip": "grad_clip", "clip_grad": "grad_clip",
    "max_grad_norm": "grad_clip", "amp": "precision", "dtype": "precision", "fp16": "precision", "bf16": "precision",
    "compile": "mode", "torch_compile": "mode", "cuda_graph": "mode", "cuda_graphs": "mode", "arch": "model",
    "transforms": "augment", "random_crop": "augment", "cutout": "augment", "autoaugment": "augment",
    "val_split": "holdout", "validation": "holdout", "test_time_augmentation": "tta", "logger": "track",
    "wandb": "track", "tensorboard": "track", "mlflow": "track", "gpu": "device",
}  # fmt: skip
"""What other programs call keys of ours, where no spelling comes close."""
OPTIONS = {
    **dict.fromkeys(("devices", "gpus", "num_gpus", "ngpus", "world_size", "nproc_per_node"), "--devices"),
    **dict.fromkeys(("out", "out_dir", "output", "output_dir", "save_dir", "run_dir"), "--out"),
    **dict.fromkeys(("data_dir", "data_path", "data_root", "path", "root"), "--data"),
}
"""What other programs have as keys and ``fastcifar run`` as options: they are of a machine, not of a recipe."""
ELSEWHERE = 0.8
"""How similar (0 to 1) a key of another table must be to be named. At 0.6, as for a table's own keys, strangers
come out, such as ``optimizer.eps`` for ``train.steps``."""


def explain_all(path: Path, kind: type[BaseModel], errors: list[Any]) -> str:
    """Return one line per error, for the first `MOST_PROBLEMS` of them, and how many more there are."""
    lines = [explain(path, kind, error) for error in errors[:MOST_PROBLEMS]]
    more = [f"{path}: and {len(errors) - MOST_PROBLEMS:,} more of the kind"] if len(errors) > MOST_PROBLEMS else []
    return "\n".join(lines + more)


def explain(path: Path, kind: type[BaseModel], error: Any) -> str:
    """Turn one pydantic error into ``file: key.path: what was wrong; what is allowed``."""
    where = [str(part) for part in error["loc"]]
    # The tag that tells our models and optimizers from the user's own; anywhere else it is a key of that name.
    if where[:2] in (["model", OURS], ["optimizer", OURS]):
        del where[1]
    key, message = _EXPLAIN.get(error["type"], _explain_other)(kind, where, error)
    return f"{path}: {_key_path(kind, key)}{message}"


def _explain_extra(kind: type[BaseModel], where: list[str], error: Any) -> tuple[list[str], str]:
    allowed = _allowed_keys(kind, where[:-1])
    return where, f"unknown key{_meant(kind, where, allowed)}; allowed: {', '.join(allowed)}"


def _meant(kind: type[BaseModel], where: list[str], allowed: list[str]) -> str:
    """Return which key may have been meant: of that name in another table, else of a close name, in this one first."""
    word, own = OTHER_NAMES.get(where[-1].lower(), where[-1]), ".".join(_without_tags(kind, where))
    places = sorted(dict.fromkeys(_every_key(kind)), key=lambda place: place.count("."))
    if own in places:  # a key of another model or optimizer, which is in its right place
        return nearest(word, allowed)
    named: dict[str, list[str]] = {}
    for place in places:
        named.setdefault(place.rpartition(".")[2], []).append(place)
    whole = {place.replace(".", "_"): [place] for place in places}  # ema_decay
    if found := named.get(word) or whole.get(word):
        return did_you_mean(found[:MOST_PLACES])
    if kind is Recipe and (option := OPTIONS.get(word.lower())):
        return f" (it is an option: fastcifar run {option})"
    found = closest(word, allowed)
    for others in (whole, named):
        found = found or [place for name in closest(word, others, ELSEWHERE) for place in others[name]]
    return did_you_mean(found[:MOST_PLACES])


def _explain_missing(kind: type[BaseModel], where: list[str], error: Any) -> tuple[list[str], str]:
    names = [arg for arg in getattr(_at(kind, where), "__args__", ()) if isinstance(arg, str)]
    allowed = f"; allowed: {', '.join(names)}" if names else ""
    if where[1:2] and where[1] in _tags(kind, where[:1]):  # a surprise to who has changed the name alone
        return where, f"is missing{allowed}; where a table gets another name, it keeps none of the keys that it had"
    return where, f"is missing{allowed}"


def _explain_no_tag(kind: type[BaseModel], where: list[str], error: Any) -> tuple[list[str], str]:
    return [*where, "name"], f"is missing; allowed: {', '.join(_tags(kind, where))}"


def _explain_tag(kind: type[BaseModel], where: list[str], error: Any) -> tuple[list[str], str]:
    tag = error["ctx"]["tag"]
    names = _tags(kind, where)
    own = ', or an import path "package.module:Name"' if where in (["model"], ["optimizer"]) else ""
    allowed = f"allowed: {', '.join(names)}{own}"
    return [*where, "name"], f'unknown name "{plain(str(tag))}"{nearest(str(tag), names)}; {allowed}'


def _explain_literal(kind: type[BaseModel], where: list[str], error: Any) -> tuple[list[str], str]:
    names = [t.strip(" '") for t in error["ctx"]["expected"].replace(" or ", ", ").split(",")]
    names = [name.lower() if name in ("True", "False") else name for name in names]
    value = error["input"]
    meant = (_truth_value(value) if "true" in names else "") or nearest(shown(value), names)
    return where, f"{shown(value)} is not allowed{meant}; allowed: {', '.join(names)}"


def _truth_value(value: object) -> str:
    """Return a hint for who wrote ``True`` or ``"true"``, which are texts, where a truth value is wanted."""
    word = value.lower() if isinstance(value, str) else ""
    return f" (did you mean {word}, in lower case and without quotes?)" if word in ("true", "false") else ""


def _explain_table(kind: type[BaseModel], where: list[str], error: Any) -> tuple[list[str], str]:
    allowed, given = _allowed_keys(kind, where), error["input"]
    if where == ["augment"]:
        return where, f'{shown(given)} is not a list of operations, such as ["crop(4)", "flip"]'
    if isinstance(given, str) and (not allowed or "name" in allowed):
        return where, f"{shown(given)} is not a table; its name is {'.'.join(where)}.name"
    return where, f"{shown(given)} is not a table; its keys: {', '.join(allowed) or 'name, ...'}"


def _explain_other(kind: type[BaseModel], where: list[str], error: Any) -> tuple[list[str], str]:
    """Name the value where that helps; a whole table's error names the key that its message starts with."""
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if error["type"] in ("bool_type", "bool_parsing"):
        return where, f"{shown(error['input'])} should be true or false{_truth_value(error['input'])}"
    if error["type"] != "value_error":
        return where, f"{shown(error['input'])} {message}"
    word, _, rest = message.partition(" ")
    return ([*where, word], rest) if where and word in _allowed_keys(kind, where) else (where, message)


_EXPLAIN = {
    "extra_forbidden": _explain_extra,
    "missing": _explain_missing,
    "union_tag_not_found": _explain_no_tag,
    "union_tag_invalid": _explain_tag,
    "literal_error": _explain_literal,
    "model_type": _explain_table,
    "model_attributes_type": _explain_table,
}


def _tags(kind: type[BaseModel], where: list[str]) -> list[str]:
    """Return the names that the union at ``where`` knows, a model's presets among them."""
    options = [o.model_fields for o in _members(_at(kind, where))]
    names = [fields["name"].annotation for fields in options if "name" in fields]
    tags = [tag for annotation in names for tag in getattr(annotation, "__args__", ())]
    return tags + (list(PRESETS) if where == ["model"] else [])


def _key_path(kind: type[BaseModel], where: list[str]) -> str:
    """Join a location for the start of a message."""
    kept = _without_tags(kind, where)
    return f"{'.'.join(plain(part) for part in kept)}: " if kept else ""


def _without_tags(kind: type[BaseModel], where: list[str]) -> list[str]:
    """Return a location without the tags that pydantic adds for discriminated unions."""
    return [p for i, p in enumerate(where) if not (i == 1 and p in (*_tags(kind, where[:1]), BY_IMPORT_PATH))]


def _every_key(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Yield every key of a recipe and of its tables, such as ``train`` and ``train.epochs``; some more than once."""
    for model in _members(annotation):
        for key, field in model.model_fields.items():
            yield f"{prefix}{key}"
            yield from _every_key(field.annotation, f"{prefix}{key}.")


def _at(kind: type[BaseModel], where: list[str]) -> Any:
    """Return the type at ``where``, following nested models and union tags."""
    current: Any = kind
    for part in where:
        current = _step_into(current, part)
    return current


def _allowed_keys(kind: type[BaseModel], where: list[str]) -> list[str]:
    """Return the keys of the table at ``where``."""
    models = _members(_at(kind, where))
    return list(models[0].model_fields) if len(models) == 1 else []


def _members(annotation: Any) -> list[Any]:
    """Return the models of a type, of a union, or of a union of unions."""
    if hasattr(annotation, "__metadata__"):  # Annotated[...]
        return _members(annotation.__origin__)
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for member in getattr(annotation, "__args__", ()) for model in _members(member)]


def _step_into(current: Any, part: str) -> Any:
    """Return the model below ``current`` that ``part`` (a key, or a union's tag) leads to."""
    if hasattr(current, "model_fields"):
        return current.model_fields[part].annotation if part in current.model_fields else None
    for option in _members(current):
        tag = option.model_fields.get("name")
        if tag is not None and part in getattr(tag.annotation, "__args__", (BY_IMPORT_PATH,)):
            return option
        if part in option.model_fields:
            return option.model_fields[part].annotation
    return None
