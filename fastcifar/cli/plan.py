"""``fastcifar plan``: what a recipe would do, what it needs and how long it would take, without training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcifar.cli.options import Data, OptionalRecipeName, Settings
from fastcifar.errors import UserError, nearest, plain

if TYPE_CHECKING:
    from fastcifar.config import CombineRecipe, Recipe
    from fastcifar.data.store import Store

NOT_MEASURED = "not measured yet"


def plan(
    recipe: OptionalRecipeName = None,
    ladder: Annotated[bool, typer.Option(help="Every row of the ladder, with its predicted time.")] = False,
    gpu: Annotated[
        str | None,
        typer.Option(help="Predict for this hardware, from its benchmark results; for h100 and h200 also without any."),
    ] = None,
    set_: Settings = None,
    data: Data = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object.")] = False,
    devices: Annotated[int, typer.Option(min=1, help="Say what dividing each batch among so many changes.")] = 1,
) -> None:
    """Say what would run: parameters, GMACs, steps, data, backend, memory, time. Nothing is trained or written.

    Times come from step times that `fastcifar bench step-times` measured; without them they are "not measured yet".
    For H100 and H200, seconds an epoch are predicted besides, from the launches in the ledger, the model's bytes and
    FLOPs, and data-sheet peaks at an assumed efficiency: predicted, never measured.
    """
    from fastcifar.config import load_recipe
    from fastcifar.console import answers, out

    if ladder == (recipe is not None):
        raise UserError("plan: name a recipe (`fastcifar plan lenet5`), or say --ladder, not both")
    hardware, times = measured(gpu)
    if recipe is None:
        table = ladder_table(hardware, times)
        out(table) if json_ else answers().print(ladder_view(table))
        return
    loaded = load_recipe(recipe, set_ or [])
    told = combination(loaded) if hasattr(loaded, "combine") else describe(loaded, data, hardware, times, devices)
    if json_:
        out(told)
    else:
        show(told)


# ---------------------------------------------------------------------------------------------------------- one recipe


def describe(
    recipe: "Recipe", data: Path | None, hardware: str, times: dict[str, float], devices: int = 1
) -> dict[str, Any]:
    """Return the plan of a training run as plain values; memory in MiB on each device, times in seconds."""
    from fastcifar.config.user_code import is_import_path, record
    from fastcifar.device import pick_device, with_precision
    from fastcifar.models import budget
    from fastcifar.models.cost import cost_of_config
    from fastcifar.models.memory import check_memory, memory_mib
    from fastcifar.train.execution import choose_mode

    where, store, images = find_data(recipe, data)
    device = pick_device(recipe.engine)
    here = with_precision(recipe, device)
    compiled, captured, why = choose_mode(recipe.engine, device, is_import_path(recipe.optimizer.name))
    mode = " + ".join(["compiled"] * compiled + ["CUDA graph"] * captured) or "eager"
    facts = {"num_classes": len(store.classes), "image_px": store.image_shape[0]} if store else {}
    cost = cost_of_config(recipe.model, **facts)
    trained = budget.images_to_train(recipe, images)
    steps = budget.steps_per_epoch(recipe, trained)
    prediction = budget.predict(recipe, times, images)
    memory = memory_mib(here, cost.parameters, trained, devices=devices, **facts)
    check_memory(recipe.name, memory, device)
    return {
        "recipe": recipe.name,
        "model": {"name": recipe.model.name, "parameters": cost.parameters, "gmacs": cost.macs / 1e9},
        "training": {
            "images": trained, "holdout": recipe.data.holdout, "batch_size": recipe.train.batch_size,
            "steps_per_epoch": steps, "epochs": recipe.train.epochs, "steps": steps * recipe.train.epochs,
            "passes_per_step": recipe.passes_per_step,
        },
        "data": where,
        "backend": {
            "device": str(device), "mode": mode, "mode_reason": why, "precision": here.engine.precision,
            "loader": backend(recipe, store, trained, device),
        },
        "memory_mib": memory,
        "time": {"hardware": hardware, "total_s": prediction.total_s if prediction else None},
        "predicted": predicted(recipe, hardware),
        "divided": divided(recipe, hardware, trained, cost.parameters, devices),
        "optimizer": {"name": recipe.optimizer.name, "fused": not is_import_path(recipe.optimizer.name)},
        "user_code": record(recipe),
    }  # fmt: skip


def divided(
    recipe: "Recipe", hardware: str, images: int, parameters: int, devices: int
) -> dict[str, Any] | None:
    """Return what dividing each batch among devices changes, None for one; predicted times where the card is known.

    Raises:
        UserError: the batches cannot be divided among so many.
    """
    from dataclasses import asdict

    from fastcifar.locations import results_folders
    from fastcifar.models.gpu_prediction import card_of, read_ledger
    from fastcifar.models.scaling import PREDICTED, divide, predict_step
    from fastcifar.train.checks import check_division

    if devices == 1:
        return None
    check_division(recipe, images, devices)
    division, card = divide(recipe, devices, parameters), card_of(hardware)
    found = {**asdict(division), "words": division.lines(recipe), "step": None}
    if card is not None:
        step, alone = (predict_step(recipe, n, card, read_ledger(results_folders())) for n in (devices, 1))
        found["step"] = {"status": PREDICTED, "card": card.name, **asdict(step), "step_s": step.step_s,
                         "times_one_device": step.images_per_s / alone.images_per_s}  # fmt: skip
    return found


def divided_lines(told: dict[str, Any] | None) -> list[str]:
    """Return in words what dividing each batch changes; nothing for one device."""
    if told is None:
        return []
    found, step = [f"devices  {words}" for words in told["words"]], told["step"]
    if step is not None:
        found.append(
            f"a step   {1e3 * step['step_s']:.3g} ms on {told['devices']} {step['card']}, "
            f"{1e3 * step['communication_s']:.3g} of it all-reduces: {step['times_one_device']:.3g} times one "
            f"({step['status']})"
        )
    return found


def predicted(recipe: "Recipe", hardware: str) -> dict[str, Any] | None:
    """Return the predicted epoch on a card that we have the data sheet of, or None for other hardware."""
    from fastcifar.locations import results_folders
    from fastcifar.models.gpu_prediction import card_of, predict_epoch, read_ledger

    card = card_of(hardware)
    return predict_epoch(recipe, card, read_ledger(results_folders())).told() if card else None


def find_data(recipe: "Recipe", data: Path | None) -> tuple[dict[str, Any], "Store | None", int]:
    """Return where the recipe's data is (or how to get it), the store if it is one, and its training images."""
    from fastcifar.data.sources import SYNTHETIC_COUNTS
    from fastcifar.data.store import Store, converted, kind_of, locate
    from fastcifar.models.budget import CIFAR_TRAIN

    source = kind_of(recipe.data.source, data)
    if source == "synthetic":
        made = {"source": source, "found": True, "where": "made by fastcifar, nothing to get"}
        return made, None, SYNTHETIC_COUNTS["train"]
    try:
        found = locate(source, data)
    except UserError as error:
        return {"source": source, "found": False, "where": str(error)}, None, CIFAR_TRAIN
    if isinstance(found, Store):
        place = f"{found.root} ({found.format} store)"
        return {"source": source, "found": True, "where": place}, found, found.count("train")
    store = converted(found)
    if store is not None:
        place = f"{found.path} (converted: {store.root})"
        return {"source": source, "found": True, "where": place}, store, store.count("train")
    told = "converted at first use" + ("" if found.release else f"; taken for {CIFAR_TRAIN:,} images until then")
    return {"source": source, "found": True, "where": f"{found.path} ({told})"}, None, CIFAR_TRAIN


def backend(recipe: "Recipe", store: "Store | None", images: int, device: Any) -> str:
    """Return the loader that would be used, with the reason; the store's image size counts, else 32x32x3."""
    from fastcifar.data.loaders import choose_backend, choose_order
    from fastcifar.data.manifest import Manifest
    from fastcifar.data.store import Store

    sized = store or Store(Path(), Manifest.model_construct(**{"image_shape": [32, 32, 3]}))  # type: ignore[arg-type]
    in_workers = recipe.augment if recipe.augment.where == "loader" else None
    name, reason = choose_backend(recipe.data.loader, sized, images, device, in_workers)
    return f"{name} ({reason}{choose_order(recipe.data.loader, name, sized, images)[2]})"


def combination(recipe: "CombineRecipe | Recipe") -> dict[str, Any]:
    """Return the plan of a combination: it trains nothing and needs its members' runs."""
    combine = recipe.combine  # type: ignore[union-attr]
    return {"recipe": recipe.name, "how": combine.how, "protocol": combine.protocol, "members": combine.members}


def show(told: dict[str, Any]) -> None:
    """Print a plan for people."""
    from fastcifar.console import answer

    for line in lines(told):
        answer(line)


def lines(told: dict[str, Any]) -> list[str]:
    """Return a plan in aligned lines."""
    from fastcifar.text import duration

    if "members" in told:
        return [f"recipe   {told['recipe']}: {told['how']} combination ({told['protocol']} protocol)",
                f"members  {', '.join(told['members'])}: their runs must be there"]  # fmt: skip
    model, training, data, where = told["model"], told["training"], told["data"], told["backend"]
    memory, total_s = told["memory_mib"], told["time"]["total_s"]
    why = f" ({where['mode_reason']})" if where["mode_reason"] else ""
    passes = ", 2 passes each" if training["passes_per_step"] == 2 else ""
    time = f"{duration(total_s)} predicted for {told['time']['hardware']}" if total_s is not None else NOT_MEASURED
    each = f" on each of {told['divided']['devices']}" if told["divided"] else ""
    return [
        f"recipe   {told['recipe']}",
        f"model    {model['name']}: {model['parameters']:,} parameters, {model['gmacs']:.4f} GMACs an image",
        f"steps    {training['steps']:,}{passes}: {training['epochs']} epochs of {training['steps_per_epoch']:,}, "
        f"batch {training['batch_size']}, {training['images']:,} images (holdout {training['holdout']:,})",
        f"data     {data['source']}: {data['where']}",
        f"loader   {where['loader']}",
        f"engine   {where['device']}, {where['mode']}{why}, {where['precision']}",
        f"memory   about {memory['total']:,.0f} MiB{each}: {memory['weights_and_state']:,.0f} weights and their state, "
        f"{memory['activations']:,.0f} activations (eager), {memory['images']:,.0f} images where they are resident",
        f"time     {time}",
        *predicted_lines(told["predicted"]),
        *divided_lines(told["divided"]),
        *user_code_lines(told),
    ]


def user_code_lines(told: dict[str, Any]) -> list[str]:
    """Return what a plan has to say of code by import path; nothing where the recipe names none."""
    from fastcifar.config.user_code import identity_in_words

    found = [f"code     {path}: {identity_in_words(of)}" for path, of in told["user_code"].items()]
    if not told["optimizer"]["fused"]:
        found.append(f"update   {told['optimizer']['name']}, without the fused update and not captured as a CUDA graph")
    return found


def predicted_lines(told: dict[str, Any] | None) -> list[str]:
    """Return a predicted epoch in words, with its parts and all that is assumed; nothing where there is none."""
    if told is None:
        return []
    assumed, kernels = told["assumptions"], told["kernels_per_step"]
    card = assumed["card"]
    parts = ", ".join(f"{part} {told[f'{part}_s']:.3g}" for part in ("library", "generated", "own", "launches"))
    count = "" if kernels is None else f", {kernels:,.0f} kernels a step"
    peaks = ", ".join(f"{name} {peak:,.5g}" for name, peak in card["tflops"].items())
    floor = "at least " if told["basis"] == "floor" else ""  # launches, the most of a small model's time, are not in it
    return [
        f"epoch    {floor}{told['epoch_s']:.3g} s on {card['name']} ({told['status']}): {parts}, "
        f"evaluation {told['evaluation_s']:.3g}",
        f"from     {told['source']}{count}",
        f"assumed  {assumed['arithmetic']:.0%} of the peak in TFLOP/s ({peaks}), {assumed['memory']:.0%} of "
        f"{card['gbs']:,.0f} GB/s ({card['source']}), {1e6 * assumed['kernel_s']:.2g} us a kernel in a CUDA graph",
    ]


# ---------------------------------------------------------------------------------------------------------- the ladder


def measured(gpu: str | None) -> tuple[str, dict[str, float]]:
    """Return the hardware to predict for and its measured times; none where nothing was measured on this machine's.

    Raises:
        UserError: nothing is known of the hardware that ``gpu`` names: neither a result nor a data sheet.
    """
    from fastcifar.cli.bench import hardware
    from fastcifar.locations import results_folders
    from fastcifar.models import budget
    from fastcifar.models.gpu_prediction import card_of

    if gpu is None:
        from fastcifar.environment import describe as environment

        name = hardware(environment())
    else:
        name = gpu
    files = [file for folder in results_folders() for file in budget.results_of(folder, name)]
    if gpu is not None and not files and card_of(gpu) is None:
        raise UserError(unknown_hardware(gpu))
    return name, budget.measured_times(files)


def unknown_hardware(gpu: str) -> str:
    """Return what to say of hardware of which nothing is known, with the names that would do."""
    from fastcifar.locations import results_folders
    from fastcifar.models import budget
    from fastcifar.models.gpu_prediction import CARDS

    names = sorted({name for folder in results_folders() for name in budget.measured_hardware(folder)})
    return (
        f"--gpu {plain(gpu)}: nothing is known of this hardware{nearest(gpu.lower(), [*CARDS, *names])}; "
        f"predicted from data sheets: {', '.join(CARDS)}; measured: {', '.join(names) or 'none'}; "
        "on the hardware itself, `fastcifar bench step-times` measures it"
    )


def ladder_table(hardware: str, times: dict[str, float]) -> dict[str, Any]:
    """Return each row's epochs, steps, milliseconds a step and predicted seconds; None where it was not measured.

    ``predicted_epoch_s`` is of no measurement; ``basis`` is "ledger", or "floor" where no launches are known.
    """
    from fastcifar.config import Recipe
    from fastcifar.ladder.rows import catalogue, ladder_rows
    from fastcifar.models import budget

    rows = []
    for name in ladder_rows():
        recipe = catalogue()[name]
        if not isinstance(recipe, Recipe):
            continue
        found, epoch = budget.predict(recipe, times), predicted(recipe, hardware)
        rows.append({
            "recipe": name, "epochs": recipe.train.epochs,
            "steps": recipe.train.epochs * budget.steps_per_epoch(recipe, budget.images_to_train(recipe)),
            "step_ms": 1e3 * found.step_s if found else None, "total_s": found.total_s if found else None,
            "predicted_epoch_s": epoch["epoch_s"] if epoch else None, "basis": epoch["basis"] if epoch else None,
        })  # fmt: skip
    known = [row["total_s"] for row in rows if row["total_s"] is not None]
    return {"hardware": hardware, "rows": rows, "measured_rows": len(known), "total_s": sum(known) or None}


def ladder_view(table: dict[str, Any]) -> Any:
    """Return the ladder's table for people."""
    from rich.table import Table

    from fastcifar.text import duration

    title = f"{table['hardware']}: {table['measured_rows']} of {len(table['rows'])} rows measured"
    total = duration(table["total_s"]) if table["total_s"] else NOT_MEASURED
    unmeasured = any(row["basis"] for row in table["rows"])
    note = "\ns an epoch: predicted, never measured; * the cost model's floor, without launches" if unmeasured else ""
    caption = f"measured rows together: {total}{note}"
    view = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in ("recipe", "epochs", "steps", "ms a step", "predicted", *(["s an epoch"] if unmeasured else [])):
        view.add_column(column, justify="left" if column == "recipe" else "right")
    for row in table["rows"]:
        step = NOT_MEASURED if row["step_ms"] is None else f"{row['step_ms']:.2f}"
        time = NOT_MEASURED if row["total_s"] is None else duration(row["total_s"])
        epoch = [f"{row['predicted_epoch_s']:.3g}{'*' * (row['basis'] == 'floor')}"] if unmeasured else []
        view.add_row(row["recipe"], str(row["epochs"]), f"{row['steps']:,}", step, time, *epoch)
    return view
