"""tools/bundle.py: the single file works without the repository, and shows the user's edits."""

import getpass
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import make_competition

from pipeline.cli import describe_fields
from pipeline.device import versions
from script import Config
from tools import bundle

SMALL = {"num_epochs": 2, "pictures": False, "batch_size": 16, "image_size": 16, "device": "cpu", "model": "tiny",
         "cache_dir": "cache"}


@pytest.fixture
def kernel(tmp_path) -> Path:
    """The bundle in a folder of its own, beside no module of the repository."""
    (tmp_path / "alone").mkdir()
    path = tmp_path / "alone" / "kernel.py"
    assert bundle.main(["--output", str(path)]) == 0
    return path


def edit(kernel: Path, **defaults: object) -> None:
    """Change defaults of Config in the bundle, as a user would."""
    text = kernel.read_text(encoding="utf-8")
    for name, value in {**SMALL, **defaults}.items():
        text, count = re.subn(rf"^(    {name}: .*? = )\S+", lambda line, value=value: line[1] + repr(value), text,
                              flags=re.MULTILINE)
        assert count == 1, name
    kernel.write_text(text, encoding="utf-8")


def run_alone(kernel: Path, *command: str, **options) -> subprocess.CompletedProcess:
    """Run Python in the bundle's folder, without PYTHONPATH and with a temporary folder of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    temporary = kernel.parent.with_name("temporary")
    temporary.mkdir(exist_ok=True)
    return subprocess.run([sys.executable, *command], cwd=kernel.parent, capture_output=True, text=True, timeout=280,
                          env={**environment, "TMPDIR": str(temporary)}, **options)


def test_the_repository_is_not_importable_where_the_bundle_runs(kernel):
    done = run_alone(kernel, "-c", "import pipeline")
    assert "No module named 'pipeline'" in done.stderr


@pytest.mark.slow
def test_an_edited_bundle_runs_alone_in_a_folder(kernel, tmp_path):
    """1,000 images: as many as it takes to decode them in forked processes."""
    data = make_competition(tmp_path / "competition", train_rows=1000)
    edit(kernel, data_dir=str(data), submission_file="answers.csv", output_dir="out")
    done = run_alone(kernel, kernel.name)
    assert done.returncode == 0, done.stderr
    assert "decoded 1,000 images" in done.stdout and "model tiny" in done.stdout
    submission = pd.read_csv(kernel.parent / "out" / "answers.csv")
    assert submission.example_id.tolist() == pd.read_csv(data / "test.csv").example_id.tolist()
    record = json.loads((kernel.parent / "out" / "run.json").read_text())
    assert record["config"]["num_epochs"] == 2 and len(pd.read_csv(kernel.parent / "out" / "history.csv")) == 2
    assert sorted(path.name for path in kernel.parent.iterdir()) == ["cache", "kernel.py", "out"]
    left = [path.name for path in (tmp_path / "temporary").iterdir()]
    assert left in ([], [f"torchinductor_{getpass.getuser()}"])  # of torch; the unpacked modules are removed


@pytest.mark.slow
def test_versions_of_the_bundle_change_with_an_edit(kernel):
    code = "import runpy; print(runpy.run_path('kernel.py')['device'].versions()['source_sha256'])"
    first = run_alone(kernel, "-c", code).stdout
    assert first
    edit(kernel)
    assert run_alone(kernel, "-c", code).stdout not in ("", first, versions()["source_sha256"] + "\n")


@pytest.mark.slow
def test_a_notebook_cell_runs_the_bundle_twice(kernel, tmp_path):
    """Without __file__, and with another package named pipeline imported before."""
    data = make_competition(tmp_path / "competition")
    edit(kernel, data_dir=str(data))
    (kernel.parent / "pipeline.py").write_text("other = True\n")
    cell = ("import pipeline; assert pipeline.other\n"
            "text, names = open('kernel.py', encoding='utf-8').read(), {'__name__': '__main__'}\n"
            "exec(text, names)\nexec(text, names)\nassert '__file__' not in names\n"
            "print('versions', names['device'].versions()['source_sha256'])\n")
    done = run_alone(kernel, "-", input=cell)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation accuracy") == 2 and re.search(r"^versions [0-9a-f]{16}$", done.stdout, re.M)
    assert len(pd.read_csv(kernel.parent / "submission.csv")) == 30


def test_help_shows_the_comments_of_config(kernel):
    done = run_alone(kernel, kernel.name, "--help")
    assert done.returncode == 0 and describe_fields(Config)["num_epochs"][1] in " ".join(done.stdout.split())


def test_the_bundle_says_how_it_was_made(kernel):
    lines = kernel.read_text(encoding="utf-8").splitlines()
    assert lines[1].startswith("# Made by `python -m tools.bundle`")
    assert next(number for number, line in enumerate(lines) if line.startswith("class Config")) < 180


def test_docstring_and_future_imports_stay_first():
    text = bundle.make_bundle('"""What it is."""\n\nfrom __future__ import annotations\nimport os\n\nprint(os.sep)\n',
                              {"__init__.py": "", "a.py": 'text = """\'\\n"""\n'})
    names = {"__name__": "module"}
    path = list(sys.path)
    try:
        exec(compile(text, "text", "exec"), names)
    finally:
        sys.path[:] = path
    assert names["__doc__"] == "What it is."


def test_a_file_with_other_content_is_not_overwritten(kernel, capsys):
    assert bundle.main(["--output", str(kernel)]) == 0
    kernel.write_text("edited")
    assert bundle.main(["--output", str(kernel)]) == 1
    assert "kernel.py: is there already, with other content; remove it" in capsys.readouterr().err
    assert kernel.read_text() == "edited"
    assert bundle.main(["--output", str(kernel.parent / "no" / "kernel.py")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
