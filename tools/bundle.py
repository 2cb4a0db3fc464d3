"""Write script.py and pipeline/ as a single file, for a Kaggle script kernel or a notebook cell.

    python -m tools.bundle [--output kernel.py]

The file is script.py as it is, with Config to edit near its top, after a few lines that hold the modules of pipeline/
as text. When it runs it writes them to a temporary folder, which it puts on the path and removes when it ends. A file
with other content is not overwritten, since Config may have been edited in it.
"""

import argparse
import ast
import sys
from pathlib import Path

from pipeline.errors import DataError
from pipeline.files import atomic_write
from pipeline.signals import exit_status
from tools.common import SCRIPT

HEADER = """\
# Made by `python -m tools.bundle` from script.py and pipeline/, which is carried along as text below. To change a
# setting, edit Config. To change anything in pipeline/, edit it there and make this file again.
"""

# Modules of an earlier execution, in a notebook, are forgotten. Files and not an importer, so that decoding processes,
# tracebacks and inspect find the sources; they include this file, so that its digest in run.json covers it too.
LOADER = '''

def unpack_pipeline(sources: dict[str, str]) -> None:
    """Write the modules of pipeline/ to a temporary folder and put it on the path."""
    import atexit
    import shutil
    import sys
    import tempfile
    from pathlib import Path

    folder = Path(tempfile.mkdtemp(prefix="pipeline-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "pipeline").mkdir()
    for name, source in sources.items():
        (folder / "pipeline" / name).write_text(source, encoding="utf-8")
    if "__file__" in globals():
        shutil.copyfile(__file__, folder / "script.py")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pipeline"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))


unpack_pipeline({
'''


def make_bundle(script: str, modules: dict[str, str]) -> str:
    """Return one program of script.py's text and those of the modules of pipeline/ by file name."""
    lines, first = script.splitlines(keepends=True), 0
    for statement in ast.parse(script).body:  # a docstring and imports from __future__ must come first
        docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if not docstring and getattr(statement, "module", "") != "__future__":
            break
        first = statement.end_lineno
    shebang = int(lines[0].startswith("#!"))
    texts = "".join(f"    {name!r}: {source!r},\n" for name, source in sorted(modules.items()))
    return "".join([*lines[:shebang], HEADER, *lines[shebang:first], LOADER, texts, "})\n", *lines[first:]])


def write_bundle(output: Path) -> None:
    """Write the bundle. Raises DataError if a file with other content is there."""
    modules = {path.name: path.read_text(encoding="utf-8") for path in SCRIPT.with_name("pipeline").glob("*.py")}
    content = make_bundle(SCRIPT.read_text(encoding="utf-8"), modules)
    if output.exists() and output.read_text(encoding="utf-8", errors="replace") != content:
        raise DataError(f"{output}: is there already, with other content; remove it, or name another --output")
    with atomic_write(output) as temporary:
        temporary.write_text(content, encoding="utf-8")
    print(f"wrote {output}: script.py and {len(modules)} modules of pipeline/, {len(content.encode()):,} bytes")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.bundle", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("kernel.py"), help="file to write (kernel.py)")
    given = parser.parse_args(argv)
    return exit_status(lambda _: write_bundle(given.output), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
