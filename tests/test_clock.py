"""pipeline.clock: how long a training lasts."""

import math

import pytest

from pipeline.clock import MARGIN, TimeLimit, TrainingClock, time_limit
from pipeline.errors import UsageError


def test_a_clock_counts_steps_without_a_time_limit():
    clock = TrainingClock(2, 5)
    assert clock.progress(4) == 0.4 and clock.progress(10) == clock.progress(12) == 1


def test_the_epochs_that_are_left_follow_steps_or_time():
    clock = TrainingClock(2, 5)
    assert [clock.epochs_left(clock.progress(step), step) for step in (0, 5, 9)] == pytest.approx([2, 1, 0.2])
    clock = TrainingClock(1000, 5, TimeLimit(1000))
    clock.started -= 250
    assert clock.epochs_left(clock.progress(20), 20) == pytest.approx(12, rel=1e-3)  # four took a quarter of the time
    assert clock.seconds_left(0.25) == pytest.approx(750, rel=1e-2)
    clock = TrainingClock(40, 5)
    clock.settled = 10
    assert clock.epochs_left(clock.progress(60), 60) == 3


def test_a_clock_counts_time_where_it_runs_out_first():
    clock = TrainingClock(1000, 1000, TimeLimit(1000))
    clock.started -= 250
    assert 0.25 <= clock.progress(4) < 1 and clock.progress(1_000_000) == 1
    clock.started -= 750
    assert clock.progress(4) == 1


def test_epochs_that_there_is_no_time_for_are_not_expected():
    clock = TrainingClock(40, 1000, TimeLimit(1000))
    assert clock.expected_epochs(0) == 40 and clock.epochs_left(clock.progress(0), 0) == 40
    clock.started -= 250
    assert clock.expected_epochs(999) == 4 and clock.expected_epochs(1200) == 5
    clock.started -= 750
    assert clock.expected_epochs(3700) == 4, "the last one is not complete"
    assert clock.expected_epochs(3700, 5) == 5, "the one before was broken off, and then time was found for another"
    assert TrainingClock(3, 10).expected_epochs(20) == 3


def test_seconds_of_an_earlier_process_do_not_shorten_the_time_available():
    clock = TrainingClock(1000, 1000, TimeLimit(500))
    clock.earlier = 1500
    assert clock.elapsed >= 1500 and 0.75 <= clock.progress(0) < 1
    clock.started -= 500
    assert clock.progress(0) == 1


def test_a_clock_without_time_is_over():
    assert TrainingClock(1, 9, TimeLimit(0)).progress(0) == 1 and TrainingClock(1, 9, TimeLimit(-5)).progress(0) == 1


def test_a_clock_leaves_as_much_time_for_the_answers_as_they_were_last_seen_to_take():
    clock = TrainingClock(1000, 1000, TimeLimit(1000, answers=100, seconds_per_answer=1))
    clock.started -= 100
    assert clock.progress(0) == pytest.approx(100 / (1000 - 100 * MARGIN), rel=1e-3)
    clock.answer_seconds.append(5)
    assert clock.progress(0) == pytest.approx(100 / (1000 - 500 * MARGIN), rel=1e-3)
    clock.answer_seconds.append(50)  # the machine has become so slow that no time is left for training
    assert clock.progress(0) == 1


def test_a_validation_in_a_fast_moment_does_not_shorten_the_time_that_is_left_for_the_answers():
    """Of 45 minutes on a machine that others use too, the last validation was a quarter faster than the answers."""
    clock = TrainingClock(1000, 1000, TimeLimit(1000, answers=100, seconds_per_answer=1))
    clock.answer_seconds += [1.0, 1.2, 0.8]
    assert clock.seconds_per_answer == 1
    clock.answer_seconds.append(1.5)
    assert clock.seconds_per_answer == 1.5


def test_a_limit_is_what_is_not_used_or_fixed():
    limit = time_limit(10, used=100, fixed=20, answers=1000, seconds_per_answer=0.1, votes=True, folds=False,
                       must_train=True)
    assert limit.votes and limit.seconds == 480 and limit.for_training(0.1) == pytest.approx(480 - 100 * MARGIN)
    with pytest.raises(UsageError, match=r"^--max-minutes 10 leaves no time to train: 500 s are used or reserved for "
                                         r"other folds, validation and prediction take 130 s; allow more minutes$"):
        time_limit(10, 500, 20, 1000, 0.11 / MARGIN, votes=True, folds=True, must_train=True)
    assert time_limit(10, 500, 20, 1000, 0.1, votes=True, folds=True, must_train=False).for_training(0.1) < 0


def test_a_limit_of_no_time_is_none():
    assert TimeLimit().for_training(3) == math.inf and TrainingClock(1, 8).progress(0) == 0


def settled(accuracies: list[float], steps_per_epoch: int, epochs: int) -> tuple[bool, TrainingClock]:
    clock = TrainingClock(epochs, steps_per_epoch)
    return clock.settle(accuracies), clock


def test_a_training_that_gains_goes_on():
    rising = [0.1, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.83, 0.86, 0.89]
    assert not any(settled(rising[:epochs], 13, 47)[0] for epochs in range(11))


def test_a_settled_training_ends_half_as_many_epochs_later():
    """Epochs of 13 steps are compared by twos, those of 100 steps one by one, those of 2 by thirteens."""
    ends, clock = settled([0.1, 0.5, 0.8, 0.9, 0.95, 0.955, 0.955, 0.955], 13, 40)
    assert ends and (clock.settled, clock.last_epoch) == (8, 12)
    assert clock.progress(104) == pytest.approx(8 / 40) and clock.progress(156) == 1
    assert clock.progress(130) == pytest.approx((1 + 8 / 40) / 2)
    assert settled([0.5, 0.505], 100, 9)[0] and not settled([0.5, 0.52], 100, 9)[0]
    assert not settled([0.5] * 25, 2, 300)[0] and settled([0.5] * 26, 2, 300)[0]


def test_a_training_is_not_made_longer_and_settles_once():
    assert not settled([0.9] * 8, 50, 12)[0] and settled([0.9] * 8, 50, 13)[0]
    ends, clock = settled([0.9] * 4, 50, 12)
    assert ends and not clock.settle([0.9] * 5) and clock.last_epoch == 6
