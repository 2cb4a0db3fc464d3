"""pipeline.files: atomic and verified writes, the folder lock, and inputs that are not overwritten."""

import os
import pickle
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from pipeline import files
from pipeline.errors import DataError, UsageError

CONTENT = {"weights": torch.arange(6.0).reshape(2, 3), "classes": ["3", "17"], "best": None, "counts": (1, 2)}


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "kept.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["kept.csv"]
    with files.atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["kept.csv"]


def test_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError) as error, files.atomic_write(tmp_path / "history.csv"):
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(tmp_path / "history.csv")


def test_temporary_files_of_dead_processes_are_removed(tmp_path):
    """Those of living processes and of other machines stay."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    machine = re.sub("[^A-Za-z0-9]", "", platform.node())
    names = {"dead": f".{machine}-{ended.pid}.history.csv", "living": f".{machine}-{os.getppid()}.history.csv",
             "foreign": f".another{machine}-{ended.pid}.history.csv",
             "of another file": f".{machine}-{ended.pid}.b.csv"}
    for name in names.values():
        (tmp_path / name).touch()
    with files.atomic_write(tmp_path / "history.csv") as temporary:
        temporary.write_text("new")
    assert set(os.listdir(tmp_path)) == {"history.csv", *names.values()} - {names["dead"]}


def test_verified_content_reads_back(tmp_path):
    files.save_verified(tmp_path / "last.pth", CONTENT)
    found = files.load_verified(tmp_path / "last.pth")
    assert torch.equal(found.pop("weights"), CONTENT["weights"])
    assert found == {name: value for name, value in CONTENT.items() if name != "weights"}
    assert os.listdir(tmp_path) == ["last.pth"]


def test_content_of_another_digest_is_refused(tmp_path):
    torch.save({**CONTENT, "sha256": files.sha256_of({**CONTENT, "classes": ["3", "18"]})}, tmp_path / "last.pth")
    with pytest.raises(ValueError, match="the SHA-256 differs, or is missing"):
        files.load_verified(tmp_path / "last.pth")
    torch.save(CONTENT, tmp_path / "last.pth")
    with pytest.raises(ValueError, match="the SHA-256 differs, or is missing"):
        files.load_verified(tmp_path / "last.pth")


@pytest.mark.parametrize("change", [
    lambda content: content["weights"].add_(1e-7), lambda content: content.update(weights=content["weights"].double()),
    lambda content: content.update(weights=content["weights"].reshape(3, 2)),
    lambda content: content.update(classes=["17", "3"]), lambda content: content.update(best=0),
    lambda content: content.update(counts=(1, 2.0)), lambda content: content.pop("best"),
])
def test_digest_depends_on_every_value(change):
    content = {**CONTENT, "weights": CONTENT["weights"].clone()}
    assert files.sha256_of(content) == files.sha256_of(CONTENT)
    change(content)
    assert files.sha256_of(content) != files.sha256_of(CONTENT)


def test_digest_of_tensors_depends_on_values_and_not_on_layout():
    tensors = [torch.arange(6).view(2, 3), torch.zeros(2, 2, dtype=torch.uint8), None]
    digest = files.sha256_of(tensors)
    assert files.sha256_of([tensors[0].T.contiguous().T, *tensors[1:]]) == digest
    tensors[1][1, 1] = 1
    assert files.sha256_of(tensors) != digest
    empty = torch.from_numpy(np.flatnonzero(np.zeros(3)))
    assert files.sha256_of([empty]) == files.sha256_of([torch.zeros(0, dtype=torch.int64)]) != files.sha256_of([])


class Payload:
    """An object whose unpickling raises an error."""

    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_pickled_code_is_refused_and_not_executed(tmp_path):
    torch.save({"model": Payload()}, tmp_path / "torch.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Payload()))
    for name in ("torch.pth", "bare.pth"):
        with pytest.raises(ValueError, match="it is not a file of tensors and plain values written by torch"):
            files.load_tensors(tmp_path / name)


def test_tensors_without_a_dictionary_are_refused(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="it does not hold a dictionary"):
        files.load_tensors(tmp_path / "list.pth")


def test_inputs_are_not_overwritten(tmp_path):
    """A link to an input is that input; names that are not written, or do not exist yet, are allowed."""
    table, out = tmp_path / "train.csv", tmp_path / "out"
    table.touch()
    out.mkdir()
    (out / "link.csv").symlink_to(table)
    files.check_not_overwritten(out, ["train.csv"], [table, tmp_path / "missing.csv"])
    for folder, name in ((tmp_path, "train.csv"), (out, "link.csv")):
        with pytest.raises(UsageError, match=r"train\.csv: is an input and would be overwritten; name another"):
            files.check_not_overwritten(folder, [name], [table])


def test_output_folder_is_created(tmp_path):
    assert files.make_output_folder(tmp_path / "a" / "b", ["x.csv"]).is_dir()
    assert os.listdir(tmp_path / "a" / "b") == []


def test_unusable_output_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: cannot be written to .*; name another --output-dir"):
        files.make_output_folder(tmp_path / "file")
    (tmp_path / "submission.csv").mkdir()
    with pytest.raises(DataError, match=r"submission\.csv: a folder has the name of a file .*; rename the folder"):
        files.make_output_folder(tmp_path, ["submission.csv"])


def test_folder_is_locked_for_one_run_at_a_time(tmp_path):
    with (files.lock_folder(tmp_path), pytest.raises(DataError, match="another run is writing there; wait, or "),
          files.lock_folder(tmp_path)):
        pass
    with files.lock_folder(tmp_path):
        pass


def test_lock_ends_with_its_process(tmp_path):
    code = f"from pipeline import files\nfrom pathlib import Path\nwith files.lock_folder(Path({str(tmp_path)!r})):\n" \
           "    print('locked', flush=True)\n    input()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(DataError), files.lock_folder(tmp_path):
            pass
        process.kill()
    with files.lock_folder(tmp_path):
        pass


def test_cache_folder_is_the_named_one_or_the_users(monkeypatch):
    assert files.cache_folder("cache").as_posix() == "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "elsewhere")
    assert files.cache_folder("").as_posix() == "elsewhere/symbol-classifier"
