"""Whether a run is one of what was published: its recipe, and its members' recipes, against the shipped ones."""

from fastcifar.config.shipped import recipe_differs
from fastcifar.run_directory import RunDirectory

# Setting images aside, or keeping logits of them, is what a combination asks of its members.
OF_A_MEMBER = ("data.holdout", "data.holdout_seed")


def differs(run: RunDirectory) -> list[str] | None:
    """Return in which keys a run's recipe differs from the shipped one that published accuracies are of.

    Returns:
        Key paths such as ``train.epochs``, a combination's with those of its members' recipes (``lenet5:
        train.epochs``), none where nothing differs; None where there is no such shipped recipe.
    """
    own = recipe_differs(run.recipe)
    members = run.summary.get("members") or []
    theirs = [f"{member['name']}: {key}" for member in members for key in member.get("recipe_differs") or []]
    return theirs or None if own is None else own + theirs


def member_differs(run: RunDirectory) -> list[str] | None:
    """Return in which keys a member's recipe differs from the shipped one of its name; see `differs`."""
    return recipe_differs(run.recipe, OF_A_MEMBER)
