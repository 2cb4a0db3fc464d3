"""tools/check.py: what it finds wrong with tables and images, and that it accepts good ones."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import draw_shape, make_competition, make_pixel_competition
from PIL import Image, ImageFilter

from tools import check


@pytest.fixture
def checked(competition, tmp_path, capsys):
    """A function that checks the competition and returns status, stdout, stderr and same_images.csv."""
    def call(*flags: str):
        status = check.main(["--data-dir", str(competition), "--cache-dir", str(tmp_path / "cache"), "--output-dir",
                             str(tmp_path / "out"), *flags])
        captured = capsys.readouterr()
        same = tmp_path / "out" / "same_images.csv"
        return status, captured.out, captured.err, pd.read_csv(same, dtype=str) if same.exists() else None
    return call


def image(competition, row, table="train.csv"):
    return competition / "Dataset_Image" / pd.read_csv(competition / table).image_path.iloc[row]


def shuffle_rows(competition):
    """Shuffle the rows: the labels of the drawn competition go round, so that the place gives them away."""
    table = pd.read_csv(competition / "train.csv", dtype=str).sample(frac=1, random_state=0)
    table.to_csv(competition / "train.csv", index=False)


def test_good_data_pass(tmp_path, capsys):
    competition = make_competition(tmp_path / "competition", 300)
    shuffle_rows(competition)
    status = check.main(["--data-dir", str(competition), "--cache-dir", str(tmp_path), "--output-dir", str(tmp_path)])
    out, error = capsys.readouterr()
    assert status == 0 and error == "", error
    assert "gives the label away" not in out and "blank" not in out and "0 of them cannot be used" in out
    assert "no clue beside the pictures was found" in out and "the number in the file's name" in out
    assert re.search(r"300 training and 30 test images has AUC 0\.\d\d \+- 0\.1\d: they cannot be told apart", out), out
    assert "wrote same_images.csv and check_shift.png" in out


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_a_few_rows_can_be_checked(tmp_path, capsys, rows):
    competition = make_competition(tmp_path / "competition", rows)
    folders = ["--data-dir", str(competition), "--cache-dir", str(tmp_path), "--output-dir", str(tmp_path)]
    assert check.main(folders) == 0
    assert re.search("no clue beside the pictures was found|gives the label away", capsys.readouterr().out)


def test_a_wrong_flag_is_one_line(checked):
    status, _, error, _ = checked("--image-size", "0")
    assert status == 2 and error.startswith("error: image_size must be") and error.count("\n") == 1


def test_bad_files_are_listed(checked, competition):
    image(competition, 6).write_bytes(b"")
    image(competition, 2, "test.csv").write_text("<html>")
    status, out, error, _ = checked()
    assert status == 1 and "2 of them cannot be used" in out
    assert "train.csv, row 8: " in error and "test.csv, row 4: " in error


def test_equal_images_are_grouped_and_their_labels_compared(checked, competition):
    before = checked()[3]
    spot = Image.new("L", (32, 32), 255)
    spot.paste(0, (3, 20, 9, 31))
    for row in (10, 12):
        spot.save(image(competition, row))  # two rows of different classes
    shutil.copy(image(competition, 10), image(competition, 4, "test.csv"))
    status, out, _, same = checked()
    labels = pd.read_csv(competition / "train.csv", dtype=str).label
    assert status == 0 and "in both" in out and "some test images are in the training table with their label" in out
    assert re.search(r"warning: [1-9]\d* groups have different labels in the training table \(\d+ rows, [1-9]\d* of "
                     r"them without their group's most common label\), such as rows \d+, \d+", out), out
    group = same[(same.table == "train") & (same.row == "12")].group.iloc[0]
    rows = same[same.group == group]
    assert set(zip(rows.table, rows.row)) == {("train", "12"), ("train", "14"), ("test", "6")}
    assert set(rows.label.dropna()) == {labels[10], labels[12]} and len(same) >= len(before)


def test_blank_images_are_reported(checked, competition):
    Image.new("L", (32, 32), 255).save(image(competition, 7))
    Image.new("L", (32, 32), 120).save(image(competition, 3, "test.csv"))
    _, out, _, _ = checked()
    assert "1 images of the train table are blank, or nearly so (rows 9)" in out
    assert "1 images of the test table are blank, or nearly so (rows 5)" in out


@pytest.mark.parametrize("clue, change", [
    ("the number in the file's name", lambda table: table.sort_values("label")),
    ("the file's folder", None), ("the column user", lambda table: table.assign(user=table.label.map(hash))),
    ("the column note", lambda table: table.assign(note="n" + table.label)),
    ("the row's place in the table", lambda table: table.sort_values("label")),
])
def test_a_clue_that_gives_the_label_away_is_reported_with_its_accuracy(checked, competition, clue, change):
    shuffle_rows(competition)
    table = pd.read_csv(competition / "train.csv", dtype=str)
    if clue.startswith("the file") or "number" in clue:
        table = table.sort_values("label", kind="stable").reset_index(drop=True)
        for place, row in table.iterrows():
            name = f"{row.label}/a.{place}.png" if "folder" in clue else f"data/v2-{place}.png"
            (competition / "Dataset_Image" / name).parent.mkdir(exist_ok=True)
            shutil.copy(image(competition, 0), competition / "Dataset_Image" / name)
            table.loc[place, "image_path"] = name
        table = table.sample(frac=1, random_state=1)
    else:
        table = change(table)
    table.to_csv(competition / "train.csv", index=False)
    _, out, _, _ = checked()
    assert f"warning: {clue} gives the label away: alone it is right for " in out
    assert "(the most common class: 20.0%)" in out


def test_odd_columns_are_tried_too(checked, competition):
    table = pd.read_csv(competition / "train.csv", dtype=str)
    table["endless"], table["long"], table["twice"], table["twice "] = "inf", "9" * 400, "1", "2"
    table.loc[:3, "endless"] = "2"
    table.to_csv(competition / "train.csv", index=False)
    status, out, error, _ = checked()
    assert status == 0 and not error and "the column endless, the column long, the column twice" in out


def test_pixel_tables_are_checked_too(tmp_path, capsys):
    data = make_pixel_competition(tmp_path / "data")
    table = pd.read_csv(data / "train.csv", dtype=str)
    table = pd.concat([table, table.iloc[[4]].assign(label="1")])
    table.to_csv(data / "train.csv", index=False)
    assert check.main(["--data-dir", str(data), "--output-dir", str(tmp_path)]) == 0
    assert "1 groups have different labels in the training table (2 rows, 1 of them" in capsys.readouterr().out


def test_a_missing_table_is_one_line(checked, competition):
    (competition / "test.csv").unlink()
    status, _, error, same = checked()
    assert status == 1 and error.startswith("error: ") and error.count("\n") == 1 and same is None


def test_an_input_is_not_overwritten(checked, competition):
    table = competition / "same_images.csv"
    table.write_bytes((competition / "train.csv").read_bytes())
    status, _, error, _ = checked("--train-csv", table.name, "--output-dir", str(competition))
    assert status == 2 and "same_images.csv: is an input and would be overwritten" in error
    assert table.read_bytes() == (competition / "train.csv").read_bytes()


def test_equal_images_ignore_those_that_cannot_be_used(checked, competition):
    for row in (6, 11):
        image(competition, row).write_bytes(b"")  # both are blank in memory
    *_, same = checked()
    assert not {"8", "13"} & set(same[same.table == "train"].row)
    assert np.all(same.groupby("group").size() > 1)


@pytest.mark.parametrize("seed", range(6))
def test_a_column_of_two_values_is_tried_by_the_most_common_label_of_each(seed):
    """Of hundreds of equal values the nearest three are arbitrary: all of them may have the rarer label."""
    rng = np.random.default_rng(seed)
    labels = pd.Series(rng.integers(0, 2, 2000)).astype(str)
    column = labels.astype(int).where(rng.random(2000) < 0.75, 1 - labels.astype(int))
    line, = check.describe_clues(pd.DataFrame({"the column scanner": column}), labels)
    share = float(re.search(r"right for ([\d.]+)%", line)[1])
    assert line.startswith("warning: the column scanner gives the label away") and 72 < share < 78


def test_a_blank_line_and_spaces_in_a_pixel_tables_header_hide_no_column(tmp_path, capsys):
    data = make_pixel_competition(tmp_path / "pixels", 200)
    table = pd.read_csv(data / "train.csv", dtype=str).sample(frac=1, random_state=0)
    table.insert(1, "secret", table.label)
    lines = table.to_csv(index=False).splitlines()
    lines = [lines[0].replace(",", ", "), *lines[1:4], "", *lines[4:]]
    (data / "train.csv").write_text("\n".join(lines) + "\n")
    assert check.main(["--data-dir", str(data), "--cache-dir", str(tmp_path), "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "the column secret gives the label away: alone it is right for 100.0%" in out and "column pixel" not in out


def test_other_test_images_are_told_apart_and_drawn(checked, competition, tmp_path):
    for name in pd.read_csv(competition / "test.csv").image_path:
        path = competition / "Dataset_Image" / name
        Image.open(path).filter(ImageFilter.MinFilter(3)).save(path)  # strokes a pixel wider at each side
    _, out, _, _ = checked()
    found = re.search(r"warning: .* 100 training and 30 test images has AUC ([\d.]+) .*: they clearly differ", out)
    assert found and float(found[1]) > 0.9 and "check_shift.png shows the images that it is surest of" in out
    with Image.open(tmp_path / "out" / "check_shift.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500


def test_too_few_images_are_not_compared_and_an_earlier_picture_is_removed(checked, competition, tmp_path):
    picture = tmp_path / "out" / "check_shift.png"
    checked()
    assert picture.exists()
    pd.read_csv(competition / "test.csv", dtype=str)[:19].to_csv(competition / "test.csv", index=False)
    status, out, _, _ = checked()
    assert status == 0 and "100 training and 19 test images are too few to be compared: 20 of each are needed" in out
    assert "wrote same_images.csv in" in out and not picture.exists()


def test_images_that_cannot_be_used_are_not_compared(checked, competition):
    for row in range(8):
        image(competition, row, "test.csv").write_bytes(b"")
    assert "100 training and 22 test images has AUC" in checked()[1]


def test_the_training_table_is_checked_alone(checked, competition):
    (competition / "test.csv").unlink()
    image(competition, 6).write_bytes(b"")
    status, out, _, same = checked("--test-csv", "none")
    assert status == 1 and "100 images, 1 of them cannot be used" in out and "AUC" not in out
    assert set(same.table) <= {"train"} and "no clue beside the pictures was found" in out


@pytest.mark.parametrize("rows", [20, 60, pytest.param(400, marks=pytest.mark.slow)])
def test_images_of_one_kind_are_rarely_told_apart(rows):
    rng, alarms = np.random.default_rng(rows), 0
    for _ in range(10):
        images = np.stack([np.asarray(draw_shape(kind, rng)) for kind in rng.integers(0, 5, rows + 60)])
        auc, scores = check.tell_apart(255 - images[:rows], 255 - images[rows:])
        alarms += "cannot be told apart" not in check.describe_shift(auc, check.auc_error(rows, 60), (rows, 60))
        assert len(scores) == rows + 60 and 0 <= scores.min() < scores.max() <= 1
    assert alarms <= 1


@pytest.mark.parametrize("auc, text", [(0.52, "told apart"), (0.58, "differ slightly"), (0.7, "warning: "),
                                       (0.95, "clearly differ")])
def test_the_auc_is_explained(auc, text):
    assert text in check.describe_shift(auc, 0.03, (2000, 500))


def test_features_are_finite_for_blank_full_and_tiny_images():
    for side in (8, 9, 48):
        images = np.stack([np.zeros((side, side)), np.full((side, side), 255), np.eye(side) * 255]).astype(np.uint8)
        features = check.measure_images(images)
        assert np.isfinite(features).all() and len(np.unique(features, axis=0)) == 3
