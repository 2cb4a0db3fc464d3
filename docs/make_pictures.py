"""Draw the pictures of README.md and docs/ again, and run the notebook for its outputs.

    python docs/make_pictures.py [CHECKPOINT]

Runs the sample competition for predictions.png, augmented.png and quickstart.ipynb. draw.png needs Chromium and a
checkpoint of the real symbols, beside its training table.
"""

import argparse
import base64
import io
import sys
import tempfile
import threading
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import Browser  # noqa: E402

import script  # noqa: E402
from benchmarks.drawings import SYMBOLS  # noqa: E402
from pipeline import plots, tables  # noqa: E402
from tools import draw  # noqa: E402
from tools.common import read_latex  # noqa: E402


def shrink(source: Path, target: Path, colours: int = 64) -> None:
    """Write a picture with few colours, so that it is small."""
    Image.open(source).convert("RGB").quantize(colours).save(target, optimize=True)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size // 1000} KB")


def draw_augmented(path: Path) -> None:
    """Draw training images of the sample, each once as it is and five times augmented."""
    config = script.Config(data_dir=str(ROOT), model="cnn", image_size=32)
    table = tables.read_train_table(config.train_source)
    dataset = script.MathSymbolDataset(table, config)
    rows = plots.evenly_spaced(len(table), 6)
    views = [dataset.batch(rows, seed)[0] for seed in (None, 1, 2, 3, 4, 5)]
    images = np.stack([(255 * view[:, 0]).numpy().astype(np.uint8) for view in views], axis=1).reshape(-1, 32, 32)
    texts = ["as it is", *["augmented"] * 5] * len(rows)
    plots.plot_images(path, "", images, texts, columns=12)


def draw_page(path: Path, checkpoint: Path) -> None:
    """Draw a symbol on the page of tools.draw, and take a picture of it."""
    given = argparse.Namespace(cache_dir="", data_dir=None, train_csv=None, root_dir=None)
    trained = script.load_checkpoint(checkpoint)
    recognizer = draw.Recognizer(trained, read_latex(trained.config, given),
                                 *draw.open_training_images(trained, given))
    with tempfile.TemporaryDirectory() as folder, draw.make_server(recognizer, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Browser(Path(folder), 940, 640) as browser:
            browser.open(f"http://127.0.0.1:{server.server_port}/")
            left, top, side = browser.value("(box => [box.left, box.top, box.width])"
                                            "(document.querySelector('canvas').getBoundingClientRect())")
            for stroke in SYMBOLS[r"\Omega"]:
                points = np.array(stroke) * side * 0.6 + [left + 0.2 * side, top + 0.2 * side]
                browser.stroke(points.tolist())
            browser.wait_for("document.querySelectorAll('.answer').length === 5")
            browser.wait_for("[...document.images].every(image => image.complete)")
            browser.screenshot(path)
        server.shutdown()


def shrink_output(data: dict) -> None:
    """Give a notebook's picture few colours."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as image:
        small = image.convert("RGB").resize((image.width * 2 // 3, image.height * 2 // 3), Image.Resampling.LANCZOS)
    small.quantize(32).save(buffer, "PNG", optimize=True)
    data["image/png"] = base64.b64encode(buffer.getvalue()).decode()


def run_notebook(path: Path, folder: Path) -> None:
    """Run a notebook from top to bottom, and write it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    (folder / "docs").mkdir(parents=True)
    for name in ("script.py", "pipeline", "train.csv", "test.csv", "classes.csv", "Dataset_Image"):
        (folder / name).symlink_to(ROOT / name)
    NotebookClient(notebook, timeout=600, kernel_name="python3",
                   resources={"metadata": {"path": str(folder / "docs")}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}  # the times of its execution
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                shrink_output(output["data"])
    nbformat.write(notebook, path)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} KB")


def main() -> None:
    """Draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if script.main(["--data-dir", str(ROOT), "--output-dir", name]):
            sys.exit(1)
        shrink(folder / "predictions.png", DOCS / "predictions.png")
        draw_augmented(folder / "augmented.png")
        shrink(folder / "augmented.png", DOCS / "augmented.png", 32)
        run_notebook(DOCS / "quickstart.ipynb", folder / "notebook")
        if given.checkpoint:
            draw_page(folder / "draw.png", given.checkpoint)
            shrink(folder / "draw.png", DOCS / "draw.png", 128)


if __name__ == "__main__":
    main()
