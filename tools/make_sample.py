"""Draw the sample competition: mathematical symbols of five typefaces, distorted like handwriting.

    python -m tools.make_sample [--output-dir .]

Writes train.csv, test.csv, classes.csv and Dataset_Image/.

Each symbol carries its id from HASYv2, so the ids have gaps as in the real competition. An image starts as the outline
of a mathtext glyph (cm, stix, stixsans, dejavusans, dejavuserif) and gets its own slant, rotation, proportions, elastic
warp, jitter and stroke width; it is cropped to its ink and drawn at 32x32, black on white. File names and row order
are shuffled, so that they do not give the label away. The same versions of the packages write the same bytes.
"""

import io
import pathlib
import sys

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.transforms import IdentityTransform
from PIL import Image

from pipeline.errors import UsageError
from pipeline.signals import exit_status
from tools.common import make_parser

SYMBOLS = {
    31: "A", 34: "D", 46: "P", 49: "S", 59: r"\rightarrow", 72: "2", 73: "3", 74: "4", 76: "6", 78: "8", 81: r"\pi",
    82: r"\alpha", 87: r"\beta", 88: r"\sum", 117: r"\gamma", 151: r"\delta", 152: r"\Delta", 155: r"\theta",
    162: r"\lambda", 164: r"\mu", 166: r"\xi", 176: r"\varphi", 178: r"\psi", 180: r"\omega", 181: r"\Omega",
    182: r"\partial", 183: r"\int", 185: r"\leq", 186: r"\geq", 189: r"\subset", 196: "+", 513: r"\times",
    524: r"\pm", 526: r"\div", 601: r"\approx", 603: r"\equiv", 698: r"\neq", 763: r"\uparrow", 767: r"\Leftrightarrow",
    882: r"\forall", 888: r"\in", 891: r"\exists", 944: r"\infty", 951: r"\nabla",
}
TYPEFACES = ("cm", "stix", "stixsans", "dejavusans", "dejavuserif")
TRAIN_IMAGES, TEST_IMAGES = 40, 10  # of each class
SIZE, FINE = 32, 8                  # pixels of an image's side, and how many times finer it is drawn
SEED = 20


def glyph(latex: str, typeface: str) -> Path:
    """Return the outline of a symbol in a typeface, its rings cut into short pieces that can be bent."""
    outline = TextPath((0, 0), f"${latex}$", size=100, prop=FontProperties(math_fontfamily=typeface))
    rings = [Path(ring).interpolated(3).vertices for ring in outline.to_polygons()]
    return Path.make_compound_path(*(Path(ring, closed=True) for ring in rings))


def bend(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return points [N, 2] in -1..1 after a random slant, rotation, stretch, elastic warp and jitter."""
    angle, slant = np.radians(rng.normal(0, 9)), rng.normal(0, 0.2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = points @ np.array([[1, 0], [slant, 1]]) @ turn.T * rng.uniform(0.75, 1.25, size=2)
    for length in (2.5, 1.2, 0.7):  # waves across the image, the shorter the weaker
        wave = rng.normal(0, 1, (2, 2)) * np.pi / length
        phase = rng.uniform(0, 2 * np.pi, 2)
        points = points + rng.normal(0, 0.05 * length, 2) * np.sin(points @ wave.T + phase)
    return points + rng.normal(0, 0.008, points.shape)


def draw(path: Path, width: float) -> np.ndarray:
    """Return grey levels 0..255 of a path that is filled, then outlined: in ink (width > 0) or in background."""
    renderer = RendererAgg(SIZE * FINE, SIZE * FINE, 72)
    white, ink = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    context = renderer.new_gc()
    context.set_foreground(ink)
    context.set_linewidth(0)
    renderer.draw_path(context, path, IdentityTransform(), ink)
    context.set_foreground(ink if width > 0 else white)
    context.set_linewidth(abs(width))
    renderer.draw_path(context, path, IdentityTransform(), None)
    rgba = np.asarray(renderer.buffer_rgba()).astype(float)
    return 255 - rgba[..., 3] + rgba[..., 3] / 255 * rgba[..., 0]  # what was never drawn on is transparent


def handwritten(path: Path, rng: np.random.Generator) -> Image.Image:
    """Return one image of a symbol: bent, fitted to its box with a small margin, binarised."""
    box = path.get_extents()
    middle, half = np.array([(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2]), max(box.width, box.height) / 2
    points = bend((path.vertices - middle) / half, rng)
    low, high = points.min(axis=0), points.max(axis=0)
    side, margin = SIZE * FINE, FINE * rng.uniform(0.5, 2.5)
    points = (points - (low + high) / 2) / (high - low).max() * (side - 2 * margin) + side / 2
    pen = FINE * rng.uniform(-0.4, 0.8)
    grey = draw(Path(points, path.codes), pen)
    small = Image.fromarray(grey.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BOX)
    return small.point(lambda level: 255 if level > 180 else 0).convert("1", dither=Image.Dither.NONE)


def draw_all() -> pd.DataFrame:
    """Return a row for each image: its label, whether it is for training, and the image."""
    rows = []
    for label, latex in SYMBOLS.items():
        paths = [glyph(latex, typeface) for typeface in TYPEFACES]
        for number in range(TRAIN_IMAGES + TEST_IMAGES):
            rng = np.random.default_rng([SEED, label, number])
            rows.append((label, number < TRAIN_IMAGES, handwritten(paths[number % len(paths)], rng)))
    return pd.DataFrame(rows, columns=["label", "train", "image"])


def write_sample(folder: pathlib.Path) -> None:
    """Draw the sample and write it. Raises UsageError if a file is there already, with other content."""
    with matplotlib.rc_context({"path.simplify": False, "agg.path.chunksize": 0}):
        table = draw_all().sample(frac=1, random_state=SEED, ignore_index=True)
    table["image_path"] = [f"{number:04d}.png" for number in range(len(table))]
    files = {}
    for name, image in zip(table.image_path, table.image):
        image.save(encoded := io.BytesIO(), "PNG", optimize=True)
        files[f"Dataset_Image/{name}"] = encoded.getvalue()
    test = table[~table.train].reset_index(drop=True)
    tables = {"train.csv": table[table.train][["image_path", "label"]],
              "test.csv": test.assign(example_id=test.index)[["example_id", "image_path"]],
              "classes.csv": pd.DataFrame({"label": SYMBOLS.keys(), "latex": SYMBOLS.values()})}
    files |= {name: own.to_csv(index=False).encode() for name, own in tables.items()}
    for name, content in files.items():
        if (folder / name).exists() and (folder / name).read_bytes() != content:
            raise UsageError(f"{folder / name}: is there already, with other content; name another --output-dir")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    print(f"wrote {len(table)} images of {len(SYMBOLS)} symbols to {folder.resolve()}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    given = make_parser("tools.make_sample", __doc__, "output_dir").parse_args(argv)
    return exit_status(lambda _: write_sample(given.output_dir), "the sample is not complete")


if __name__ == "__main__":
    sys.exit(main())
