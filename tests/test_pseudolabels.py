"""tools/pseudolabels.py: confident test rows become a table that script.py trains on."""

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import CLASSES, QUICK, Command, make_competition, make_pixel_competition

import script
from pipeline.ensemble import save_probabilities
from pipeline.tables import TableSource, open_table, read_test_table
from tools import pseudolabels


def write_saved(data, path, sure, classes=CLASSES):
    """Save probabilities of the test table: 0.96 for the rows of `sure` (place to class number), 0.5 for the others."""
    table = read_test_table(TableSource("test.csv", str(data)))
    values = np.full((len(table), len(classes)), 0.5 / (len(classes) - 1), dtype=np.float32)
    values[:, 0] = 0.5
    for row, number in sure.items():
        values[row] = 0.04 / (len(classes) - 1)
        values[row, number] = 0.96
    save_probabilities(path, table, values, classes, 1)
    return table


def label(capsys, *words):
    """Run the tool and return status, stdout and stderr."""
    capsys.readouterr()
    status = pseudolabels.main([*map(str, words)])
    return status, *capsys.readouterr()


def test_confident_rows_are_labelled_by_their_ids(competition, tmp_path, capsys):
    sure = {2: 1, 7: 4, 8: 1, 20: 0}
    table = write_saved(competition, tmp_path / "saved.npz", sure)
    with np.load(tmp_path / "saved.npz") as file:  # in another order
        arrays = {**file, "ids": file["ids"][::-1], "probabilities": file["probabilities"][::-1]}
    np.savez(tmp_path / "saved.npz", **arrays)
    output = tmp_path / "extra.csv"
    status, out, error = label(capsys, tmp_path / "saved.npz", "--data-dir", competition, "--output-dir", tmp_path)
    assert status == 0, error
    written = pd.read_csv(output, dtype=str)
    assert written.columns.tolist() == ["image_path", "label"]
    assert written.image_path.tolist() == table.rows.image_path.iloc[list(sure)].tolist()
    assert written.label.tolist() == [CLASSES[number] for number in sure.values()]
    assert "4 of 30 rows have a class of at least 0.95; 2 of 5 classes have none, such as '40'" in out
    assert f"--extra-csv {output}" in out
    words = [tmp_path / "saved.npz", "--data-dir", competition, "--output-dir", tmp_path, "--least", "0.5"]
    status, out, _ = label(capsys, *words)
    assert status == 0 and len(pd.read_csv(output)) == 30 and "30 of 30 rows" in out


def test_the_smallest_class_is_reported(competition, tmp_path, capsys):
    write_saved(competition, tmp_path / "saved.npz", {row: row % 5 for row in range(9)})
    _, out, _ = label(capsys, tmp_path / "saved.npz", "--data-dir", competition, "--output-dir", tmp_path)
    assert "9 of 30 rows have a class of at least 0.95; the fewest of a class are 1, of '1400'" in out


@pytest.mark.parametrize("words, message", [
    (["--least", "0.99"], "saved.npz: no row has a class of at least 0.99, the highest is 0.960; name a lower --least"),
    (["--test-csv", "few.csv"], "saved.npz: has a row of the id "),
    (["--test-csv", "none.csv"], "none.csv: no such file"),
])
def test_an_error_is_one_line(competition, tmp_path, capsys, words, message):
    write_saved(competition, tmp_path / "saved.npz", {1: 1})
    pd.read_csv(competition / "test.csv").head(9).to_csv(competition / "few.csv", index=False)
    folders = ["--data-dir", competition, "--output-dir", tmp_path]
    status, _, error = label(capsys, tmp_path / "saved.npz", *folders, *words)
    assert status == 1 and message in error and error.count("\n") == 1 and not (tmp_path / "extra.csv").exists()


def test_a_damaged_file_and_a_wrong_share_are_refused(competition, tmp_path, capsys):
    (tmp_path / "saved.npz").write_text("rubbish")
    status, _, error = label(capsys, tmp_path / "saved.npz", "--data-dir", competition, "--output-dir", tmp_path)
    assert status == 1 and error.count("\n") == 1
    assert "saved.npz: not a complete file of saved test probabilities" in error
    for share in ("0", "1.5", "x", "nan"):
        with pytest.raises(SystemExit, match="2"):
            label(capsys, tmp_path / "saved.npz", "--least", share)
        assert f"argument --least: must be above 0 and at most 1, not {share}" in capsys.readouterr().err


def test_pixel_rows_keep_their_pixels(tmp_path, capsys):
    data = make_pixel_competition(tmp_path / "digits")
    table = write_saved(data, tmp_path / "saved.npz", {3: 2, 5: 0}, classes=list("01234"))
    assert label(capsys, tmp_path / "saved.npz", "--data-dir", data, "--output-dir", tmp_path)[0] == 0
    again = open_table(TableSource("extra.csv", str(tmp_path)), "label")
    assert again.rows.label.tolist() == ["2", "0"] and np.array_equal(again.pixels, table.pixels[[3, 5]])


@pytest.mark.slow
def test_from_probabilities_to_a_training_with_them(tmp_path, capsys):
    command = Command(make_competition(tmp_path / "competition"), tmp_path / "out", tmp_path / "cache")
    words = [*QUICK, "--save-probabilities"]
    assert script.main(command.arguments(*words)) == 0
    output = tmp_path / "extra.csv"
    assert label(capsys, command.output / "test_probabilities.npz", "--data-dir", command.data, "--least", "0.01",
               "--output-dir", tmp_path)[0] == 0
    assert script.main(command.arguments(*words, "--extra-csv", str(output))) == 0
    assert "30 extra rows " in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--train-csv", "--test-csv", "--probabilities"])
def test_an_input_is_not_overwritten(competition, tmp_path, capsys, flag):
    """extra.csv in the output folder is one of the inputs."""
    saved, source = tmp_path / "saved.npz", competition / flag.removeprefix("--").replace("-csv", ".csv")
    write_saved(competition, saved, {2: 1})
    extra = competition / "extra.csv"
    shutil.copy(saved if flag == "--probabilities" else source, extra)
    words = [extra] if flag == "--probabilities" else [saved, flag, "extra.csv"]
    before = extra.read_bytes()
    status, _, error = label(capsys, *words, "--data-dir", competition, "--output-dir", competition)
    assert status == 2 and "extra.csv: is an input and would be overwritten" in error and error.count("\n") == 1
    assert extra.read_bytes() == before


def test_a_missing_output_folder_is_made(competition, tmp_path, capsys):
    write_saved(competition, tmp_path / "saved.npz", {2: 1})
    words = [tmp_path / "saved.npz", "--data-dir", competition, "--output-dir", tmp_path / "new" / "folder"]
    assert label(capsys, *words)[0] == 0
    assert len(pd.read_csv(tmp_path / "new" / "folder" / "extra.csv")) == 1
    (tmp_path / "file").touch()
    status, _, error = label(capsys, *words[:-1], tmp_path / "file")
    assert status == 1 and "file: cannot be written to" in error and error.count("\n") == 1
