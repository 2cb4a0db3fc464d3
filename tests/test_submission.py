"""The submission: ids and labels as they are written, the sample that it must look like, rows without an image."""

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import DataError
from pipeline.submission import SubmissionForm, fill_bad_rows, submission_form, write_submission
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


def form(competition, classes=("3",)) -> SubmissionForm:
    return submission_form(read_test_table(TableSource("test.csv", str(competition), part="test")), list(classes))


def sample(competition) -> pd.DataFrame:
    ids = pd.read_csv(competition / "test.csv", dtype=str).example_id
    return pd.DataFrame({"example_id": ids, "label": "3"})


@pytest.mark.parametrize("end", ["", "\n", "\n\n,\n"])
def test_a_sample_may_end_with_blank_lines(competition, end):
    ids = sample(competition).example_id.tolist()
    assert form(competition).ids.tolist() == ids  # no sample
    text = sample(competition).to_csv(index=False)
    (competition / "sample_submission.csv").write_text(text + end)
    assert form(competition).ids.tolist() == ids
    (competition / "sample_submission.csv").write_text(text + end + f"{ids[0]},3\n")
    with pytest.raises(DataError, match=r"sample_submission\.csv(: has 30 different ids in 31 rows, |, row 32: )"):
        form(competition)


@pytest.mark.parametrize(("change", "message"), [
    (lambda table: table.assign(more="3"), r"its columns are example_id, label, more; a submission has one of ids and"),
    (lambda table: table[["example_id"]], r"its columns are example_id; a submission has one of ids and"),
    (lambda table: table.replace({"example_id": {table.example_id[5]: "x"}}),
     r"sample_submission.csv, row 7: example_id is 'x', which .*test.csv does not have"),
    (lambda table: table.iloc[:-1], "has 29 different ids in 29 rows, "),
    (lambda table: table, r"its labels are whole numbers, and '\\\\pi' is a label of the training table")])
def test_a_sample_of_another_table_is_refused(competition, change, message):
    change(sample(competition)).to_csv(competition / "sample_submission.csv", index=False)
    with pytest.raises(DataError, match=message):
        form(competition, ["3", "\\pi"])


def test_a_sample_with_labels_of_text_allows_any(competition):
    sample(competition).assign(label="\\alpha").to_csv(competition / "sample_submission.csv", index=False)
    assert form(competition, ["3", "\\pi"]).columns == ["example_id", "label"]


@pytest.mark.parametrize("name", ["sample_submission.csv", "sampleSubmission.csv", "SampleSubmission.CSV"])
def test_the_sample_gives_header_ids_and_order(competition, tmp_path, name):
    table = sample(competition).iloc[::-1].rename(columns={"label": "Symbol"})
    table.to_csv(competition / name, index=False)
    test = read_test_table(TableSource("test.csv", str(competition), part="test"))
    answers = np.eye(30)
    write_submission(tmp_path / "submission.csv", test, answers, [str(row) for row in range(30)])
    written = pd.read_csv(tmp_path / "submission.csv", dtype=str)
    assert written.columns.tolist() == ["example_id", "Symbol"]
    assert written.example_id.tolist() == table.example_id.tolist()
    assert written.Symbol.tolist() == [str(row) for row in range(29, -1, -1)]


def test_columns_that_are_classes_are_filled_with_probabilities(competition, tmp_path):
    ids = sample(competition).example_id
    pd.DataFrame({"example_id": ids, "b": 0.5, "a": 0.5}).to_csv(competition / "sample_submission.csv", index=False)
    test = read_test_table(TableSource("test.csv", str(competition), part="test"))
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], 30)
    write_submission(tmp_path / "submission.csv", test, probabilities, ["a", "b", "c"])
    written = pd.read_csv(tmp_path / "submission.csv")
    assert written.columns.tolist() == ["example_id", "b", "a"]
    assert np.allclose(written[["a", "b"]], probabilities[:, :2], atol=1e-6)


@pytest.mark.parametrize("ids", [
    lambda paths: paths, lambda paths: paths.str.rpartition("/")[2],
    lambda paths: paths.str.rpartition("/")[2].str.removesuffix(".png")], ids=["paths", "names", "stems"])
def test_the_sample_tells_that_images_names_are_the_ids(competition, ids):
    test = pd.read_csv(competition / "test.csv", dtype=str)
    test[["image_path"]].to_csv(competition / "test.csv", index=False)
    wanted = ids(test.image_path)
    pd.DataFrame({"file": wanted[::-1], "label": "3"}).to_csv(competition / "sample_submission.csv", index=False)
    found = form(competition)
    assert found.ids.tolist() == wanted[::-1].tolist() and found.places.tolist() == list(range(29, -1, -1))
    table = read_test_table(TableSource("test.csv", str(competition), part="test"))
    assert table.rows.example_id.tolist() == wanted.tolist()
