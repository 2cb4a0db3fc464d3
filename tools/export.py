"""Write a trained network as ONNX, with what a program without PyTorch needs to use it.

    python -m tools.export best_model.pth [--output-dir .] [--vote]

Writes model.onnx, which maps ink [N, 1, S, S] (float32, 0 is paper and 1 is full ink) to probabilities [N, classes],
and model.json: the classes in the order of the outputs, S, and how an image becomes ink. With `--vote` the training
images that the network remembers are in the file and vote, as they do in `script.py predict`; without, it is the
network alone, which is smaller and faster. The file's answers are compared with PyTorch's on random strokes where
onnxruntime is installed, and the export fails if they differ by more than 0.0001; with the vote, on more than one
drawing in ten, since of two neighbours that are equally near either may be asked. Needs the packages onnx and
onnxscript.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import script

TOLERANCE = 1e-4
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


def to_onnx(model: nn.Module, size: int) -> bytes:
    """A model for any number of images of this size as ONNX. Raises UsageError where a package is missing."""
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise script.UsageError(f"exporting needs packages that are not installed: pip install {' '.join(missing)}")
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
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    ink = drawings(20, size)
    with torch.inference_mode():
        expected = model(ink).numpy()
    differences = np.abs(session.run(None, {"ink": ink.numpy()})[0] - expected).max(axis=1)
    votes = isinstance(model.network, script.NeighbourVote)
    if not (differences <= TOLERANCE).mean() >= 1 - TIES * votes:
        raise script.DataError(f"the answers of the exported network differ from PyTorch's by "
                               f"{differences.max():.1e}: nothing was written")
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        session.run(None, {"ink": ink[:1].numpy()})
        seconds.append(time.perf_counter() - started)
    return (f"its answers differ from PyTorch's by {np.quantile(differences, 1 - TIES * votes):.1e} at the most"
            f"{' on nine drawings in ten' if votes else ''}; a single image takes {1000 * np.median(seconds):.2f} ms "
            "on one core")


def export(given: argparse.Namespace) -> None:
    """Write both files."""
    trained = script.load_checkpoint(given.checkpoint)
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
             "image_statistics": dataclasses.asdict(trained.statistics), "metrics": trained.metrics}
    with script.whole_file(given.output_dir / "model.json") as temporary:
        temporary.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote model.onnx ({len(content) / 1e6:.1f} MB) and model.json in {given.output_dir.resolve()}; {compared}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("."), help="folder of model.onnx and model.json")
    parser.add_argument("--vote", action="store_true", help="with the training images that vote beside the network")
    given = parser.parse_args(argv)
    return script.exit_status(lambda _: export(given), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
