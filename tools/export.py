"""Export a trained network to ONNX, with what a program without PyTorch needs to use it.

    python -m tools.export best_model.pth [--output-dir .] [--vote]
    python -m tools.export best_model.pth --int8 [--data-dir COMPETITION]

Writes model.onnx, which maps ink [N, 1, S, S] (float32, 0 is background and 1 is full ink) to probabilities
[N, classes], and model.json: the classes in the order of the outputs, S, and how an image becomes ink. With `--vote`
the file includes the nearest-neighbour vote of `script.py predict`; without, it is the network alone, which is smaller
and faster. Where onnxruntime is installed, the file's probabilities are compared with PyTorch's on random strokes, and
the export fails if they differ by more than 0.0001; with the vote, if they do on more than one drawing in ten, since
either of two neighbours that are equally near may be chosen. Needs the packages onnx and onnxscript.

`--int8` writes model.int8.onnx too, whose weights and activations are 8-bit integers: a quarter of the size. Their
ranges are measured on images of the checkpoint's validation rows, and both files are scored on the other ones. Needs
onnxruntime.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import script
from pipeline import files
from pipeline.errors import DataError, UsageError
from pipeline.knn import KNNClassifier
from pipeline.signals import exit_status
from tools.common import OF_CHECKPOINT, make_parser, open_validation

TOLERANCE = 1e-4
CALIBRATION = 1024  # largest number of images that the ranges of 8-bit activations are measured on
TIES = 0.1  # share of the drawings on which the vote may differ


class Exported(nn.Module):
    """Maps ink [N, 1, S, S] to probabilities [N, classes]: resizing or softening, the network and its vote."""

    def __init__(self, trained: script.TrainedModel, vote: bool):
        super().__init__()
        self.network, self.config = (trained if vote else trained.without_knn).model, trained.config
        if isinstance(self.network, KNNClassifier):
            self.network.keys = self.network.keys.float()  # not every runtime multiplies bf16

    def forward(self, ink: Tensor) -> Tensor:
        """Return probabilities [N, classes]."""
        return self.network(script.to_input(ink * 255.0, self.config)).softmax(dim=1)


def drawings(count: int, size: int) -> Tensor:
    """Return ink [count, 1, size, size] of random strokes."""
    places = torch.rand(count, 6, 2, generator=torch.Generator().manual_seed(0))
    line = (torch.arange(size) + 0.5) / size
    near = [((line - places[:, :, axis, None]).abs() < 0.08).float() for axis in (0, 1)]
    return torch.einsum("bpi,bpj->bij", *near).clamp(max=1)[:, None]


def need(*packages: str) -> None:
    """Raise UsageError if a package is missing."""
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
        raise UsageError(f"exporting needs packages that are not installed: pip install {' '.join(missing)}")


def to_onnx(model: nn.Module, size: int) -> bytes:
    """Return a model of any number of images of this size as ONNX. Raises UsageError if a package is missing."""
    need("onnx", "onnxscript")
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(model, (drawings(2, size),), input_names=["ink"], output_names=["probabilities"],
                                    dynamic_shapes=({0: torch.export.Dim("images", min=1)},), dynamo=True,
                                    verbose=False)
    return program.model_proto.SerializeToString()


def compare(model: nn.Module, content: bytes, size: int) -> str:
    """Return in words the largest difference between onnxruntime and PyTorch, and milliseconds per image on one core.

    Raises DataError if the difference is too large.
    """
    if not importlib.util.find_spec("onnxruntime"):
        return "not compared with PyTorch: onnxruntime is not installed"
    ink, session = drawings(20, size), open_session(content)
    with torch.inference_mode():
        expected = model(ink).numpy()
    differences = np.abs(session.run(None, {"ink": ink.numpy()})[0] - expected).max(axis=1)
    votes = isinstance(model.network, KNNClassifier)
    if not (differences <= TOLERANCE).mean() >= 1 - TIES * votes:
        raise DataError(f"the probabilities of the exported network differ from PyTorch's by {differences.max():.1e}: "
                        "nothing was written; try other versions of onnxscript and onnxruntime")
    return (f"its probabilities differ from PyTorch's by at most {np.quantile(differences, 1 - TIES * votes):.1e}"
            f"{' on nine drawings in ten' if votes else ''}; a single image takes "
            f"{latency(session, ink[:1].numpy()):.2f} ms on one core")


def open_session(content: bytes):
    """Return an onnxruntime session of a file, on one core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def latency(session, ink: np.ndarray) -> float:
    """Return the milliseconds that a single image [1, 1, S, S] takes: the median of fifty."""
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        session.run(None, {"ink": ink})
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))


def quantize(content: bytes, ink: np.ndarray) -> bytes:
    """Return the network in 8-bit integers, the ranges of its activations measured on ink [N, 1, S, S]."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter(np.array_split(ink, -(-len(ink) // 64)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"ink": batch}

    with tempfile.TemporaryDirectory() as name:  # onnxruntime's tools go from file to file
        plain, folded, whole = (str(Path(name, f"{part}.onnx")) for part in ("plain", "folded", "whole"))
        Path(plain).write_bytes(content)
        quant_pre_process(plain, folded, skip_symbolic_shape=True)
        quantization.quantize_static(folded, whole, Reader(), quant_format=quantization.QuantFormat.QDQ,
                                     per_channel=True, weight_type=quantization.QuantType.QInt8,
                                     activation_type=quantization.QuantType.QUInt8)
        return Path(whole).read_bytes()


def write_int8(content: bytes, given: argparse.Namespace) -> str:
    """Write model.int8.onnx. Return a line for each of both files: size, accuracy and time."""
    need("onnxruntime")
    _, (dataset,) = open_validation([given.checkpoint], given, "cpu")
    targets = dataset.targets
    order = np.random.default_rng(0).permutation(len(targets))
    seen, scored = np.split(order, [min(CALIBRATION, len(order) // 2)])
    if not len(seen):
        raise DataError(f"{dataset.table.path}: --int8 needs at least two validation rows; leave it out")

    def ink(rows: np.ndarray) -> np.ndarray:
        return dataset.images[rows].numpy().astype(np.float32) / 255

    small, lines = quantize(content, ink(seen)), []
    for name, file in (("model.onnx", content), ("model.int8.onnx", small)):
        session, parts = open_session(file), np.array_split(scored, -(-len(scored) // 128))
        hits = sum((session.run(None, {"ink": ink(rows)})[0].argmax(axis=1) == targets[rows]).sum() for rows in parts)
        lines.append(f"{name}: {len(file) / 1e6:.1f} MB, accuracy {hits / len(scored):.2%} on {len(scored):,} "
                     f"validation rows, {latency(session, ink(scored[:1])):.2f} ms an image on one core")
    with files.atomic_write(given.output_dir / "model.int8.onnx") as temporary:
        temporary.write_bytes(small)
    return "\n".join(lines)


def own_metrics(trained: script.TrainedModel, vote: bool) -> dict:
    """Return the checkpoint's metrics; if they include a vote that is not exported, without those of validation."""
    alone = isinstance(trained.model, KNNClassifier) and not vote
    return {name: value for name, value in trained.metrics.items() if not (alone and name.startswith("val_"))}


def export(given: argparse.Namespace) -> None:
    """Write the files and print what they are worth."""
    if given.int8 and given.vote:
        raise UsageError("--int8 is for the network alone; leave --vote out")
    trained = script.load_checkpoint(given.checkpoint)
    if given.vote and not isinstance(trained.model, KNNClassifier):
        raise UsageError(f"--vote: {given.checkpoint} has no nearest-neighbour vote; leave it out")
    files.make_output_folder(given.output_dir, ["model.onnx", "model.json", "model.int8.onnx"])
    size, model = trained.statistics.size, Exported(trained, given.vote).eval()
    content = to_onnx(model, size)
    compared = compare(model, content, size)
    with files.atomic_write(given.output_dir / "model.onnx") as temporary:
        temporary.write_bytes(content)
    background = {255: "1", 0: "0", None: "1 or 0, whichever the median of the image's border is nearer to"}[
        trained.statistics.background]
    about = {"classes": trained.classes, "size": size, "input": "ink", "output": "probabilities",
             "preparation": [
                 f"grey levels, divided by {trained.statistics.levels:g}, which is white",
                 f"ink = |grey - background|, so that background is 0 and full ink 1; the background is {background}; "
                 "transparent pixels are background",
                 f"scaled so that the longer side is {size}, bilinear, and centred on a square of background"],
             "image_statistics": dataclasses.asdict(trained.statistics), "metrics": own_metrics(trained, given.vote)}
    with files.atomic_write(given.output_dir / "model.json") as temporary:
        temporary.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote model.onnx ({len(content) / 1e6:.1f} MB) and model.json in {given.output_dir.resolve()}; {compared}")
    if given.int8:
        print(write_int8(content, given))


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = make_parser("tools.export", __doc__, "output_dir", "cache_dir", **OF_CHECKPOINT)
    parser.add_argument("checkpoint", type=Path, help="checkpoint of script.py")
    parser.add_argument("--vote", action="store_true", help="include the nearest-neighbour vote")
    parser.add_argument("--int8", action="store_true", help="also in 8-bit integers; reads the training table")
    given = parser.parse_args(argv)
    return exit_status(lambda _: export(given), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
