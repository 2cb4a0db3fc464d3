"""The submission: ids and labels as they are written, the sample that it must look like, rows without an image."""

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import DataError
from pipeline.submission import check_sample_submission, fill_bad_rows, write_submission
from pipeline.tables import Table, TableSource, read_test_table


def ids_table(ids, **options) -> Table:
    return Table("test.csv", pd.DataFrame({"example_id": ids}), **options)


def test_the_submission_keeps_ids_order_and_text(tmp_path):
    ids, labels = ["10", "a,b", "007", "NA", "ü"], ["\\frac{a}{b}", "007", "NA", 'quote"d', "x,y"]
    order = np.random.default_rng(0).permutation(5)
    classes = [labels[place] for place in order]
    write_submission(tmp_path / "submission.csv", ids_table(ids), np.eye(5)[np.argsort(order)], classes)
    written = pd.read_csv(tmp_path / "submission.csv", dtype=str, na_filter=False)
    assert written.columns.tolist() == ["example_id", "label"]
    assert written.example_id.tolist() == ids and written.label.tolist() == labels


def test_the_submission_has_the_tables_columns(tmp_path):
    table = ids_table(["1", "2"], submission_columns=("ImageId", "Label"))
    write_submission(tmp_path / "submission.csv", table, np.eye(2), ["7", "3"])
    assert (tmp_path / "submission.csv").read_text() == "ImageId,Label\n1,7\n2,3\n"


@pytest.mark.parametrize(("ids", "probabilities", "message"), [
    (["1", "3"], np.eye(2)[:1], "not written"), (["1", "3"], np.full((2, 2), np.nan), "not finite"),
    (["1", "a\rb"], np.eye(2), "does not read back")])
def test_a_submission_that_cannot_be_written_keeps_the_old_one(tmp_path, ids, probabilities, message):
    path = tmp_path / "submission.csv"
    path.write_text("old")
    with pytest.raises(DataError, match=message):
        write_submission(path, ids_table(ids), probabilities, ["2", "4"])
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["submission.csv"]


def test_rows_without_an_image_get_the_frequencies_of_the_others(capsys):
    table = ids_table(list("abcd"), faults={1: "gone"})
    probabilities = np.array([[0.2, 0.8], [1, 0], [0.1, 0.9], [0.7, 0.3]], dtype=np.float32)
    fill_bad_rows(table, probabilities, ["x", "y"])
    assert np.allclose(probabilities[1], [1 / 3, 2 / 3]) and np.allclose(probabilities[0], [0.2, 0.8])
    assert "1 of 4 rows of test.csv have no usable image: they get the label 'y'" in capsys.readouterr().err
    fill_bad_rows(ids_table(list("abcd")), probabilities, ["x", "y"])
    assert capsys.readouterr().err == ""


def check(competition, classes=("3",)) -> None:
    table = read_test_table(TableSource("test.csv", str(competition)))
    check_sample_submission(competition / "sample_submission.csv", table, list(classes))


def sample(competition) -> pd.DataFrame:
    ids = pd.read_csv(competition / "test.csv", dtype=str).example_id
    return pd.DataFrame({"example_id": ids, "label": "3"})


@pytest.mark.parametrize("end", ["", "\n", "\n\n,\n"])
def test_a_sample_may_end_with_blank_lines(competition, end):
    check(competition)  # no sample
    text = sample(competition).to_csv(index=False)
    (competition / "sample_submission.csv").write_text(text + end)
    check(competition)
    (competition / "sample_submission.csv").write_text(text + end + "x,3\n")
    with pytest.raises(DataError, match=r"sample_submission\.csv: has 3\d rows, .*test.csv has 30"):
        check(competition)


@pytest.mark.parametrize(("change", "message"), [
    (lambda table: table.rename(columns={"label": "Label"}), r"its columns are example_id, Label; the submission's"),
    (lambda table: table.iloc[::-1], r"sample_submission.csv, row 2: example_id is '\d+', in .*test.csv it is '\d+'"),
    (lambda table: table.iloc[:-1], "has 29 rows, "),
    (lambda table: table, r"its labels are whole numbers, and '\\\\pi' is a label of the training table")])
def test_a_submission_unlike_the_sample_is_refused(competition, change, message):
    change(sample(competition)).to_csv(competition / "sample_submission.csv", index=False)
    with pytest.raises(DataError, match=message):
        check(competition, ["3", "\\pi"])


def test_a_sample_with_labels_of_text_allows_any(competition):
    sample(competition).assign(label="\\alpha").to_csv(competition / "sample_submission.csv", index=False)
    check(competition, ["3", "\\pi"])
