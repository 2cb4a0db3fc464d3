"""timm: create_model, optimizer, schedule, mixup and loader. Arguments: folder, minutes, answers, precision."""

import sys
import time
from pathlib import Path

import pandas as pd
import timm
import torch
from PIL import Image
from timm.data import Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

started = time.monotonic()
folder, seconds, answers, bf16 = Path(sys.argv[1]), 60 * float(sys.argv[2]), sys.argv[3], sys.argv[4] == "bf16"
train, test = pd.read_csv(folder / "train.csv", dtype=str), pd.read_csv(folder / "test.csv", dtype=str)
classes = sorted(train.label.unique())
numbers = {label: number for number, label in enumerate(classes)}


class Images(torch.utils.data.Dataset):
    def __init__(self, paths, targets):
        self.paths, self.targets, self.transform = paths, targets, None

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        return self.transform(Image.open(folder / "Dataset_Image" / self.paths[row]).convert("L")), self.targets[row]


common = {"input_size": (1, 32, 32), "batch_size": 128, "mean": (0.5,), "std": (0.5,), "num_workers": 2,
          "use_prefetcher": False, "device": torch.device("cpu"), "interpolation": "bilinear"}
loader = create_loader(Images(train.image_path.tolist(), train.label.map(numbers).tolist()), is_training=True,
                       scale=(0.8, 1.0), ratio=(0.9, 1.1), hflip=0.0, color_jitter=None,
                       auto_augment="rand-m5-n1-inc1", **common)
test_loader = create_loader(Images(test.image_path.tolist(), [0] * len(test)), crop_pct=1.0, **common)
model = timm.create_model("resnet18", in_chans=1, num_classes=len(classes))
model.conv1 = torch.nn.Conv2d(1, 64, 3, padding=1, bias=False)  # the stem for small images
model = model.to(memory_format=torch.channels_last)
mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=0.0, label_smoothing=0.1, num_classes=len(classes))
optimizer, loss_function = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05), SoftTargetCrossEntropy()


def step(images, targets):
    images, targets = mixup(images[: len(images) // 2 * 2], targets[: len(targets) // 2 * 2])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(images.contiguous(memory_format=torch.channels_last))
    loss = loss_function(logits.float(), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


model.train()
batches, begun = iter(loader), time.monotonic()
for _ in range(20):
    step(*next(batches))
each = (time.monotonic() - begun) / 20
left = seconds - (time.monotonic() - started) - len(test_loader) * each / 2 - 10
steps, done, begun = int(left / each), 0, time.monotonic()
scheduler = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 10, warmup_lr_init=1e-5, t_in_epochs=False)
while done < steps and time.monotonic() - begun < left:
    for images, targets in loader:
        scheduler.step_update(done)
        step(images, targets)
        done += 1
        if done >= steps or time.monotonic() - begun >= left:
            break
print(f"{128 * done / (time.monotonic() - begun):.0f} images/s")

model.eval()
with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
    found = torch.cat([model(images).argmax(1) for images, _ in test_loader])
pd.DataFrame({"label": [classes[number] for number in found]}).to_csv(answers, index=False)
