"""The structure of the program, read from its source: who imports whom, sizes, order of definitions, side effects."""

import ast
import builtins
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from script import Config

SCRIPT = REPOSITORY / "script.py"
MODULES = sorted((REPOSITORY / "pipeline").glob("*.py"))
TREES = {path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text()) for path in [SCRIPT, *MODULES]}
PIPELINE = {path: tree for path, tree in TREES.items() if path != "script.py"}


def imported_names(tree: ast.AST) -> set[str]:
    """Return the dotted names of all modules that are imported, inside functions too; each with what is taken of it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ".", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def count_lines(path: Path) -> int:
    """Return the number of lines of a file."""
    return len(path.read_text().splitlines())


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """Return all functions and methods."""
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("path", PIPELINE)
def test_module_imports_no_program(path):
    tops = {name.split(".")[0] for name in imported_names(PIPELINE[path])}
    assert not tops & {"script", "tools", "benchmarks", "tests"}


def test_script_imports_no_tools():
    assert not {name.split(".")[0] for name in imported_names(TREES["script.py"])} & {"tools", "benchmarks", "tests"}


def test_imports_inside_pipeline_have_no_circle():
    names = {"pipeline." + Path(path).stem: tree for path, tree in PIPELINE.items()}
    remaining = {name: imported_names(tree) & names.keys() - {name} for name, tree in names.items()}
    while free := [name for name, needed in remaining.items() if not needed]:
        remaining = {name: needed - set(free) for name, needed in remaining.items() if name not in free}
    assert not remaining, "these modules import each other"


@pytest.mark.parametrize("path", PIPELINE)
def test_module_does_not_know_config(path):
    assert not re.search(r"\bConfig\b", (REPOSITORY / path).read_text())


def test_imports_are_standard_or_required():
    """A package that a fresh environment lacks would fail only where it is used: imports in functions count too."""
    names = {name.split(".")[0] for tree in TREES.values() for name in imported_names(tree)}
    required = set(re.findall(r"^[\w-]+", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE))
    packages = {"pillow": "PIL", "scikit-learn": "sklearn"}
    optional = {"pyarrow"}  # for .parquet files alone; without it one line says to install it
    assert names - sys.stdlib_module_names - {"pipeline"} - optional == {packages.get(name, name) for name in required}


def test_script_has_900_to_1200_lines():
    assert 900 <= count_lines(SCRIPT) <= 1200


def test_program_has_at_most_6000_lines():
    assert sum(map(count_lines, [SCRIPT, *MODULES])) <= 6000


@pytest.mark.parametrize("path", PIPELINE)
def test_module_has_at_most_380_lines(path):
    assert count_lines(REPOSITORY / path) <= 380


@pytest.mark.parametrize("path", TREES)
def test_functions_have_at_most_60_lines(path):
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions(TREES[path])}
    assert not {name: length for name, length in lengths.items() if length > 60}


def test_few_docstrings_are_riddles():
    texts = [ast.get_docstring(node) or "" for tree in TREES.values() for node in ast.walk(tree)
             if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module))]
    assert len([text for text in texts if re.match(r"(What|Whether|How)\b", text)]) <= 3


def used_names(node: ast.AST) -> list[tuple[str, int]]:
    """Return the names that a node reads, with their lines; annotations in quotes are not read."""
    return [(part.id, part.lineno) for part in ast.walk(node)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)]


def local_names(function: ast.AST) -> set[str]:
    """Return the names that a function binds itself: arguments, assignments and inner functions."""
    bound = {part.arg for part in ast.walk(function) if isinstance(part, ast.arg)}
    bound |= {part.id for part in ast.walk(function) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return bound | {part.name for part in functions(function) if part is not function}


def late_names(tree: ast.Module) -> list[str]:
    """Return what is used above its definition: functions, classes and constants of the module."""
    defined = {}
    for node in tree.body:
        targets = [node] if hasattr(node, "name") else getattr(node, "targets", [getattr(node, "target", None)])
        for target in targets:
            name = getattr(target, "name", getattr(target, "id", None))
            if name:
                defined.setdefault(name, (node.lineno, node.end_lineno))
    late = []
    for node in tree.body:
        local = local_names(node) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else set()
        inner = {part: local_names(part) for part in functions(node)}
        for name, line in used_names(node):
            hidden = local | {own for part, names in inner.items() if part.lineno <= line <= part.end_lineno
                              for own in names}
            first, last = defined.get(name, (0, 0))
            if name not in hidden and not hasattr(builtins, name) and line < first and not first <= line <= last:
                late.append(f"line {line}: {name} is defined in line {first}")
    return late


def test_script_uses_nothing_before_it_is_defined():
    assert late_names(TREES["script.py"]) == []


def test_late_names_are_found():
    """The check itself: a name used in a function's body above its definition, not one that the function binds."""
    source = "def a(x):\n    return b(x)\n\ndef b(y):\n    c = y\n    return c\n\nc = 1\n"
    assert late_names(ast.parse(source)) == ["line 2: b is defined in line 4"]


def test_importing_prints_nothing_and_has_no_side_effect(tmp_path):
    """Each module is imported in one process: nothing is seeded, no device is touched and no slow package is loaded."""
    names = ["script", *("pipeline." + path.stem for path in MODULES if path.stem != "__init__")]
    code = ("import importlib, json, sys, torch\n"
            "seed, state = torch.initial_seed(), torch.get_rng_state()\n"
            f"for name in {names!r}:\n    importlib.import_module(name)\n"
            "import script\n"
            "assert script.Config() == script.Config(batch_size=None)\n"
            "assert torch.initial_seed() == seed and torch.equal(torch.get_rng_state(), state)\n"
            "assert not torch.cuda.is_initialized()\n"
            "slow = {'torchvision', 'sklearn', 'scipy', 'matplotlib'} & set(sys.modules)\n"
            "assert not slow, slow\n")
    done = subprocess.run([sys.executable, "-c", code, "--not-a-flag", "--seed", "7"], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == []


def test_config_reads_no_command_line():
    code = "import dataclasses, json, script; print(json.dumps(dataclasses.asdict(script.Config())))"
    text = subprocess.run([sys.executable, "-c", code, "--seed", "7", "--batch-size", "3"], cwd=REPOSITORY, text=True,
                          capture_output=True, timeout=120).stdout
    assert json.loads(text) == dataclasses.asdict(Config())


def test_tests_that_origins_names_exist():
    named = re.findall(r"(test_\w+)\.py(?:: (test_\w+))?", (REPOSITORY / "docs" / "origins.md").read_text())
    assert len(named) > 30
    for file, test in named:
        text = (REPOSITORY / "tests" / f"{file}.py").read_text()
        assert not test or re.search(rf"^def {test}\(", text, re.MULTILINE), f"{file}.py has no {test}"


def test_flags_in_the_documentation_exist():
    import script

    known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(script.Config)}
    known |= {"--preset", "--help"}
    for page in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")):
        text = page.read_text()
        commands = re.findall(r"(?:python|torchrun|srun)[^\n`]* script\.py[^\n`#]*", text)
        flags = {flag for command in commands for flag in re.findall(r"--[a-z][a-z-]+", command.split("script.py")[1])}
        flags |= {flag for cell in re.findall(r"^\| (`--[^|]*) \|", text, re.MULTILINE)
                  for flag in re.findall(r"--[a-z][a-z-]+", cell)}
        unknown = flags - known - {flag.replace("--", "--no-", 1) for flag in known}
        assert not unknown, f"{page.name}: {unknown}"
