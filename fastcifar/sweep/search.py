"""A sweep: an Optuna study in the output folder, whose trials are run directories beside it.

The search looks at the holdout alone: its accuracy decides which values are tried next, which trial is pruned, and
which is the best. The test set is evaluated in each run as ever, and read by nothing here but the last table, for the
best trial. Without a holdout there is nothing honest to search by, so that such a recipe is refused.

Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", arXiv:1907.10902.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from fastcifar.config import Recipe, load_recipe, to_toml
from fastcifar.errors import UserError, root_cause
from fastcifar.ladder.execute import Deadline, RowFailed, RunRow, places_for
from fastcifar.ladder.rows import Job
from fastcifar.ladder.runner import ENDED_WITH, KILLED
from fastcifar.ladder.state import DONE, stored_state
from fastcifar.locations import install_command
from fastcifar.run_directory import CANNOT_WRITE, GONE, AtWorkError, RunDirectory, write_atomic
from fastcifar.sweep.spaces import Space

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

# Optuna's own defaults for its median pruner: a trial is cut where the median of at least five others was better.
STARTUP_TRIALS = 5
# What decides which images are held out; trials with different ones cannot be compared.
NOT_SEARCHED = ("data.holdout", "data.holdout_seed", "seed")
# So many failures, and nothing else, end a sweep.
FIRST_FAILURES = 3
# What a recipe says of itself, which decides nothing.
TEXTS = ("title", "stage", "published", "target")
STUDY = "study.db"
# What a trial's user attributes in the study hold: its run directory's name, and why it failed.
RUN, MESSAGE = "run", "message"
# How failures read whose reason a trial's values never are: a full disk, where not even the log may have had room for
# it, a folder that was moved, a killed process.
NOT_BY_VALUES = (CANNOT_WRITE, ENDED_WITH, GONE, KILLED)


@dataclass(frozen=True)
class Problem:
    """What is searched.

    Attributes:
        recipe: a recipe file, or the name of a shipped one.
        fixed: settings of every trial, such as ``train.epochs=5``.
        spaces: of the keys to search.
    """

    recipe: str
    fixed: Sequence[str]
    spaces: Sequence[Space]

    def with_values(self, settings: Sequence[str]) -> Recipe:
        """Return the recipe with the fixed settings and those of a trial.

        Raises:
            UserError: the recipe does not accept them, combines trained models, or sets no holdout aside.
        """
        loaded = load_recipe(self.recipe, [*self.fixed, *settings])
        if not isinstance(loaded, Recipe):
            raise UserError(f"{self.recipe}: combines trained models; a sweep searches a recipe that trains")
        if not loaded.data.holdout:
            raise UserError(
                f"{self.recipe}: sets no training images aside, and a search never looks at the test set: "
                "add --set data.holdout=5000"
            )
        return loaded

    def check(self) -> Recipe:
        """Make sure that the recipe accepts both ends of each range and each alternative; return it with the first.

        Raises:
            UserError: it does not, there is nothing to search, or a space cannot be searched by the holdout.
        """
        if not self.spaces:
            raise UserError(
                "nothing to search: give at least one space, such as --set 'optimizer.lr=log(0.01, 1)'"
            )
        for space in self.spaces:
            if space.key in NOT_SEARCHED:
                raise UserError(f"{space.key}: decides which images are held out; a sweep cannot search it")
        first = [space.ends()[0] for space in self.spaces]
        for i, space in enumerate(self.spaces):
            for setting in space.ends():
                self.with_values([*first[:i], setting, *first[i + 1 :]])
        return self.with_values(first)

    def grid(self) -> list[dict[str, Any]] | None:
        """Return every combination of values, or None where they cannot be listed."""
        values = [space.all_values() for space in self.spaces]
        if any(v is None for v in values) or math.prod(len(v or ()) for v in values) > 100_000:
            return None
        keys = [space.key for space in self.spaces]
        return [dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*(v or () for v in values))]

    def identity(self, recipe: Recipe) -> str:
        """Return what must be the same when a sweep goes on, as text."""
        searched = {space.key: [str(space)] for space in self.spaces}
        return json.dumps([_without(recipe.model_dump(mode="json"), [*TEXTS, *searched]), searched], sort_keys=True)

    def is_same(self, stored: str, recipe: Recipe) -> bool:
        """Whether a stored identity is that of this search.

        A key that recipes did not have yet when it was stored stands there for its default.
        """
        known, searched = json.loads(stored)
        if searched != json.loads(self.identity(recipe))[1]:
            return False
        try:
            old = Recipe.model_validate(_with(known, recipe.model_dump(mode="json"), [*TEXTS, *searched]))
        except ValidationError:  # it has a key that recipes have lost since, or a value that they refuse now
            return False
        return old == recipe


def _without(table: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return a copy of nested tables without some keys, written as ``optimizer.lr``."""
    kept = {}
    for name, value in table.items():
        below = [key.removeprefix(f"{name}.") for key in keys if key.startswith(f"{name}.")]
        if name not in keys:
            kept[name] = _without(value, below) if isinstance(value, dict) else value
    return kept


def _with(table: dict[str, Any], other: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return a copy of nested tables with some keys, written as ``optimizer.lr``, as another one has them."""
    merged = dict(table)
    for key in keys:
        name, _, below = key.partition(".")
        inner = merged.get(name)
        if below and isinstance(inner, dict) and isinstance(other[name], dict):
            merged[name] = _with(inner, other[name], [below])
        elif name in other:
            merged[name] = other[name]
    return merged


class Sweep:
    """One execution of a sweep; the next goes on where this one stops, however it stops.

    Args:
        problem: what is searched.
        run_row: executes a trial's run, as a row of the ladder.
        out: the folder of the study and of the trials' run directories.
        jobs: how many trials at once.
        prune: stop a trial that is worse on the holdout than the median of the others at that epoch.
        say: tells of an event.
    """

    def __init__(
        self, problem: Problem, run_row: RunRow, out: Path, jobs: int, prune: bool, say: Callable[[str], None]
    ) -> None:
        self.problem, self.run_row, self.out, self.jobs, self.prune, self.say = problem, run_row, out, jobs, prune, say
        self.first = problem.check()
        self.deadline = Deadline()
        self.study = open_study(problem, self.first, out, jobs)

    def execute(self, trials: int) -> None:
        """Search until the study has so many trials, or every combination.

        Raises:
            UserError: the first trials failed, so that all would.
            Interrupted: a signal came; the trials that were running are resumed by the next execution.
        """
        revive(self.study, self.out)
        grid = self.problem.grid()
        if grid is None or len(grid) > trials:
            return self._search(trials - len(ended(self.study)))
        known = known_values(self.study)
        for values in grid:
            if frozenset(values.items()) not in known:
                self.study.enqueue_trial(values)
        # An earlier execution, of fewer trials, may have drawn some values twice: what is left is counted by itself.
        return self._search(len(waiting(self.study)))

    def _search(self, left: int) -> None:
        """Keep every place busy until so many trials more have ended.

        Optuna is asked and told in this thread alone: of two threads that take a trial from the queue of an SQLite
        study at once, both may get the same one.
        """
        running: dict[Future[float], optuna.Trial] = {}
        with places_for(self.jobs) as places:
            try:
                while left > 0 or running:
                    while left > 0 and len(running) < self.jobs:
                        trial = self.study.ask()
                        settings = [space.suggest(trial) for space in self.problem.spaces]
                        running[places.submit(self._train, trial, settings)] = trial
                        left -= 1
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        self._tell(running.pop(future), future)
            except BaseException:
                self.deadline.end_now()  # for the trials in the other places, whose end the executor waits for
                raise

    def job(self, trial: "optuna.Trial", settings: Sequence[str]) -> tuple[Job, Recipe]:
        """Return a trial's run, with its recipe: the one that it goes on with, or a new one that bears its number.

        Raises:
            UserError: the recipe does not accept these values together.
        """
        name = trial.user_attrs.get(RUN) or f"trial-{trial.number:04d}"
        trial.set_user_attr(RUN, name)
        recipe = self.problem.with_values(settings)
        return Job(name, recipe.seed, recipe, self.out / name, {}, 0), recipe

    def _train(self, trial: "optuna.Trial", settings: Sequence[str]) -> float:
        """Train one trial; return its accuracy on the holdout at the last epoch, in percent.

        Raises:
            TrialPruned: it was stopped as one of the worse.
            RowFailed, UserError: its run ended with an error.
            OutOfTime, Interrupted: it was stopped to be resumed.
        """
        import optuna

        job, recipe = self.job(trial, settings)
        known: dict[int, float] = {}  # accuracies by epoch, as far as Optuna has been told

        def progress(text: str = "") -> None:
            report(trial, job, known)
            at_work = known and max(known) < recipe.train.epochs  # after the last epoch there is nothing to save
            if self.prune and at_work and trial.should_prune():
                raise optuna.TrialPruned

        if stored_state(job) != DONE:
            self.run_row(job, self.deadline, progress)
        report(trial, job, known)
        if stored_state(job) != DONE or not known:
            raise RowFailed("ended without a result")
        return known[max(known)]

    def _tell(self, trial: "optuna.Trial", future: "Future[float]") -> None:
        """Tell Optuna, and whoever watches, how a trial ended.

        Raises:
            UserError: the first trials failed.
            AtWorkError: another process has the lock of its run, which says nothing about its values.
            BaseException: whatever else stopped the trial, which then is to be resumed.
        """
        import optuna

        error, name, states = future.exception(), trial.user_attrs[RUN], optuna.trial.TrialState
        if error is None:
            self.study.tell(trial, future.result())
            self.say(f"{name}: {future.result():.2f}% of the holdout: {in_words(trial)}")
        elif isinstance(error, optuna.TrialPruned):
            self.study.tell(trial, state=states.PRUNED)
            self.say(f"{name}: pruned: {in_words(trial)}")
        elif isinstance(error, RowFailed | UserError) and not isinstance(error, AtWorkError):
            trial.set_user_attr(MESSAGE, str(error))
            self.study.tell(trial, state=states.FAIL)
            self.say(f"{name}: failed: {error}")
            self._refuse_failures(str(error))
        else:
            raise error

    def _refuse_failures(self, message: str) -> None:
        """End a sweep none of whose trials has ever got to the end of an epoch: all would fail.

        Raises:
            UserError: with the last trial's message.
        """
        known = self.study.get_trials(deepcopy=False)
        failed = [t for t in ended(self.study) if MESSAGE in t.user_attrs]
        if len(failed) >= FIRST_FAILURES and not any(t.intermediate_values for t in known):
            raise UserError(f"the first {len(failed)} trials failed; the last one: {message}")

    # ------------------------------------------------------------------------------------------------------ the result

    def write_best(self) -> Path | None:
        """Write the best trial's recipe as ``best.toml``; None where no trial is complete.

        Raises:
            UserError: its run has another accuracy than the study.
        """
        best = best_of(self.study)
        if best is None:
            return None
        run = RunDirectory.open(self.out / best.user_attrs[RUN])
        if best.value not in holdout_accuracies(run).values():
            raise UserError(
                f"{self.out / STUDY}: says {best.value} of the holdout for {run.folder.name}, which says otherwise; "
                "one of the two is damaged: choose another --out"
            )
        head = (
            f"# The best of {len(ended(self.study))} trials: {best.value:.2f}% of {self.first.data.holdout:,} held-out "
            "training images at the last epoch.\n"
            "# The images are still held out: with data.holdout = 0 it trains on all of them.\n"
        )
        write_atomic(self.out / "best.toml", head + to_toml(run.recipe))
        return self.out / "best.toml"


def open_study(problem: Problem, recipe: Recipe, out: Path, jobs: int) -> "optuna.Study":
    """Open or make the study in ``study.db``.

    Raises:
        UserError: Optuna is not installed, or the study is damaged or of another search.
    """
    optuna = import_optuna()
    out.mkdir(parents=True, exist_ok=True)
    check_database(out / STUDY)
    storage = f"sqlite:///{(out / STUDY).absolute()}"
    pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS)
    study = optuna.create_study(
        storage=storage, study_name="sweep", direction="maximize", load_if_exists=True, pruner=pruner
    )
    # A sampler begins its random numbers anew in each process: another seed, or it would draw the first values again.
    seed = (recipe.seed * 1_000_003 + len(study.get_trials(deepcopy=False))) % 2**32
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=jobs > 1)
    identity = problem.identity(recipe)
    if not problem.is_same(study.user_attrs.get("problem", identity), recipe):
        raise UserError(f"{out}: holds a sweep of another recipe or other spaces; choose another --out")
    study.set_user_attr("problem", identity)
    return study


def check_database(path: Path) -> None:
    """Let SQLite look at a whole study, which it would else find damaged in the middle of a search, or not at all.

    Raises:
        UserError: it is damaged.
    """
    import sqlite3

    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(path)) as database:
            found = [row[0] for row in database.execute("PRAGMA integrity_check(1)")]
    except sqlite3.DatabaseError as error:
        found = [str(error)]
    if found != ["ok"]:
        raise UserError(f"{path}: is damaged as a study ({found[0]}); move it away, or choose another --out")


@contextmanager
def study_errors(path: Path) -> Iterator[None]:
    """Say in one message, for a ``with`` block, what keeps Optuna from reading or writing its study.

    Raises:
        UserError: a full disk, one that cannot be written, or a study that another version or a fault has spoilt.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("sqlalchemy", "optuna"):
            raise
        raise UserError(f"{path}: cannot be read or written as a study ({root_cause(error)})") from None


def import_optuna() -> Any:
    """Return the package, silent: what it would log is said by this command itself.

    Raises:
        UserError: it is not installed; the message says how to.
    """
    try:
        import optuna
    except ImportError:
        raise UserError(f"a sweep needs Optuna: {install_command('sweep')}") from None
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    return optuna


def revive(study: "optuna.Study", out: Path) -> None:
    """Put trials that an earlier execution has left behind in the queue again, to go on in their run directories.

    Those are the trials that it was stopped in, and those that failed without any fault of their values; see
    `may_go_on`. Nobody else works on the study: the folder is locked. A trial cannot be taken back, so that another
    one with its values and its run takes its place; `ended` leaves the old one out.
    """
    import optuna

    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        queue_again(study, trial)
    for trial in ended(study):
        if may_go_on(study, trial, out):
            queue_again(study, trial)


def queue_again(study: "optuna.Study", trial: "FrozenTrial") -> None:
    """Queue a trial's values for its run directory once more, where it got as far as having values."""
    # A trial that came from the queue, and got no further, has only what the queue said.
    values = trial.params or trial.system_attrs.get("fixed_params")
    if values:
        run = {RUN: trial.user_attrs[RUN]} if RUN in trial.user_attrs else {}
        study.enqueue_trial(values, user_attrs=run)


def may_go_on(study: "optuna.Study", trial: "FrozenTrial", out: Path) -> bool:
    """Whether a failed trial deserves another attempt.

    One whose disk was full or whose process was killed does, each time. Any other one whose run has begun, and is not
    finished, does once: what fails twice in the same way fails by its values.
    """
    message = trial.user_attrs.get(MESSAGE)
    if message is None or trial.state.name != "FAIL":
        return False
    if any(reason in message for reason in NOT_BY_VALUES):
        return True
    run, earlier = trial.user_attrs[RUN], study.get_trials(deepcopy=False)[: trial.number]
    failed = [other.user_attrs for other in earlier if MESSAGE in other.user_attrs]
    before = [known[MESSAGE] for known in failed if known[RUN] == run]
    return begun(out / run) and [_kind(text) for text in before[-1:]] != [_kind(message)]


def begun(folder: Path) -> bool:
    """Whether a run that is not finished lies there, in a folder that can be read."""
    with suppress(UserError):
        return RunDirectory.exists(folder) and not RunDirectory.open(folder).finished
    return False


def _kind(message: str) -> str:
    """Return a message without its numbers: the same loss may cease to be finite a step later."""
    return re.sub(r"\d+", "", message)


def waiting(study: "optuna.Study") -> "list[FrozenTrial]":
    """Return the trials in the queue."""
    import optuna

    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))


def known_values(study: "optuna.Study") -> set[frozenset[tuple[str, Any]]]:
    """Return the values, as pairs with their keys, of every trial that has ended or is in the queue."""
    queued = [trial.system_attrs["fixed_params"] for trial in waiting(study)]
    return {frozenset(values.items()) for values in [*(trial.params for trial in ended(study)), *queued]}


def ended(study: "optuna.Study") -> "list[FrozenTrial]":
    """Return the trials that are complete, pruned or failed, without those that another one has taken the place of."""
    import optuna

    states = optuna.trial.TrialState
    trials = study.get_trials(deepcopy=False)
    newest = {trial.user_attrs[RUN]: trial.number for trial in trials if RUN in trial.user_attrs}

    def counts(trial: "FrozenTrial") -> bool:
        """Whether a failed trial failed by an error, after which no other one has taken up its run."""
        return MESSAGE in trial.user_attrs and newest[trial.user_attrs[RUN]] == trial.number

    return [t for t in trials if t.state in (states.COMPLETE, states.PRUNED) or (t.state == states.FAIL and counts(t))]


def best_of(study: "optuna.Study") -> "FrozenTrial | None":
    """Return the complete trial with the highest accuracy on the holdout, the earliest of equals."""
    import optuna

    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)


def report(trial: "optuna.Trial", job: Job, known: dict[int, float]) -> None:
    """Tell Optuna the accuracies of the epochs that are new, and note them in ``known``."""
    for epoch, accuracy in holdout_accuracies(RunDirectory(job.folder)).items():
        if epoch not in known:
            known[epoch] = accuracy
            trial.report(accuracy, epoch)


def holdout_accuracies(run: RunDirectory) -> dict[int, float]:
    """Return the accuracy on the holdout after each evaluated epoch, of the weights that the run reports."""
    rows = run.metrics() if RunDirectory.exists(run.folder) else []
    return {row["epoch"]: list(row["holdout"].values())[-1]["accuracy"] for row in rows if "holdout" in row}


def in_words(trial: "optuna.Trial | FrozenTrial") -> str:
    """Return a trial's values, such as ``optimizer.lr = 0.0321, asam.rho = 1``."""
    return ", ".join(f"{key} = {short(value)}" for key, value in trial.params.items())


def short(value: Any) -> str:
    """Return a value with four significant digits; texts as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
