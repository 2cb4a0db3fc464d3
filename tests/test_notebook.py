"""docs/quickstart.ipynb runs from top to bottom."""

import ast
import json
import shutil

import pandas as pd
import pytest
from conftest import REPOSITORY


def test_the_committed_notebook_shows_what_it_prints():
    path = REPOSITORY / "docs" / "quickstart.ipynb"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert not any(output["output_type"] == "error" for output in outputs) and path.stat().st_size < 600_000
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run python docs/make_pictures.py"


@pytest.mark.slow
def test_the_notebook_goes_from_the_folder_to_a_submission(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    for name in ("script.py", "train.csv", "test.csv", "classes.csv"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, tmp_path)
    shutil.copytree(REPOSITORY / "pipeline", tmp_path / "pipeline")
    (tmp_path / "Dataset_Image").symlink_to(REPOSITORY / "Dataset_Image")
    (tmp_path / "docs").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = nbformat.read(REPOSITORY / "docs" / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=600, kernel_name="python3",
                   resources={"metadata": {"path": str(tmp_path / "docs")}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    submission = pd.read_csv(tmp_path / "docs" / "quickstart-output" / "submission.csv", dtype=str)
    assert submission.example_id.tolist() == pd.read_csv(tmp_path / "test.csv", dtype=str).example_id.tolist()
    scores = next(cell for cell in notebook.cells if "metrics.score(" in cell.source).outputs[0]["data"]["text/plain"]
    assert ast.literal_eval(scores)["val_accuracy"] > 0.9
