"""Where a run goes on that began with other code, on other hardware or with other versions of packages."""

from typing import Any

from fastcifar.environment import describe
from fastcifar.run_directory import RunDirectory, as_json
from fastcifar.train.display import tell
from fastcifar.train.follower import Follower

KEYS = ("hardware", "git", "packages")
"""What of the environment a resumed run tells, and keeps, where it is not what it was."""


def record_resumption(run: RunDirectory | Follower, epochs_done: int, here: dict[str, Any] | None = None) -> None:
    """Say and keep in ``environment.json`` under ``resumed`` what has changed since the run was last at work.

    A result is of the code and the machine that made it: a run that two of them have made is none of either.

    Args:
        run: that goes on.
        epochs_done: how many it has finished.
        here: the environment, as `fastcifar.environment.describe` returns it; None looks.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    if isinstance(run, Follower):
        return
    here, places = here or describe(), run.environment.get("resumed", [])
    before = places[-1] if places else run.environment
    # What an environment does not say, as those of older versions, cannot have changed.
    changed = [key for key in KEYS if before.get(key) is not None and before[key] != here.get(key)]
    if not changed:
        return
    changes = "; ".join(_change(key, before[key], here.get(key)) for key in changed)
    tell(f"{run.folder}: goes on after epoch {epochs_done} with {changes}")
    run.environment["resumed"] = [*places, {"epochs_done": epochs_done, **{key: here.get(key) for key in KEYS}}]
    run.commit({"environment.json": as_json(run.environment)})


def _change(key: str, old: Any, new: Any) -> str:
    """Return in words what a value of the environment is now, and what it was."""
    if key != "packages":
        return f"{'revision' if key == 'git' else key} {new or 'unknown'} (was {old})"
    versions = [(name, (new or {}).get(name), old.get(name)) for name in sorted({*old, *(new or {})})]
    return ", ".join(f"{name} {now or 'missing'} (was {was or 'missing'})" for name, now, was in versions if now != was)
