"""How long a training lasts: its steps, the time limit, and the end of what it gains."""

import math
import time
from dataclasses import dataclass

from pipeline.errors import UsageError

VOTE_SHARE = 0.15     # of the time, beyond which training gains more than the nearest-neighbour vote
MARGIN = 1.25         # of the time that the answers after the training are expected to take
SETTLED_STEPS = 25    # least number of steps whose training accuracy is compared with that of the steps before
SETTLED_GAIN = 0.01   # rise of it below which a training has settled
REST = 0.5            # epochs that a settled training still takes, as a share of those before


@dataclass(frozen=True)
class TimeLimit:
    """Seconds for a training and the answers after it, which are counted as passes of an image through the network."""

    seconds: float = math.inf
    answers: float = 0.0
    seconds_per_answer: float = 0.0
    votes: bool = False  # whether answers include the nearest-neighbour vote

    def for_training(self, seconds_per_answer: float) -> float:
        """Return the seconds that are left for training if an answer takes so long."""
        return self.seconds - MARGIN * self.answers * seconds_per_answer


def time_limit(max_minutes: float, used: float, fixed: float, answers: float, seconds_per_answer: float, votes: bool,
               folds: bool, must_train: bool) -> TimeLimit:
    """Return what is left of max_minutes. Raises UsageError if there is no time and a network is needed.

    `used` seconds are gone, and `fixed` ones go for what does not depend on the number of images.
    """
    limit = TimeLimit(60 * max_minutes - used - fixed, answers, seconds_per_answer, votes)
    left = limit.for_training(seconds_per_answer)
    if left <= 0 and must_train:
        raise UsageError(f"--max-minutes {max_minutes:g} leaves no time to train: {used:.0f} s are used"
                         f"{' or reserved for other folds' if folds else ''}, validation and prediction take "
                         f"{60 * max_minutes - used - left:.0f} s; allow more minutes")
    return limit


class TrainingClock:
    """The progress of training from 0 to 1, by steps or by time, whichever ends first."""

    def __init__(self, epochs: int, steps_per_epoch: int, limit: TimeLimit | None = None):
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.limit, self.started = limit or TimeLimit(), time.monotonic()
        self.answer_seconds = [self.limit.seconds_per_answer]  # measured before the training and by each validation
        self.earlier = 0.0  # seconds of training by earlier processes, which are not part of the limit
        self.settled = 0    # the epoch in which the training settled, 0 before

    @property
    def elapsed(self) -> float:
        """Seconds of training so far."""
        return time.monotonic() - self.started + self.earlier

    @property
    def seconds_per_answer(self) -> float:
        """The seconds of an answer as measured last, or on average if that is longer."""
        return max(self.answer_seconds[-1], sum(self.answer_seconds) / len(self.answer_seconds))

    @property
    def last_epoch(self) -> int:
        """The epoch with which the steps end."""
        return self.settled + math.ceil(REST * self.settled) if self.settled else self.epochs

    def progress(self, step: int) -> float:
        """Return the share of the training that is done before this step."""
        done = step / (self.epochs * self.steps_per_epoch)
        if self.settled:
            settled_at = self.settled / self.epochs
            since = (step / self.steps_per_epoch - self.settled) / (self.last_epoch - self.settled)
            done = settled_at + (1 - settled_at) * since
        seconds = max(self.limit.for_training(self.seconds_per_answer), 1e-9)
        return min(1.0, max(done, self.elapsed / (seconds + self.earlier)))

    def epochs_left(self, progress: float, step: int) -> float:
        """Return how many epochs are still to come at this progress before this step, by the pace until now."""
        done = step / self.steps_per_epoch
        return self.last_epoch - done if self.settled or not step else done * (1 - progress) / progress

    def expected_epochs(self, step: int, epoch: int = 1) -> int:
        """Return the epoch with which the training will end, by the pace until now; at least the present one."""
        epochs = step / self.steps_per_epoch + self.epochs_left(self.progress(step), step)
        return max(epoch, min(self.last_epoch, math.ceil(epochs - 1e-6)))

    def seconds_left(self, progress: float) -> float:
        """Return the seconds that the rest of the training and the answers after it take, by the pace until now."""
        return self.elapsed * (1 / progress - 1 if progress else 0) + self.limit.answers * self.seconds_per_answer

    def settle(self, accuracies: list[float]) -> bool:
        """Let a training end soon if the training accuracies of its epochs have stopped rising. Return whether it will.

        The last epochs are compared with as many before them. A training is never made longer.
        """
        window, epochs = math.ceil(SETTLED_STEPS / self.steps_per_epoch), len(accuracies)
        gain = sum(accuracies[-window:]) - sum(accuracies[-2 * window : -window])
        ends = (not self.settled and epochs >= 2 * window and gain < SETTLED_GAIN * window
                and epochs + math.ceil(REST * epochs) < self.epochs)
        self.settled = epochs if ends else self.settled
        return ends
