"""Measure how well tools.draw recognises drawings: twenty symbols, with pens of several widths and an unsteady hand.

    python -m benchmarks.drawings CHECKPOINT --data-dir COMPETITION [--hands 5] [--picture drawings.png]

The symbols are written down below as strokes. Each "hand" draws them with its own slant, proportions, tremor and pen
(6 to 60 pixels on a page of 512), and the page goes through the tool's own preparation, as an image file. Prints for
each symbol how often its class is the likeliest and among the first three, and the milliseconds of an answer. For a
network of HASYv2, whose classes are named by `classes.csv`.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import script
from pipeline.errors import DataError
from pipeline.signals import exit_status
from tools.common import OF_CHECKPOINT, make_parser, read_latex
from tools.draw import Recognizer, open_training_images

PAGE, PENS = 512, (6, 12, 20, 34, 60)


def arc(x: float, y: float, width: float, height: float, start: float, end: float) -> list[tuple[float, float]]:
    """Return points of an ellipse around (x, y) from one angle to another, in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(start, end, 24))
    return list(zip(x + width * np.cos(angles), y + height * np.sin(angles)))


# LaTeX of a class: strokes of points (x, y) in 0..1, y downwards, as a hand would draw them.
SYMBOLS = {
    r"\alpha": [[(0.95, 0.1), (0.8, 0.45), *arc(0.38, 0.52, 0.33, 0.32, 45, 315), (0.8, 0.65), (1.0, 0.9)]],
    r"\infty": [[*arc(0.25, 0.5, 0.25, 0.2, -30, -330), *arc(0.75, 0.5, 0.25, 0.2, -150, 150), (0.46, 0.4)]],
    r"\int": [[*arc(0.68, 0.16, 0.14, 0.12, 0, -170), (0.5, 0.5), *arc(0.32, 0.84, 0.14, 0.12, 10, 180)]],
    r"\pi": [[(0.05, 0.22), (0.3, 0.15), (0.95, 0.14)], [(0.35, 0.17), (0.32, 0.6), (0.2, 0.9)],
             [(0.68, 0.16), (0.68, 0.75), (0.78, 0.9), (0.92, 0.82)]],
    r"\sqrt{}": [[(0.0, 0.6), (0.12, 0.55), (0.3, 0.95), (0.5, 0.05), (1.0, 0.05)]],
    r"\sum": [[(0.9, 0.1), (0.1, 0.08), (0.55, 0.5), (0.08, 0.92), (0.95, 0.92)]],
    r"\Delta": [[(0.5, 0.05), (0.05, 0.92), (0.95, 0.92), (0.5, 0.05)]],
    r"\forall": [[(0.05, 0.05), (0.5, 0.95), (0.95, 0.05)], [(0.27, 0.45), (0.74, 0.45)]],
    r"\exists": [[(0.15, 0.05), (0.8, 0.05), (0.8, 0.95), (0.15, 0.95)], [(0.2, 0.5), (0.8, 0.5)]],
    r"\in": [[(0.9, 0.12), *arc(0.55, 0.5, 0.45, 0.38, -90, -270), (0.9, 0.88)], [(0.12, 0.5), (0.85, 0.5)]],
    r"\rightarrow": [[(0.0, 0.5), (1.0, 0.5)], [(0.75, 0.3), (1.0, 0.5), (0.75, 0.7)]],
    r"\neq": [[(0.05, 0.38), (0.95, 0.38)], [(0.05, 0.65), (0.95, 0.65)], [(0.72, 0.05), (0.3, 0.95)]],
    r"\leq": [[(0.9, 0.05), (0.1, 0.38), (0.9, 0.7)], [(0.1, 0.92), (0.92, 0.92)]],
    r"\approx": [[*arc(0.25, 0.4, 0.22, 0.12, -180, 0), *arc(0.7, 0.34, 0.22, 0.12, 180, 0)],
                 [*arc(0.25, 0.74, 0.22, 0.12, -180, 0), *arc(0.7, 0.68, 0.22, 0.12, 180, 0)]],
    r"\theta": [[*arc(0.5, 0.5, 0.3, 0.46, -90, 270)], [(0.2, 0.5), (0.8, 0.5)]],
    r"\Omega": [[(0.05, 0.93), (0.35, 0.93), *arc(0.5, 0.42, 0.4, 0.38, 120, 420), (0.65, 0.93), (0.95, 0.93)]],
    r"\Psi": [[(0.1, 0.12), *arc(0.5, 0.25, 0.38, 0.42, 170, 10), (0.9, 0.12)], [(0.5, 0.05), (0.5, 0.95)]],
    r"\lambda": [[(0.15, 0.05), (0.35, 0.08), (0.85, 0.95)], [(0.5, 0.4), (0.1, 0.95)]],
    r"\nabla": [[(0.05, 0.08), (0.95, 0.08), (0.5, 0.95), (0.05, 0.08)]],
    r"\partial": [[(0.3, 0.12), (0.5, 0.05), (0.72, 0.15), (0.8, 0.5), *arc(0.5, 0.68, 0.3, 0.27, -10, -370)]],
}


def draw(strokes: list, pen: int, random: np.random.Generator) -> Image.Image:
    """Return a page on which a hand of its own has drawn a symbol."""
    angle, slant = random.normal(0, 0.06), random.normal(0, 0.08)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[1, slant], [0, 1]]
    size = random.uniform(0.45, 0.75) * PAGE * np.exp(random.normal(0, 0.08, 2))
    middle = PAGE / 2 + random.normal(0, 12, 2)
    page = Image.new("L", (PAGE, PAGE), 255)
    brush = ImageDraw.Draw(page)
    for stroke in strokes:
        points = np.array(stroke) - 0.5
        lengths = np.concatenate([[0], np.hypot(*np.diff(points, axis=0).T).cumsum()])
        along = np.linspace(0, lengths[-1], 200)
        line = np.stack([np.interp(along, lengths, axis) for axis in points.T], axis=1)
        tremor = random.normal(0, 0.02, (2, 8))  # slow: eight waypoints along a stroke
        line += np.stack([np.interp(along, np.linspace(0, lengths[-1], 8), way) for way in tremor], axis=1)
        for x, y in line @ turn.T * size + middle:
            brush.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=0)
    return page


def measure(given: argparse.Namespace) -> None:
    """Draw every symbol with every hand, and print the table."""
    trained = script.load_checkpoint(given.checkpoint)
    latex = read_latex(trained.config, given)
    labels = {text: label for label, text in latex.items()}
    if missing := SYMBOLS.keys() - labels.keys():
        raise DataError(f"the checkpoint's classes.csv has no {min(missing)}; name a competition of HASYv2 with "
                        "--data-dir")
    recognizer = Recognizer(trained, latex, *open_training_images(trained, given))
    random, milliseconds, pages, found = np.random.default_rng(given.seed), [], [], 0
    print("| symbol | likeliest | among three | seen as |")
    print("|---|--:|--:|---|")
    for text, strokes in SYMBOLS.items():
        hits, seen = np.zeros(2), []
        for hand in range(given.hands):
            page, buffer = draw(strokes, PENS[hand % len(PENS)], random), io.BytesIO()
            page.save(buffer, "PNG")
            answer = recognizer.answer(buffer.getvalue())
            names = [likely["label"] for likely in answer["classes"]]
            hits += labels[text] == names[0], labels[text] in names[:3]
            milliseconds.append(answer["milliseconds"])
            seen.append(latex.get(names[0], names[0]))
            pages.append(page.resize((96, 96), Image.Resampling.BOX))
        found += hits[1] > given.hands / 2
        print(f"| `{text}` | {hits[0]:.0f} of {given.hands} | {hits[1]:.0f} | {' '.join(seen)} |")
    print(f"among the first three for most hands: {found} of {len(SYMBOLS)} symbols; an answer takes "
          f"{int(np.median(milliseconds))} ms, at most {max(milliseconds)}")
    if given.picture:
        sheet = Image.new("L", (96 * given.hands, 96 * len(SYMBOLS)), 255)
        for number, page in enumerate(pages):
            sheet.paste(page, (96 * (number % given.hands), 96 * (number // given.hands)))
        sheet.save(given.picture)


def main() -> None:
    """Run the command line."""
    parser = make_parser("benchmarks.drawings", __doc__, "cache_dir", **OF_CHECKPOINT)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--hands", type=int, default=5, help="drawings of each symbol (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the hands (0)")
    parser.add_argument("--picture", type=Path, help="also write a sheet of the drawings there")
    given = parser.parse_args()
    sys.exit(exit_status(lambda _: measure(given), "the drawings are not all measured"))


if __name__ == "__main__":
    main()
