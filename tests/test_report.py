"""tools/report.py: one page with everything that a run left."""

import json
import re
import shutil

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from conftest import CLASSES, Command, make_competition

import script
from pipeline.metrics import Predictions
from tools import report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    command = Command(make_competition(folder / "competition"), folder / "out", folder / "cache")
    assert script.main(command.arguments("--model", "mlp", "--image-size", "8", "--num-epochs", "2")) == 0
    return command


def test_the_page_holds_figures_settings_and_every_picture(finished):
    assert report.main([str(finished.output)]) == 0
    text = (finished.output / "report.html").read_text()
    metrics = json.loads((finished.output / "run.json").read_text())["metrics"]
    assert f"accuracy {metrics['val_accuracy']:.2%}, top 3" in text and "num_epochs" in text
    assert len(re.findall(r'<img alt="\w+" src="data:image/png;base64,iVBOR', text)) == len(report.PICTURES)
    assert 'src="http' not in text and "<script src" not in text and "<link" not in text  # nothing is fetched


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install Debian's package chromium")
def test_the_page_in_a_browser(finished, tmp_path):
    assert report.main([str(finished.output)]) == 0
    column = "[...document.querySelectorAll('.sortable tbody tr')].map(row => row.cells[{}].dataset.value)"
    with Browser(tmp_path / "profile") as browser:
        browser.open((finished.output / "report.html").resolve().as_uri())
        assert browser.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert sorted(browser.value(column.format(0))) == sorted(CLASSES)
        for number, order in ((2, 1), (2, -1), (0, 1)):  # the accuracy, twice, and the label
            browser.value(f"document.querySelectorAll('.sortable th')[{number}].click()")
            values = [float(value) for value in browser.value(column.format(number))]
            assert values == sorted(values, reverse=order < 0)
        assert browser.value("document.querySelectorAll('.sortable img').length") == 10  # the validation rows
        browser.screenshot(tmp_path / "report.png")
        assert browser.errors == []


def test_another_table_is_refused(finished, tmp_path, capsys):
    other = make_competition(tmp_path / "other", train_rows=40)
    assert report.main([str(finished.output), "--data-dir", str(other)]) == 1
    assert "not the table that the run was trained on" in capsys.readouterr().err


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 1
    assert "no record of a run" in capsys.readouterr().err


@pytest.mark.parametrize("name, content", [
    ("val_probabilities.npz", b"PK\x03\x04cut"), ("val_probabilities.npz", b""), ("run.json", b"[]"),
    ("run.json", b"{}"), ("run.json", b'{"config": {}}'), ("history.csv", b""), ("history.csv", b"epoch\n1\n"),
    ("class_accuracy.csv", b"label,images,accuracy,taken_for\n3,x,0.5,\n"),
])
def test_a_damaged_file_of_the_run_is_reported(finished, tmp_path, capsys, name, content):
    shutil.copytree(finished.output, tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(content)
    assert report.main([str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"out/{name}: " in error and error.count("\n") == 1


def test_calibration_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    bins, error = report.calibration(Predictions(np.arange(4), np.array([0, 1, 0, 0]), probabilities))
    assert bins.accuracy.tolist() == [1.0, 0.5] and bins.share.tolist() == [0.5, 0.5]
    assert error == pytest.approx((0.4 + 0.4) / 2)
