"""How long a training lasts: its steps, the time limit, and the end of what it gains."""

import math
import time
from dataclasses import dataclass

from pipeline.errors import UsageError

MARGIN = 1.1          # of the time that the answers after the training are expected to take
SETTLED_STEPS = 25    # least number of steps between which training accuracies are compared
SETTLED_GAIN = 0.01   # rise of the training accuracy, as a share, below which a training has settled
REST = 0.5            # steps that a settled training still takes, as a share of those before


@dataclass(frozen=True)
class TimeLimit:
    """Seconds for a training and the answers after it; answers are counted as passes of an image through the network.

    Their time is measured before the training, and again with each validation.
    """

    seconds: float = math.inf
    answers: float = 0.0
    seconds_per_answer: float = 0.0

    def for_training(self, seconds_per_answer: float) -> float:
        """Return the seconds that are left for training if an answer takes so long."""
        return self.seconds - MARGIN * self.answers * seconds_per_answer


NO_LIMIT = TimeLimit()


def time_limit(max_minutes: float, used: float, fixed: float, answers: float, seconds_per_answer: float, folds: bool,
               must_train: bool) -> TimeLimit:
    """Return what is left of max_minutes. Raises UsageError if there is no time and a network is needed.

    `used` seconds are gone, and `fixed` ones go for what does not depend on the number of images.
    """
    limit = TimeLimit(60 * max_minutes - used - fixed, answers, seconds_per_answer)
    left = limit.for_training(seconds_per_answer)
    if left <= 0 and must_train:
        raise UsageError(f"--max-minutes {max_minutes:g} leaves no time to train: {used:.0f} s are used"
                         f"{' or reserved for other folds' if folds else ''}, validation and prediction take "
                         f"{60 * max_minutes - used - left:.0f} s; allow more minutes")
    return limit


class TrainingClock:
    """The progress of training from 0 to 1, by steps or by time, whichever ends first."""

    def __init__(self, steps: int, limit: TimeLimit = NO_LIMIT):
        self.steps, self.limit, self.started = steps, limit, time.monotonic()
        self.earlier = 0.0    # seconds of training by earlier processes, which are not part of the limit
        self.shortened = None  # of a settled training: the step and the progress at which it did, and the steps since
        self.seconds = 0.0
        self.remeasure(limit.seconds_per_answer)

    def remeasure(self, seconds_per_answer: float) -> None:
        """Leave as much time for the answers as they take if one takes so long."""
        self.seconds = max(self.limit.for_training(seconds_per_answer), 1e-9)

    @property
    def elapsed(self) -> float:
        """Seconds of training so far."""
        return time.monotonic() - self.started + self.earlier

    def progress(self, step: int) -> float:
        """Return the share of the training that is done before this step."""
        done = step / self.steps
        if self.shortened:
            begun, done, rest = self.shortened
            done += (1 - done) * (step - begun) / rest
        return min(1.0, max(done, self.elapsed / (self.seconds + self.earlier)))

    def shorten(self, history: list[dict], steps_per_epoch: int) -> int:
        """Let a training that has settled end soon. Return the epochs that are left for it, 0 if nothing changes.

        It has settled once the training accuracy of the last epochs is hardly higher than that of those before them.
        """
        window, done = math.ceil(SETTLED_STEPS / steps_per_epoch), len(history)
        if self.shortened or done < 2 * window:
            return 0
        accuracies = [row["train_accuracy"] for row in history[-2 * window :]]
        rest = math.ceil(REST * done)
        if sum(accuracies[window:]) - sum(accuracies[:window]) >= SETTLED_GAIN * window or (
                done + rest) * steps_per_epoch >= self.steps:
            return 0
        step = done * steps_per_epoch
        self.shortened = [step, step / self.steps, rest * steps_per_epoch]
        return rest
