"""pipeline/resume.py: last.pth is written whole, found again, and refused where it is of another run."""

import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import DataError
from pipeline.files import load_verified, save_verified
from pipeline.resume import LAST_FILES, CheckpointManager, TrainingState, compare_fingerprints

FINGERPRINT = {"settings": {"num_epochs": 3, "learning_rate": 0.1, "seed": 0}, "classes": ["3", "17"], "data": "abc",
               "device": "cpu"}


def snapshot(epoch: int = 1, best: dict | None = None) -> dict:
    return {"trainer": {"weights": torch.full((2, 2), float(epoch))}, "state": {"epoch": epoch, "best": best}}


def save(folder: Path, *epochs: int, **options) -> CheckpointManager:
    """Save a snapshot of each epoch and return the manager."""
    manager = CheckpointManager(folder, FINGERPRINT, **options)
    for epoch in epochs:
        manager.save(snapshot(epoch))
    return manager


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_what_was_saved_is_found(tmp_path):
    save(tmp_path, 1, 2)
    found = CheckpointManager(tmp_path, FINGERPRINT).found
    assert found["state"] == {"epoch": 2, "best": None}
    assert torch.equal(found["trainer"]["weights"], torch.full((2, 2), 2.0))
    assert set(found) == {"trainer", "state", "fingerprint", "elapsed", "versions"}
    assert {path.name for path in tmp_path.iterdir()} == {"last.pth", "last.before.pth"} < set(LAST_FILES)
    assert load_verified(tmp_path / "last.before.pth")["state"]["epoch"] == 1, "the previous one is kept"


def test_without_a_folder_nothing_is_saved_or_found():
    manager = CheckpointManager()
    manager.save(snapshot())
    manager.discard()
    assert manager.found is None and manager.paths == [] and not manager.is_due() and manager.describe_saved(None) == ""


def test_an_empty_folder_holds_no_run(tmp_path):
    manager = CheckpointManager(tmp_path / "none yet", FINGERPRINT)
    assert manager.found is None and manager.elapsed == 0


def test_without_resume_a_run_is_not_looked_for(tmp_path):
    save(tmp_path, 1)
    damage(tmp_path / "last.pth")
    assert CheckpointManager(tmp_path, {**FINGERPRINT, "data": "other"}, resume=False).found is None


def test_discard_removes_what_was_saved_and_nothing_else(tmp_path):
    (tmp_path / "last.next.pth").write_bytes(b"left by a killed process")
    (tmp_path / "history.csv").write_text("epoch\n")
    save(tmp_path, 1, 2).discard()
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


@pytest.mark.parametrize(("changed", "message"), [
    ({"settings": {**FINGERPRINT["settings"], "learning_rate": 0.2}}, "--learning-rate 0.1 (not 0.2)"),
    ({"settings": {"num_epochs": 4, "learning_rate": 0.1, "seed": 5}}, "--num-epochs 3 (not 4), --seed 0 (not 5)"),
    ({"classes": ["3", "18"]}, "2 other classes"), ({"data": "abd"}, "other training rows or images"),
    ({"device": "cuda"}, "device cpu (not cuda)")])
def test_a_run_with_other_settings_or_data_is_refused(tmp_path, changed, message):
    own = {**FINGERPRINT, **changed}
    assert compare_fingerprints(FINGERPRINT, own) == message and compare_fingerprints(own, own) == ""
    save(tmp_path, 1)
    with pytest.raises(DataError) as refused:
        CheckpointManager(tmp_path, own)
    assert str(refused.value) == (f"{tmp_path / 'last.pth'}: holds an unfinished run with {message}; use its settings "
                                  "to resume it, or --no-resume to start over")


def test_a_damaged_file_is_replaced_by_the_one_before_it(tmp_path, capsys):
    save(tmp_path, 1, 2)
    damage(tmp_path / "last.pth")
    assert CheckpointManager(tmp_path, FINGERPRINT).found["state"]["epoch"] == 1
    assert "last.pth: cannot be used" in (error := capsys.readouterr().err) and "the one before it is used" in error


def test_a_file_that_was_never_renamed_is_not_missed(tmp_path):
    """A kill between two renames leaves no last.pth."""
    save(tmp_path, 1, 2)
    (tmp_path / "last.pth").rename(tmp_path / "last.next.pth")
    assert CheckpointManager(tmp_path, FINGERPRINT).found["state"]["epoch"] == 1


def test_a_run_of_which_every_file_is_damaged_is_refused(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "last.pth").write_bytes(b"")
    damage(tmp_path / "last.before.pth")
    with pytest.raises(DataError, match=r"last.pth: cannot be used .*; remove what is damaged, or start over with "
                                        "--no-resume$"):
        CheckpointManager(tmp_path, FINGERPRINT)
    assert CheckpointManager(tmp_path, FINGERPRINT, resume=False).found is None


def test_the_best_network_of_an_unfinished_run_must_be_whole(tmp_path):
    CheckpointManager(tmp_path, FINGERPRINT).save(snapshot(3, best={"epoch": 2}))
    with pytest.raises(DataError, match=r"whose best_model.pth, of epoch 2, is missing; restore it, or start over with "
                                        "--no-resume$"):
        CheckpointManager(tmp_path, FINGERPRINT)
    save_verified(tmp_path / "best_model.pth", {"model": torch.zeros(1000)})
    assert CheckpointManager(tmp_path, FINGERPRINT).found
    damage(tmp_path / "best_model.pth")
    with pytest.raises(DataError, match=r"whose best_model.pth, of epoch 2, is damaged \(.*\); restore it"):
        CheckpointManager(tmp_path, FINGERPRINT)
    save_verified(tmp_path / "mine.pth", {"model": torch.zeros(1000)})
    assert CheckpointManager(tmp_path, FINGERPRINT, model_file="mine.pth").found


def test_seconds_of_all_processes_add_up(tmp_path):
    save(tmp_path, 1, started=time.monotonic() - 100)
    second = CheckpointManager(tmp_path, FINGERPRINT, started=time.monotonic() - 1000)
    assert 100 <= second.elapsed < 1000
    second.save(snapshot(2))
    assert CheckpointManager(tmp_path, FINGERPRINT).elapsed >= 1100


def test_a_training_begins_at_the_state_that_was_found(tmp_path, capsys):
    best, loaded = {"epoch": 1, "val_accuracy": 0.5}, []
    save_verified(tmp_path / "best_model.pth", {})
    state = {"epoch": 2, "step": 3, "trained_seconds": 90.0, "history": [best], "best": best}
    CheckpointManager(tmp_path, FINGERPRINT).save({"trainer": {"weights": torch.ones(2)}, "state": state})
    begun = CheckpointManager(tmp_path, FINGERPRINT).begin(loaded.append)
    assert begun == TrainingState(**state) and torch.equal(loaded[0]["weights"], torch.ones(2))
    out, err = capsys.readouterr()
    assert out == "resumes from last.pth: epoch 2, step 3, after 1.5 minutes of training\n" and not err


def test_a_training_without_an_earlier_state_begins_at_the_first_step(tmp_path):
    save(tmp_path, 1)
    manager = CheckpointManager(tmp_path, FINGERPRINT, resume=False)
    assert manager.begin(None) == TrainingState()
    assert not list(tmp_path.iterdir()), "an earlier state is removed"


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("other groups"), KeyError("average")])
def test_a_state_that_does_not_fit_the_trainer_is_refused(tmp_path, error):
    def load(_: dict) -> None:
        raise error

    save(tmp_path, 1)
    with pytest.raises(DataError, match=r"last.pth: does not fit the present network or optimizer \(.*\); restore "
                                        "those of the unfinished run, or start over with --no-resume$"):
        CheckpointManager(tmp_path, FINGERPRINT).begin(load)
    assert (tmp_path / "last.pth").exists()


def test_changed_versions_are_warned_of(tmp_path, capsys):
    save(tmp_path, 1)
    content = load_verified(tmp_path / "last.pth")
    content["versions"] |= {"torch": "1.0", "number of ranks": 4}
    save_verified(tmp_path / "last.pth", content)
    CheckpointManager(tmp_path, FINGERPRINT).begin(lambda state: None)
    assert "the run began with another torch, number of ranks" in capsys.readouterr().err


def test_a_save_is_due_after_the_minutes_given(tmp_path):
    manager = CheckpointManager(tmp_path, FINGERPRINT, minutes=10)
    assert not manager.is_due()
    manager.saved -= 600
    assert manager.is_due()
    manager.save(snapshot())
    assert not manager.is_due() and CheckpointManager(tmp_path, FINGERPRINT, minutes=0).is_due()


def test_saves_at_the_ends_of_epochs_keep_their_interval(tmp_path):
    manager = CheckpointManager(tmp_path, FINGERPRINT)
    manager.save(snapshot(), interval=10)
    assert not list(tmp_path.iterdir()), "the manager has just begun"
    manager.saved -= 10
    manager.save(snapshot(), interval=10)
    assert (tmp_path / "last.pth").exists()


def test_writing_takes_a_small_share_of_the_time(tmp_path):
    manager = CheckpointManager(tmp_path, FINGERPRINT)
    manager.saved, manager.last_duration = time.monotonic() - 30, 2.0  # seconds ago, and how long it took
    manager.save(snapshot(), interval=10)
    assert not manager.paths[0].exists()
    manager.last_duration = 1.0
    manager.save(snapshot(), interval=10)
    assert manager.paths[0].exists() and manager.last_duration != 1.0, "it is measured again"


@pytest.mark.parametrize(("options", "fold", "command"), [
    ({}, None, "the same command resumes"), ({}, 2, "the same command resumes"),
    ({"resume": False}, None, "the same command without --no-resume resumes"),
    ({"resume": False}, 2, "the same command with --fold 2, without --no-resume resumes")])
def test_a_stopped_run_says_how_it_is_resumed(tmp_path, options, fold, command):
    manager = CheckpointManager(tmp_path, FINGERPRINT, **options)
    assert manager.describe_saved(fold) == f"saved in {tmp_path / 'last.pth'}; {command} from there"


def test_a_finished_epoch_joins_the_history():
    state = TrainingState(step=5, images=40, sums=[1.0, 2.0, 3.0], seconds=4.0)
    first, second = {"epoch": 1, "val_accuracy": 0.5}, {"epoch": 2, "val_accuracy": 0.4}
    state.finish_epoch(first, better=True, skipped=1.0)
    assert state == TrainingState(epoch=2, skipped=1.0, history=[first], best=first)
    state.finish_epoch(second, better=False, skipped=3.0)
    assert state == TrainingState(epoch=3, skipped=3.0, history=[first, second], best=first)
