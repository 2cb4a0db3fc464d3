"""tools.pseudolabels: the sure test rows become a table that script.py trains on."""

import numpy as np
import pandas as pd
import pytest
from conftest import CLASSES, QUICK, Command, make_competition, make_pixel_competition

import script
from tools import pseudolabels


def write_saved(data, path, sure, classes=CLASSES):
    """Probabilities of the test table: its rows at `sure` (places to class numbers) get 0.96, the others 0.5."""
    table = script.read_test_table(script.Config(data_dir=str(data)))
    values = np.full((len(table), len(classes)), 0.5 / (len(classes) - 1), dtype=np.float32)
    values[:, 0] = 0.5
    for row, number in sure.items():
        values[row] = 0.04 / (len(classes) - 1)
        values[row, number] = 0.96
    script.write_test_probabilities(path, table, values, classes, 1)
    return table


def ask(capsys, *words):
    capsys.readouterr()
    status = pseudolabels.main([*map(str, words)])
    return status, *capsys.readouterr()


def test_sure_rows_are_labelled_by_their_ids(competition, tmp_path, capsys):
    sure = {2: 1, 7: 4, 8: 1, 20: 0}
    table = write_saved(competition, tmp_path / "saved.npz", sure)
    with np.load(tmp_path / "saved.npz") as file:  # the file's order is its own
        arrays = {**file, "ids": file["ids"][::-1], "probabilities": file["probabilities"][::-1]}
    np.savez(tmp_path / "saved.npz", **arrays)
    output = tmp_path / "extra.csv"
    status, out, error = ask(capsys, tmp_path / "saved.npz", "--data-dir", competition, "--output", output)
    assert status == 0, error
    written = pd.read_csv(output, dtype=str)
    assert written.columns.tolist() == ["image_path", "label"]
    assert written.image_path.tolist() == table.rows.image_path.iloc[list(sure)].tolist()
    assert written.label.tolist() == [CLASSES[number] for number in sure.values()]
    assert "4 of 30 rows have a class of at least 0.95; 2 of 5 classes have none, such as '40'" in out
    assert f"--extra-csv {output}" in out
    words = [tmp_path / "saved.npz", "--data-dir", competition, "--output", output, "--least", "0.5"]
    status, out, _ = ask(capsys, *words)
    assert status == 0 and len(pd.read_csv(output)) == 30 and "30 of 30 rows" in out


def test_the_fewest_of_a_class_are_told(competition, tmp_path, capsys):
    write_saved(competition, tmp_path / "saved.npz", {row: row % 5 for row in range(9)})
    _, out, _ = ask(capsys, tmp_path / "saved.npz", "--data-dir", competition, "--output", tmp_path / "extra.csv")
    assert "9 of 30 rows have a class of at least 0.95; the fewest of a class are 1, of '1400'" in out


@pytest.mark.parametrize("words, message", [
    (["--least", "0.99"], "saved.npz: no row has a class of at least 0.99, the highest is 0.960; name a lower --least"),
    (["--test-csv", "few.csv"], "saved.npz: has a row of the id "),
    (["--test-csv", "none.csv"], "none.csv: no such file"),
])
def test_what_cannot_be_labelled_is_one_line(competition, tmp_path, capsys, words, message):
    write_saved(competition, tmp_path / "saved.npz", {1: 1})
    pd.read_csv(competition / "test.csv").head(9).to_csv(competition / "few.csv", index=False)
    output = tmp_path / "extra.csv"
    status, _, error = ask(capsys, tmp_path / "saved.npz", "--data-dir", competition, "--output", output, *words)
    assert status == 1 and message in error and error.count("\n") == 1 and not output.exists()


def test_a_spoilt_file_and_a_wrong_share_are_told(competition, tmp_path, capsys):
    (tmp_path / "saved.npz").write_text("rubbish")
    status, _, error = ask(capsys, tmp_path / "saved.npz", "--data-dir", competition, "--output", tmp_path / "a.csv")
    assert status == 1 and "saved.npz: no whole file of saved test probabilities" in error and error.count("\n") == 1
    for share in ("0", "1.5", "x", "nan"):
        with pytest.raises(SystemExit, match="2"):
            ask(capsys, tmp_path / "saved.npz", "--least", share)
        assert f"argument --least: must be above 0 and at most 1, not {share}" in capsys.readouterr().err


def test_pixel_rows_keep_their_pixels(tmp_path, capsys):
    data = make_pixel_competition(tmp_path / "digits")
    table = write_saved(data, tmp_path / "saved.npz", {3: 2, 5: 0}, classes=list("01234"))
    output = tmp_path / "extra.csv"
    assert ask(capsys, tmp_path / "saved.npz", "--data-dir", data, "--output", output)[0] == 0
    again = script.open_table(script.Config(), str(output), "label", "train")
    assert again.rows.label.tolist() == ["2", "0"] and np.array_equal(again.pixels, table.pixels[[3, 5]])


@pytest.mark.slow
def test_from_probabilities_to_a_training_with_them(tmp_path, capsys):
    command = Command(make_competition(tmp_path / "competition"), tmp_path / "out", tmp_path / "cache")
    words = [*QUICK, "--model", "tiny", "--save-probabilities"]
    assert script.main(command.arguments(*words)) == 0
    output = tmp_path / "extra.csv"
    assert ask(capsys, command.output / "test_probabilities.npz", "--data-dir", command.data, "--least", "0.01",
               "--output", output)[0] == 0
    assert script.main(command.arguments(*words, "--extra-csv", str(output))) == 0
    assert "30 extra rows of " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train.csv", "test.csv", "saved.npz"])
def test_what_is_read_is_not_overwritten(competition, capsys, name):
    write_saved(competition, competition / "saved.npz", {2: 1})
    before = (competition / name).read_bytes()
    status, _, error = ask(capsys, competition / "saved.npz", "--data-dir", competition, "--output", competition / name)
    assert status == 2 and f"{name}: is read, and would be overwritten" in error and error.count("\n") == 1
    assert (competition / name).read_bytes() == before


def test_a_folder_that_is_not_there_is_named(competition, tmp_path, capsys):
    write_saved(competition, tmp_path / "saved.npz", {2: 1})
    status, _, error = ask(capsys, tmp_path / "saved.npz", "--data-dir", competition, "--output", tmp_path / "no" / "x")
    assert status == 1 and "non-existent directory" in error and "None" not in error and error.count("\n") == 1
