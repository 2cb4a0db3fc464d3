"""Real competition folders, named by COMPETITION_FOLDERS (separated as in PATH); skipped if it is not set."""

import os
from pathlib import Path

import pandas as pd
import pytest
from conftest import Command

FOLDERS = [folder for folder in os.environ.get("COMPETITION_FOLDERS", "").split(os.pathsep) if folder]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDERS, reason="COMPETITION_FOLDERS names no folder")]


@pytest.fixture(scope="module", params=FOLDERS or ["none"])
def finished(request, tmp_path_factory):
    """Return the command and the output of one short run on a real folder."""
    folder = tmp_path_factory.mktemp("real")
    command = Command(Path(request.param), folder / "out", folder / "cache")
    done = command("--num-epochs", "1", "--max-minutes", "6", "--model", "cnn", timeout=900)
    assert done.returncode == 0, done.stderr
    return command, done


def test_submission_matches_the_sample_submission(finished):
    command, _ = finished
    expected = pd.read_csv(command.data / "sample_submission.csv", dtype=str)
    submission = command.submission()
    assert submission.columns.tolist() == expected.columns.tolist()
    assert submission.example_id.tolist() == expected.example_id.tolist()
    known = set(pd.read_csv(command.data / "train.csv", dtype=str).label)
    assert set(submission.label) <= known and submission.label.nunique() > len(known) / 3


def test_few_minutes_recognise_most_symbols(finished):
    command, done = finished
    accuracy = pd.read_csv(command.output / "history.csv").val_accuracy.iloc[-1]
    assert accuracy > 0.65, done.stdout


def test_predict_uses_the_cache_and_agrees(finished, tmp_path):
    command, _ = finished
    again = Command(command.data, tmp_path / "out", command.cache)
    done = again("predict", str(command.output / "best_model.pth"))
    assert done.returncode == 0 and "decoded" not in done.stdout
    assert again.submission().equals(command.submission())
