"""Open a page on which one draws a symbol and sees what a network takes it for.

    python -m tools.draw out/best_model.pth [--data-dir my-competition] [--port 8000]

Draw with mouse, pen or finger at http://127.0.0.1:8000. After each stroke the page shows the five likeliest classes
with their probabilities, and the training images that are nearest to the drawing. A drawing is prepared as the training
images were: cut out if they have no margins, its strokes as wide, without greys if they have none. An image file that
is dropped on the page is read as a drawing, too.

The server is that of Python's standard library, listens on this machine alone and needs nothing from outside. Without
the training table the page works, and shows no training images. Ctrl-C ends it.
"""

import argparse
import dataclasses
import functools
import io
import json
import sys
import threading
import time
import webbrowser
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor

import script
from pipeline import plots, tables
from pipeline.device import start_runtime
from pipeline.errors import DataError, UsageError, warn
from pipeline.images import LoadSettings, load_images
from pipeline.knn import KNNClassifier, split_head
from pipeline.signals import exit_status
from tools.classify import as_dataset
from tools.common import OF_CHECKPOINT, as_png, cut_out, find_split, make_parser, read_ink, read_latex, train_source

PAGE = Path(__file__).with_name("draw.html")
LARGEST_BODY = 4 * 2**20  # bytes of an image that is sent to the server
WORKING_SIDE = 256        # pixels to which a drawing's longer side is scaled before its strokes are measured
WIDEST_STROKE = 0.3       # of a drawing's longer side; what is wider is an area, and not a stroke
SAMPLE = 500              # training images that are measured
SHOWN, NEAREST = 5, 5     # classes and training images in an answer


# ---- A drawing becomes an image like those of the training table -----------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Preparation:
    """What the training images look like; a drawing is made alike. None leaves it as it is."""

    extent: float = 1.0          # longer side of the ink's bounding box, as a share of the image's
    by_mass: bool = False        # the ink's centre of mass is in the middle, and not that of its bounding box
    stroke: float | None = None  # width of strokes, as a share of the bounding box's longer side
    binary: bool = False         # no greys


def enlarge(ink: np.ndarray) -> np.ndarray:
    """Return the ink [H, W], True or False, of a cut-out drawing whose longer side is WORKING_SIDE pixels."""
    scale = WORKING_SIDE / max(ink.shape)
    size = [max(1, round(side * scale)) for side in ink.shape[::-1]]
    return np.asarray(Image.fromarray(ink).resize(size, Image.Resampling.BICUBIC)) > 127


def depths(mask: np.ndarray) -> np.ndarray:
    """Return each ink pixel's distance to the nearest pixel without ink, 0 elsewhere."""
    return distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]


def stroke_width(mask: np.ndarray) -> float:
    """Return the mean width of strokes in pixels: across one of 2 n pixels the depths are 1 to n, and n to 1."""
    inside = depths(mask)[mask]
    return 4 * float(inside.mean()) - 2 if len(inside) else 0.0


def change_width(mask: np.ndarray, share: float) -> np.ndarray:
    """Return a drawing whose strokes have this share of its longer side as mean width. Areas are left as they are."""
    now, side = stroke_width(mask), max(mask.shape)
    if now > WIDEST_STROKE * side:
        return mask
    half = (share * (side - now) / (1 - share) - now) / 2  # the drawing grows and shrinks with its strokes
    if half > 0:
        margin = int(half) + 1
        return distance_transform_edt(~np.pad(mask, margin)) <= half
    thinner = depths(mask) > -half
    return thinner if thinner.any() else mask


def describe_training_images(images: np.ndarray) -> Preparation:
    """Return what training images [N, S, S], uint8, look like, by up to SAMPLE of them."""
    sample = images[plots.evenly_spaced(len(images), SAMPLE)]
    sample = sample[sample.max(axis=(1, 2)) > 127]
    if not len(sample):
        return Preparation()
    size, line = sample.shape[-1], np.arange(sample.shape[-1]) + 0.5
    extents, boxes, masses, widths = [], [], [], []
    for ink in sample:
        sides = [np.flatnonzero(ink.max(axis=axis) > 127) for axis in (0, 1)]
        extents.append(max(side[-1] - side[0] + 1 for side in sides) / size)
        boxes.append([(side[0] + side[-1] + 1) / 2 for side in sides])
        masses.append([np.average(line, weights=ink.sum(axis=axis)) for axis in (0, 1)])
        widths.append(stroke_width(enlarge(cut_out(ink))) / WORKING_SIDE)
    greys = ((sample > 40) & (sample < 215)).sum() / (sample > 40).sum()
    off_centre = [np.abs(np.array(centres) - size / 2).mean() for centres in (boxes, masses)]
    return Preparation(float(np.median(extents)), bool(off_centre[1] < off_centre[0]), float(np.median(widths)),
                       bool(greys < 0.05))


def prepare(ink: np.ndarray, size: int, like: Preparation) -> np.ndarray:
    """Return a drawing [H, W] as an image [size, size], uint8, like those of the training table."""
    ink = cut_out(ink)
    if like.stroke:
        mask = change_width(enlarge(ink), like.stroke)
        ink = cut_out(255 * mask.astype(np.uint8))
    side = max(1, round(like.extent * size))
    scale = side / max(ink.shape)
    height, width = (max(1, round(extent * scale)) for extent in ink.shape)
    small = Image.fromarray(ink).resize((width, height), Image.Resampling.BOX)
    top, left = (size - height) / 2, (size - width) / 2
    if like.by_mass:
        weights = np.asarray(small, dtype=float) + 1e-9
        top = size / 2 - np.average(np.arange(height) + 0.5, weights=weights.sum(axis=1))
        left = size / 2 - np.average(np.arange(width) + 0.5, weights=weights.sum(axis=0))
    page = Image.new("L", (size, size), 0)
    page.paste(small, (min(max(round(left), 0), size - width), min(max(round(top), 0), size - height)))
    result = np.asarray(page)
    return np.where(result > 127, 255, 0).astype(np.uint8) if like.binary else result


# ---- The answer ------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=1000)
def draw_name(name: str) -> bytes:
    """Return a picture (SVG) of a class's name, which may be LaTeX in dollars."""
    figure, buffer = Figure(figsize=(0.8, 0.6)), io.BytesIO()
    figure.text(0.5, 0.5, name, ha="center", va="center", fontsize=24 if name.startswith("$") else 11)
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()


class Recognizer:
    """A trained network on the CPU, with images [N, S, S] and class numbers [N] of its training if they are known."""

    def __init__(self, trained: script.TrainedModel, latex: dict[str, str], images: np.ndarray | None = None,
                 targets: np.ndarray | None = None):
        self.runtime = start_runtime("cpu", "float32")
        self.model = self.runtime.to_device(trained.model).eval()
        self.trained, self.images, self.targets = trained, images, targets
        self.names = [latex.get(label, label) for label in trained.classes]
        drawn = plots.class_names(trained.classes, latex)  # LaTeX in dollars where matplotlib can draw it
        self.pictures = [text if text.startswith("$") else name.replace("$", r"\$")
                         for text, name in zip(drawn, self.names)]
        self.like = Preparation() if images is None else describe_training_images(images)
        self.keys = self.model.keys.float() if isinstance(self.model, KNNClassifier) else None
        if images is not None and (self.keys is None or len(self.keys) != len(images)):
            warn("the checkpoint has no nearest-neighbour index of these training images alone, so none are shown")
            self.keys = None
        self.lock = threading.Lock()  # an answer uses all cores

    def answer(self, body: bytes) -> dict:
        """Return what the page shows of a drawing, an image file of any kind. Raises DataError for anything else."""
        begun = time.perf_counter()
        ink = read_ink(body, self.trained.statistics, "the drawing")
        if ink.max() <= 127:
            return {"classes": []}
        image = prepare(ink, self.trained.statistics.size, self.like)
        with self.lock:
            dataset = as_dataset(self.trained, [image], self.runtime)
            probabilities = script.predict(self.model, dataset)[0]
            nearest = self.find_nearest(dataset.batch(np.zeros(1, dtype=int))[0])
        likeliest = probabilities.argsort()[::-1][:SHOWN]
        return {"classes": [{"number": int(number), "label": self.trained.classes[number], "name": self.names[number],
                             "probability": float(probabilities[number])} for number in likeliest],
                "nearest": nearest, "drawing": as_png(image),
                "milliseconds": round(1000 * (time.perf_counter() - begun))}

    @torch.inference_mode()
    def find_nearest(self, inputs: Tensor) -> list[dict]:
        """Return the training images that the network finds most like its input [1, 1, S, S], and their classes."""
        if self.images is None or self.keys is None:
            return []
        body, _ = split_head(self.model.network)
        query = F.normalize(body(inputs) @ self.model.projection, dim=1)
        places = (query @ self.keys.T)[0].topk(min(NEAREST, len(self.keys))).indices.tolist()
        return [{"image": as_png(self.images[place]), "name": self.names[self.targets[place]]}
                for place in places]


# ---- The server ------------------------------------------------------------------------------------------------------

class Handler(BaseHTTPRequestHandler):
    """Answers a browser on this machine: the page, the classes' pictures, and what a drawing is taken for."""

    recognizer: Recognizer  # set on the class that a server uses
    protocol_version = "HTTP/1.1"
    timeout = 10            # seconds that a request may take to arrive

    def send(self, status: HTTPStatus, content: bytes, kind: str = "application/json") -> None:
        """Send a whole answer."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline' data: blob:")
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: HTTPStatus, message: str) -> None:
        """Send what is wrong, and close the connection, whose body may not have been read."""
        self.close_connection = True
        self.send(status, json.dumps({"error": message}).encode())

    def is_local(self) -> bool:
        """Return whether the page's own name was asked for; other names may be another site's that points here."""
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        return host in ("127.0.0.1", "localhost")

    def do_GET(self) -> None:
        """Send the page, or the picture of a class."""
        number = self.path.removeprefix("/symbol/")
        if not self.is_local():
            self.refuse(HTTPStatus.FORBIDDEN, "only this machine is served")
        elif self.path == "/":
            self.send(HTTPStatus.OK, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif number.isascii() and number.isdecimal() and int(number[:9]) < len(self.recognizer.pictures):
            self.send(HTTPStatus.OK, draw_name(self.recognizer.pictures[int(number)]), "image/svg+xml")
        else:
            self.refuse(HTTPStatus.NOT_FOUND, f"{self.path}: there is no such page")

    def do_POST(self) -> None:
        """Classify the image file that is the request's body."""
        length = self.headers.get("Content-Length", "")
        if not self.is_local():
            self.refuse(HTTPStatus.FORBIDDEN, "only this machine is served")
        elif self.path != "/classify":
            self.refuse(HTTPStatus.NOT_FOUND, f"{self.path}: there is no such page")
        elif not (length.isascii() and length.isdecimal()):
            self.refuse(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long it is")
        elif len(length) > 9 or int(length) > LARGEST_BODY:
            self.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the image has more than {LARGEST_BODY >> 20} MB")
        else:
            try:
                answer = self.recognizer.answer(self.rfile.read(int(length)))
            except DataError as error:
                self.refuse(HTTPStatus.BAD_REQUEST, str(error))
            else:
                self.send(HTTPStatus.OK, json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        """Print nothing for each request."""


def open_training_images(trained: script.TrainedModel,
                         given: argparse.Namespace) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the images [N, S, S] and class numbers [N] of the rows that a network was trained on; None without them.

    They are in the order of the nearest-neighbour vote's index.
    """
    try:
        table = tables.read_train_table(train_source(trained.config, given))
        if table.labels_sha256 != trained.labels_sha256:
            raise DataError(f"{table.path}: not the table that the network was trained on")
        images, = load_images([table], trained.statistics, LoadSettings(given.cache_dir, on_bad_image="skip"))
        rows = find_split(trained, table, images).train_rows
        return images[rows, 0], tables.class_numbers(table.rows.label, trained.classes)[rows]
    except DataError as error:
        warn(f"{error}; without the training images, a drawing is not made like them, and none are shown: name their "
             "folder with --data-dir")
        return None, None


def make_server(recognizer: Recognizer, port: int) -> ThreadingHTTPServer:
    """Return a server on this machine's loopback address. Raises UsageError if the port is in use."""
    handler = type("RecognizerHandler", (Handler,), {"recognizer": recognizer})
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise UsageError(f"port {port} cannot be used ({error.strerror.lower()}); name another with --port, or 0 for "
                         "any that is free") from None


def serve(given: argparse.Namespace) -> None:
    """Load the network, and answer until a signal comes."""
    trained = script.load_checkpoint(given.checkpoint)
    recognizer = Recognizer(trained, read_latex(trained.config, given), *open_training_images(trained, given))
    with make_server(recognizer, given.port) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        print(f"draw at {address} (Ctrl-C ends)", flush=True)
        if given.browser:
            webbrowser.open(address)
        server.serve_forever()


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = make_parser("tools.draw", __doc__, "cache_dir", **OF_CHECKPOINT)
    parser.add_argument("checkpoint", type=Path, help="checkpoint of script.py")
    parser.add_argument("--port", type=int, default=8000, help="port on 127.0.0.1 (8000; 0: any that is free)")
    parser.add_argument("--browser", action=argparse.BooleanOptionalAction, default=True, help="open a browser (True)")
    given = parser.parse_args(argv)
    return exit_status(lambda _: serve(given), "the page is no longer served")


if __name__ == "__main__":
    sys.exit(main())
