"""last.pth: what a training saves, and how the run that was cut off is found again. Dictionaries only."""

import contextlib
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cli import flag_of
from pipeline.device import versions
from pipeline.distributed import Ranks
from pipeline.errors import DataError, first_line, warn
from pipeline.files import load_tensors, load_verified, save_verified

LAST_FILES = ("last.pth", "last.before.pth", "last.next.pth")  # the state, the one before it, the one being written
WRITE_SHARE = 1 / 20  # share of the time that may be spent on writing states


@dataclass
class TrainingState:
    """The position of a training between two steps."""

    epoch: int = 1
    step: int = 0                  # steps of this epoch that are done
    images: int = 0                # in these steps
    sums: list[float] = field(default_factory=lambda: [0.0] * 3)  # loss, correct answers, images with a finite loss
    seconds: float = 0.0           # of this epoch
    trained_seconds: float = 0.0   # of the whole training
    skipped: float = 0.0           # steps skipped before this epoch
    history: list[dict] = field(default_factory=list)  # figures of the epochs before
    best: dict | None = None       # the best of them
    settled: int = 0               # the epoch in which the training settled, 0 before (pipeline.clock)

    def early_stopping_triggered(self, patience: int) -> bool:
        """Return whether the last `patience` epochs brought no improvement. A patience of 0 never triggers."""
        return bool(patience and self.history and self.history[-1]["epoch"] - self.best["epoch"] >= patience)

    def training_finished(self, last_epoch: int, patience: int, progress: float) -> bool:
        """Return whether no epoch follows: all are done, time is up, or early stopping is triggered."""
        over = self.epoch > last_epoch or (progress >= 1 and not self.step)
        return bool(self.history) and (over or self.early_stopping_triggered(patience))

    def finish_epoch(self, row: dict, better: bool, skipped: float) -> None:
        """Add an epoch's figures and go to the next epoch."""
        self.history.append(row)
        self.best = row if better else self.best
        self.epoch, self.step, self.images, self.sums, self.seconds = self.epoch + 1, 0, 0, [0.0] * 3, 0.0
        self.skipped = skipped


class CheckpointManager:
    """Saves a training to last.pth in a folder, if there is one, and finds the unfinished run that the folder holds.

    `found` is the state to resume, or None. Raises DataError if it is damaged or has another `fingerprint`.
    """

    def __init__(self, folder: Path | None = None, fingerprint: dict | None = None, ranks: Ranks = Ranks(),
                 minutes: float = 10.0, resume: bool = True, model_file: str = "best_model.pth",
                 started: float | None = None):
        self.folder, self.fingerprint, self.ranks, self.minutes = folder, fingerprint or {}, ranks, minutes
        self.resume, self.model_file, self.saved = resume, model_file, time.monotonic()
        self.started = self.saved if started is None else started  # when this process began with the run
        self.last_duration = 0.0  # seconds of the last save
        self.versions = {**versions(), "number of ranks": ranks.world_size}
        self.paths = [folder / name for name in LAST_FILES] if folder else []
        self.found = ranks.broadcast_from_rank0(self._find) if folder and resume else None
        self.elapsed = self.found["elapsed"] if self.found else 0.0  # seconds of earlier processes

    def _find(self) -> dict | None:
        """Return the state of an unfinished run. A damaged file is replaced by the one before it."""
        faults = []
        for path in filter(Path.exists, self.paths[:2]):
            try:
                found = load_verified(path)
                difference = compare_fingerprints(found["fingerprint"], self.fingerprint)
            except Exception as error:  # zipfile, pickle and torch each raise their own types
                faults.append(f"{path}: cannot be used ({type(error).__name__}: {first_line(error)})")
                continue
            if difference:
                raise DataError(f"{path}: holds an unfinished run with {difference}; use its settings to resume it, "
                                "or --no-resume to start over")
            for fault in faults:
                warn(f"{fault}; the one before it is used")
            best = found["state"]["best"]
            try:
                if best:
                    load_verified(self.folder / self.model_file)
            except Exception as error:  # as above
                fault = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({first_line(error)})"
                raise DataError(f"{path}: holds an unfinished run whose {self.model_file}, of epoch {best['epoch']}, "
                                f"is {fault}; restore it, or start over with --no-resume") from None
            return found
        if faults:
            raise DataError(f"{'; '.join(faults)}; remove what is damaged, or start over with --no-resume")
        return None

    def begin(self, load_trainer: Callable[[dict], None]) -> TrainingState:
        """Return the found state, restored, or that of the first step. Raises DataError if the trainer does not fit."""
        if not self.found:
            self.discard()  # not before, since the settings might have been wrong
            if self.folder and self.ranks.rank == 0:
                (self.folder / "run.json").unlink(missing_ok=True)  # which marks a finished run
            return TrainingState()
        try:
            load_trainer(self.found["trainer"])
            state = TrainingState(**copy.deepcopy(self.found["state"]))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.paths[0]}: does not fit the present network or optimizer ({first_line(error)}); "
                            "restore those of the unfinished run, or start over with --no-resume") from None
        print(f"resumes from {LAST_FILES[0]}: epoch {state.epoch}, step {state.step}, after "
              f"{state.trained_seconds / 60:.1f} minutes of training")
        changed = [name for name, version in self.versions.items() if self.found["versions"].get(name) != version]
        if changed:
            warn(f"the run began with another {', '.join(changed)}: its end may differ in the last bits")
        return state

    def is_due(self) -> bool:
        """Return whether it is time to save."""
        return bool(self.folder) and time.monotonic() - self.saved >= 60 * self.minutes

    def save(self, snapshot: dict, interval: float = 0.0) -> None:
        """Write last.pth and keep the previous one, unless `interval` seconds have not passed since the last save."""
        begun = time.monotonic()
        if self.folder and begun - self.saved >= (interval and max(interval, self.last_duration / WRITE_SHARE)):
            if self.ranks.rank == 0:
                last, before, following = self.paths
                save_verified(following, {**snapshot, "fingerprint": self.fingerprint, "versions": self.versions,
                                          "elapsed": self.elapsed + begun - self.started})
                if last.exists():
                    last.replace(before)
                following.replace(last)
            self.saved = time.monotonic()
            self.last_duration = self.saved - begun

    def describe_saved(self, fold: int | None) -> str:
        """Return what a stopped run says: where it is saved and how it is resumed."""
        changes = "" if self.resume else " without --no-resume"
        if fold is not None and not self.resume:
            changes = f" with --fold {fold},{changes}"
        return f"saved in {self.paths[0]}; the same command{changes} resumes from there" if self.folder else ""

    def discard(self) -> None:
        """Remove what was saved: the run is finished, or starts over."""
        for path in self.paths if self.ranks.rank == 0 else ():
            path.unlink(missing_ok=True)


def stored_precision(folder: Path, folds: list[Path]) -> str:
    """Return the precision of the unfinished run in a folder, or of the first fold that was begun; "" if none was."""
    for path in (place / name for place in [folder, *folds] for name in LAST_FILES[:2]):
        with contextlib.suppress(Exception):  # what is wrong with a file is said when it is resumed
            return load_tensors(path)["fingerprint"]["settings"]["precision"]
    for folder in folds:
        with contextlib.suppress(Exception):
            return json.loads((folder / "run.json").read_text())["config"]["precision"]
    return ""


def compare_fingerprints(found: dict, own: dict) -> str:
    """Return in a few words how two runs differ; "" if they do not."""
    settings = [f"{flag_of(name)} {value} (not {own['settings'].get(name)})"
                for name, value in found["settings"].items() if own["settings"].get(name) != value]
    if settings:
        return ", ".join(settings[:5])
    if found["classes"] != own["classes"]:
        return f"{len(found['classes'])} other classes"
    if found["data"] != own["data"]:
        return "other training rows or images"
    return f"device {found['device']} (not {own['device']})" if found["device"] != own["device"] else ""
