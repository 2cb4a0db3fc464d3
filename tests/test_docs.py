"""README.md and docs/: each command runs, each link has its target, and requirements are the same in both places."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
from conftest import make_competition

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]
ELSEWHERE = ("pip install", "uv run", "tools.draw")  # run by .ci/run, by hand, and by test_draw.py
PROGRAMS = {  # what the commands find: this Python, and one machine in place of a cluster
    "python": 'exec {python} "$@"', "torchrun": 'exec {python} -m torch.distributed.run "$@"', "srun": 'exec "$@"',
    "scontrol": "echo localhost",
}


def commands(page: Path) -> list[str]:
    """Return the command lines of a page's bash blocks and notebook cells, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```|^```\n!(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(bash or cell for bash, cell in blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s+# .*", "", line).strip() for line in lines) if line]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_a_target(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_requirements_are_the_same_in_both_places():
    header = re.search(r"^# /// script\n(.*?)^# ///$", (ROOT / "script.py").read_text(), re.MULTILINE | re.DOTALL)[1]
    metadata = tomllib.loads(re.sub(r"^# ?", "", header, flags=re.MULTILINE))
    assert metadata["dependencies"] == (ROOT / "requirements.txt").read_text().split()
    assert metadata["requires-python"] == ">=3.11"


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES if page.name != "README.md" and page.name not in text] == []


def shortened(line: str, port: int = 0) -> str | None:
    """Return a command with one epoch, two ranks and three folds; None for those that other tests or .ci/run run."""
    if any(part in line for part in ELSEWHERE):
        return None
    line = re.sub(r"--nproc-per-node=\d", "--nproc-per-node=2", line).replace(":29500", f":{port}")
    line = line.replace("/kaggle/input/", "").replace("/kaggle/working", "kaggle").replace("--folds 5", "--folds 3")
    if re.search(r"script.py(?! predict| evaluate)", line):
        return f"{line} --num-epochs 1 --device cpu --cache-dir cache"
    return line + {"tools.sweep": " --num-epochs 1", "tools.stress": " --rows 20",
                   "tools.pseudolabels": " --least 0.1"}.get(line.partition("-m ")[2].split(" ")[0], "")


def test_every_command_is_run_or_is_of_a_kind_that_other_tests_run():
    lines = [line for page in PAGES[:-1] for line in commands(page)]
    assert len(lines) > 35 and sum(shortened(line) is not None for line in lines) >= len(lines) - 3


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES[:-1] if commands(page)], ids=lambda page: page.name)
def test_commands_of_a_page_work_in_their_order(page, tmp_path):
    """In one folder with a small competition; each training has one epoch."""
    data = make_competition(tmp_path / "my-competition", 200)
    table = pd.read_csv(data / "train.csv")
    table.assign(writer=table.index % 20).to_csv(data / "train.csv", index=False)
    shutil.copy(next((data / "Dataset_Image").rglob("*.png")), data / "Dataset_Image" / "0.png")
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)  # for commands without --data-dir
    shutil.copytree(data / "Dataset_Image", tmp_path / "More")
    shutil.copytree(data / "Dataset_Image", data / "More")
    table.head(30).to_csv(data / "more.csv", index=False)
    (tmp_path / "script.py").symlink_to(ROOT / "script.py")
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text.format(python=shlex.quote(sys.executable))}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                   "XDG_CACHE_HOME": str(tmp_path / "cache"), "SLURM_NNODES": "1", "SLURM_JOB_ID": "1"}
    for line in commands(page):
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        if command := shortened(line, port):
            done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True,
                                  env=environment)
            assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[:2000]}\n{done.stderr[-2000:]}"
