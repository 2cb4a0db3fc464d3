"""Write a trained network as ONNX, with what a program without PyTorch needs to use it.

    python -m tools.export best_model.pth [--output-dir .] [--vote]
    python -m tools.export best_model.pth --int8 --data-dir COMPETITION

Writes model.onnx, which maps ink [N, 1, S, S] (float32, 0 is paper and 1 is full ink) to probabilities [N, classes],
and model.json: the classes in the order of the outputs, S, and how an image becomes ink. With `--vote` the training
images that the network remembers are in the file and vote, as they do in `script.py predict`; without, it is the
network alone, which is smaller and faster. The file's answers are compared with PyTorch's on random strokes where
onnxruntime is installed, and the export fails if they differ by more than 0.0001; with the vote, on more than one
drawing in ten, since of two neighbours that are equally near either may be asked. Needs the packages onnx and
onnxscript.

`--int8` writes model.int8.onnx too, whose weights and activations are 8-bit integers: a quarter of the size. Their
ranges are taken from images of the checkpoint's validation rows, and both files are scored on the other ones. Needs
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

TOLERANCE = 1e-4
CALIBRATION = 1024  # images that the ranges of 8-bit activations are taken from, at the most
TIES = 0.1  # share of the drawings on which a vote may be decided otherwise


class Exported(nn.Module):
    """From ink [N, 1, S, S] to probabilities [N, classes]: the network's own preparation, itself, and its vote."""

    def __init__(self, trained: script.Trained, vote: bool):
        super().__init__()
        self.network, self.config = (trained if vote else trained.alone).model, trained.config
        if isinstance(self.network, script.NeighbourVote):
            self.network.keys = self.network.keys.float()  # which not every runtime multiplies in bf16

    def forward(self, ink: Tensor) -> Tensor:
        return self.network(script.to_input(ink * 255.0, self.config)).softmax(dim=1)


def drawings(count: int, size: int) -> Tensor:
    """Ink [count, 1, size, size] of strokes at random: something to compare answers on."""
    places = torch.rand(count, 6, 2, generator=torch.Generator().manual_seed(0))
    line = (torch.arange(size) + 0.5) / size
    near = [((line - places[:, :, axis, None]).abs() < 0.08).float() for axis in (0, 1)]
    return torch.einsum("bpi,bpj->bij", *near).clamp(max=1)[:, None]


def need(*packages: str) -> None:
    """Raise UsageError where a package is missing."""
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
        raise script.UsageError(f"exporting needs packages that are not installed: pip install {' '.join(missing)}")


def to_onnx(model: nn.Module, size: int) -> bytes:
    """A model for any number of images of this size as ONNX. Raises UsageError where a package is missing."""
    need("onnx", "onnxscript")
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(model, (drawings(2, size),), input_names=["ink"], output_names=["probabilities"],
                                    dynamic_shapes=({0: torch.export.Dim("images", min=1)},), dynamo=True,
                                    verbose=False)
    return program.model_proto.SerializeToString()


def compare(model: nn.Module, content: bytes, size: int) -> str:
    """What onnxruntime makes of it: the greatest difference, and milliseconds an image on one core.

    Raises DataError where its answers are not PyTorch's.
    """
    if not importlib.util.find_spec("onnxruntime"):
        return "not compared with PyTorch: onnxruntime is not installed"
    ink, session = drawings(20, size), open_session(content)
    with torch.inference_mode():
        expected = model(ink).numpy()
    differences = np.abs(session.run(None, {"ink": ink.numpy()})[0] - expected).max(axis=1)
    votes = isinstance(model.network, script.NeighbourVote)
    if not (differences <= TOLERANCE).mean() >= 1 - TIES * votes:
        raise script.DataError(f"the answers of the exported network differ from PyTorch's by "
                               f"{differences.max():.1e}: nothing was written")
    return (f"its answers differ from PyTorch's by {np.quantile(differences, 1 - TIES * votes):.1e} at the most"
            f"{' on nine drawings in ten' if votes else ''}; a single image takes "
            f"{latency(session, ink[:1].numpy()):.2f} ms on one core")


def open_session(content: bytes):
    """onnxruntime's session of a file, on one core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def latency(session, ink: np.ndarray) -> float:
    """Milliseconds that a single image [1, 1, S, S] takes: the median of fifty."""
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        session.run(None, {"ink": ink})
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))


def quantize(content: bytes, ink: np.ndarray) -> bytes:
    """The same network in 8-bit integers, the ranges of its activations taken from ink [N, 1, S, S]."""
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


def write_int8(trained: script.Trained, content: bytes, given: argparse.Namespace) -> str:
    """Write model.int8.onnx; gives what it and the exact one are worth on validation rows."""
    need("onnxruntime")
    config = script.Config(data_dir=str(given.data_dir), cache_dir=given.cache_dir, device="cpu")
    question, targets = script.validation_question([trained], config, script.start_runtime(config))
    dataset = question.dataset(trained.statistics)
    order = np.random.default_rng(0).permutation(len(targets))
    seen, scored = np.split(order, [min(CALIBRATION, len(order) // 2)])
    if not len(seen):
        raise script.DataError(f"{given.data_dir}: one validation row is too few for --int8")

    def ink(rows: np.ndarray) -> np.ndarray:
        return dataset.images[rows].numpy().astype(np.float32) / 255

    small, lines = quantize(content, ink(seen)), []
    for name, file in (("model.onnx", content), ("model.int8.onnx", small)):
        session, parts = open_session(file), np.array_split(scored, -(-len(scored) // 128))
        hits = sum((session.run(None, {"ink": ink(rows)})[0].argmax(axis=1) == targets[rows]).sum() for rows in parts)
        lines.append(f"{name}: {len(file) / 1e6:.1f} MB, accuracy {hits / len(scored):.2%} on {len(scored):,} "
                     f"validation rows, {latency(session, ink(scored[:1])):.2f} ms an image on one core")
    with script.whole_file(given.output_dir / "model.int8.onnx") as temporary:
        temporary.write_bytes(small)
    return "\n".join(lines)


def own_metrics(trained: script.Trained, vote: bool) -> dict:
    """The checkpoint's figures; without those of validation where they are the vote's and the network goes alone."""
    alone = isinstance(trained.model, script.NeighbourVote) and not vote
    return {name: value for name, value in trained.metrics.items() if not (alone and name.startswith("val_"))}


def export(given: argparse.Namespace) -> None:
    """Write the files."""
    if given.int8 and given.vote:
        raise script.UsageError("--int8 is for the network alone; leave --vote out")
    trained = script.load_checkpoint(given.checkpoint)
    if given.vote and not isinstance(trained.model, script.NeighbourVote):
        raise script.UsageError(f"--vote: {given.checkpoint} remembers no training images; leave it out")
    given.output_dir.mkdir(parents=True, exist_ok=True)
    size, model = trained.statistics.size, Exported(trained, given.vote).eval()
    content = to_onnx(model, size)
    compared = compare(model, content, size)
    with script.whole_file(given.output_dir / "model.onnx") as temporary:
        temporary.write_bytes(content)
    about = {"classes": trained.classes, "size": size, "input": "ink", "output": "probabilities",
             "preparation": [
                 f"grey levels 0 to 255; transparent pixels are paper, which is {trained.statistics.paper} here",
                 "ink = |grey - paper| / 255, so that paper is 0 and full ink 1",
                 f"scaled so that the longer side is {size}, bilinear, and centred on a square of paper"],
             "image_statistics": dataclasses.asdict(trained.statistics), "metrics": own_metrics(trained, given.vote)}
    with script.whole_file(given.output_dir / "model.json") as temporary:
        temporary.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote model.onnx ({len(content) / 1e6:.1f} MB) and model.json in {given.output_dir.resolve()}; {compared}")
    if given.int8:
        print(write_int8(trained.alone, content, given))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("."), help="folder of model.onnx and model.json")
    parser.add_argument("--vote", action="store_true", help="with the training images that vote beside the network")
    parser.add_argument("--int8", action="store_true", help="also in 8-bit integers; needs the data it was trained on")
    parser.add_argument("--data-dir", type=Path, default=Path("."), help="int8: the competition's folder")
    parser.add_argument("--cache-dir", default="", help="int8: folder of decoded images")
    given = parser.parse_args(argv)
    return script.exit_status(lambda _: export(given), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
