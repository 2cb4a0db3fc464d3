"""Steps of a training on a GPU that is not there: `python without_gpu.py`, a line for each case.

torch's fake tensors have a shape, a type and a device, and no content. An operation on tensors of two devices fails,
and so does whatever has to wait for the device: a number that is asked for, a copy to the host, a mask that decides a
shape. Not seen are numbers, kernels and backward passes (gradients are put in place); what has no fake kernel has its
devices checked. Each case is a process of its own, since copies of fake tensors were seen to spoil the memory.
"""

import contextlib
import functools
import os
import sys
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import script

GPU, ROWS, CLASSES = torch.device("cuda"), 200, 10
ALL_CHANGES = ("--rotation 10 --scale 0.1 --shear 0.1 --stretch 0.1 --shift 0.1 --crop 0.5 --perspective 0.2 --elastic "
               "0.1 --thickness 0.5 --brightness 0.1 --contrast 0.1 --erasing 0.5")
CASES = {  # flags, and whether rows have weights and teachers
    "default": ("", False),
    "all changes": (ALL_CHANGES, False),
    "blends": ("--mixup --cutmix --model cnn", True),
    "fp16": ("--precision fp16 --no-augment --accumulate 2", False),
    "sgd": ("--optimizer sgd --model digit-cnn --average-decay 0 --max-grad-norm 0", False),
    "torchvision": ("--model torchvision:resnet18 --optimizer adam --freeze-epochs 1", False),
    "images on the host": ("--model cnn", False),
}


class Watch(TorchDispatchMode):
    """Fails where the host would wait for a copy, and where a kernel without a fake one is given two devices."""

    def __torch_dispatch__(self, operation, _, arguments=(), options=None):
        name, options = str(operation), options or {}
        if "_fused_" in name or "_amp_" in name:
            devices = {part.device.type for part in tree_leaves((arguments, options)) if isinstance(part, torch.Tensor)}
            assert devices == {"cuda"}, f"{name} on {devices}"
            return arguments[0] if "_amp_update" in name else None
        result = operation(*arguments, **options)
        if "_to_copy" in name and arguments[0].device != result.device:
            assert result.device.type == "cuda" and options.get("non_blocking"), f"waits for a copy to {result.device}"
        elif "_to_copy" not in name:
            kinds = {part.device.type for part in tree_leaves((arguments, options))
                     if isinstance(part, torch.Tensor) and part.ndim}
            assert len(kinds) < 2, f"{name} on two devices"
        return result


def put_gradients(loss: torch.Tensor) -> None:
    """In the place of `backward`, which asks the driver: a gradient for each weight that the loss comes from."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                node.variable.grad = torch.zeros_like(node.variable)
            waiting += [following for following, _ in node.next_functions]


def place(runtime: script.Runtime, model: nn.Module) -> nn.Module:
    """In the place of Runtime.place, since fake weights cannot be moved."""
    for layer in model.modules():
        for kind, keep in ((layer._parameters, nn.Parameter), (layer._buffers, lambda tensor: tensor)):
            for name, tensor in kind.items():
                if tensor is not None:
                    kind[name] = keep(torch.empty(tensor.shape, dtype=tensor.dtype, device=runtime.device))
    return model


def begin_draws(draws: script.Draws, seed: int, device: torch.device, part: script.Part | None = None) -> None:
    """In the place of Draws.__init__: a GPU's generator needs the GPU."""
    draws.generator, draws.total, draws.places = mock.Mock(device=device), None, None


def draw(draws: script.Draws, count: int, low: float, high: float, *shape: int) -> torch.Tensor:
    """In the place of Draws.uniform."""
    return draws.pick(draws.empty(count, shape))


@contextlib.contextmanager
def fake_gpu(room: bool):
    """Tensors without content on a GPU, with room for the images or none."""
    from_numpy = torch.from_numpy
    with contextlib.ExitStack() as stack, fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for owner, name, replacement in (
                (torch.cuda, "is_available", lambda: True), (torch.cuda, "current_device", lambda: 0),
                (torch.cuda, "is_current_stream_capturing", lambda: False),
                (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
                (fake_tensor, "init_gpu_context", lambda *_: None),
                (torch.cuda, "mem_get_info", lambda *_: (room * 10**11, 10**11)),
                (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
                (torch, "from_numpy", lambda array: fake.from_tensor(from_numpy(array))),
                (torch.Tensor, "backward", put_gradients), (torch.Tensor, "pin_memory", lambda tensor, *_: tensor),
                (script.Runtime, "place", place), (script.Draws, "__init__", begin_draws),
                (script.Draws, "uniform", draw),
                (script.Draws, "normal", lambda draws, count, _, *shape: draws.pick(draws.empty(count, shape)))):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def learn(flags: str, more: bool, room: bool) -> None:
    """Two steps of training, and a batch of prediction with the neighbours' vote."""
    config = script.parse_command_line(flags.split())[2]
    runtime = script.Runtime(GPU, "bf16" if config.precision == "auto" else config.precision, 1, 64)
    config, rows = script.complete_config(config, runtime, ROWS), np.arange(ROWS)
    dataset = script.MathSymbolDataset(np.zeros((ROWS, 1, 32, 32), np.uint8), rows % CLASSES, runtime)
    assert (dataset.images.device.type == "cuda") == room
    data = script.TrainingData(dataset, rows % CLASSES, [str(number) for number in range(CLASSES)],
                               script.ImageStatistics(255, 32), rows[:150], rows[150:],
                               taught=torch.ones(ROWS, CLASSES, device=GPU).half() if more else None,
                               weights=torch.ones(ROWS, device=GPU) if more else None)
    model = runtime.place(script.build_model(config, CLASSES))
    learner = script.Learner(config, model, CLASSES, runtime)
    learner.model.train()
    with Watch():
        for update in (False, True):
            figures = learner.learn(data.batch(rows[:64]), 1, 0.1, 0.5, update)
        assert figures.device.type == "cuda" and figures.shape == (3,)
        width = next(layer for layer in model[-1].modules() if isinstance(layer, nn.Linear)).in_features
        keys = torch.zeros(150, script.NeighbourVote.COMPONENTS, dtype=torch.bfloat16, device=GPU)
        vote = script.NeighbourVote(model, config, torch.zeros(width, keys.shape[1], device=GPU), keys,
                                    torch.zeros(150, dtype=torch.int64, device=GPU)).eval()
        with torch.no_grad(), runtime.autocast():  # where it is inference_mode, Watch does not see copies
            answers = vote(script.to_input(data.batch(rows[:64]).images, config))
        assert answers.device.type == "cuda" and answers.shape == (64, CLASSES)


FAULTS = {  # what must be found, or the cases above show nothing
    "two devices": lambda: torch.ones(3, device=GPU) + torch.ones(3),
    "a number": lambda: torch.ones((), device=GPU).item(),
    "a copy to the host": lambda: torch.ones(3, device=GPU).cpu(),
    "a copy that is waited for": lambda: torch.ones(3).to(GPU),
    "a copy inside": lambda: torch.ones(3, device=GPU).copy_(torch.ones(3)),
    "an index elsewhere": lambda: torch.ones(3, device=GPU)[torch.tensor([0, 1])],
    "a number sent": lambda: torch.tensor([0.5], device=GPU),
    "a mask": lambda: torch.ones(3, device=GPU)[torch.ones(3, dtype=torch.bool, device=GPU)],
    "a fused kernel on two devices": lambda: torch._fused_sgd_(
        [torch.ones(3, device=GPU)], [torch.ones(3)], [], weight_decay=0, momentum=0, lr=1, dampening=0, nesterov=False,
        maximize=False, is_first_step=False),
}


def notice(fault) -> None:
    """Do what must fail, which an error of its own shows."""
    with Watch():
        try:
            fault()
        except Exception:
            return
    raise AssertionError("was not noticed")


def report(name: str, action, room: bool = True) -> None:
    """A case in a process of its own, and one line about it; the line of script.py where it failed."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"{name}: {'sound' if status == 0 else f'status {status}'}", flush=True)
        return
    try:
        with fake_gpu(room):
            action()
    except BaseException as error:
        own = [place for place in traceback.extract_tb(error.__traceback__) if place.filename.endswith("script.py")]
        print(f"{name}: {type(error).__name__}: {error} {own[-1:]}", flush=True)
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    for case, (flags, more) in CASES.items():
        room = case != "images on the host"
        report(case, functools.partial(learn, flags, more, room), room)
    for name, fault in FAULTS.items():
        report(f"notices {name}", functools.partial(notice, fault))
