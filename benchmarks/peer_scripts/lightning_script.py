"""Lightning with torchvision's network, transforms and OneCycleLR. Arguments: folder, minutes, answers, precision."""

import sys
import time
from pathlib import Path

import lightning
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision.transforms import v2

started = time.monotonic()
folder, seconds, answers = Path(sys.argv[1]), 60 * float(sys.argv[2]), sys.argv[3]
train, test = pd.read_csv(folder / "train.csv", dtype=str), pd.read_csv(folder / "test.csv", dtype=str)
classes = sorted(train.label.unique())
numbers = {label: number for number, label in enumerate(classes)}
to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,), (0.5,))]
augment = v2.Compose([v2.RandomAffine(10, (0.05, 0.05), (0.9, 1.1), 10, v2.InterpolationMode.BILINEAR, fill=255),
                      *to_tensor])


class Images(Dataset):
    def __init__(self, paths, targets, transform):
        self.paths, self.targets, self.transform = paths, targets, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        return self.transform(Image.open(folder / "Dataset_Image" / self.paths[row]).convert("L")), self.targets[row]


class Classifier(lightning.LightningModule):
    def __init__(self, steps):
        super().__init__()
        self.network, self.steps = models.resnet18(num_classes=len(classes)), steps
        self.network.conv1 = torch.nn.Conv2d(1, 64, 3, padding=1, bias=False)  # the stem for small images

    def training_step(self, batch, _):
        return F.cross_entropy(self.network(batch[0]), batch[1], label_smoothing=0.1)

    def predict_step(self, batch, _):
        return self.network(batch[0]).argmax(1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=self.steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer(steps):
    precision = "bf16-mixed" if sys.argv[4] == "bf16" else "32-true"
    return lightning.Trainer(accelerator="cpu", precision=precision, max_steps=steps, max_epochs=-1, logger=False,
                             enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


dataset = Images(train.image_path.tolist(), train.label.map(numbers).tolist(), augment)
loader = DataLoader(dataset, 128, shuffle=True, num_workers=2, drop_last=True)
test_loader = DataLoader(Images(test.image_path.tolist(), [0] * len(test), v2.Compose(to_tensor)), 128, num_workers=2)
trainer(5).fit(Classifier(5), loader)
begun = time.monotonic()
trainer(40).fit(Classifier(40), loader)
each = (time.monotonic() - begun) / 40
left = seconds - (time.monotonic() - started) - len(test_loader) * each / 2 - 10
steps, begun = max(int(0.97 * left / each), 1), time.monotonic()
model, last = Classifier(steps), trainer(steps)
last.fit(model, loader)
print(f"{128 * steps / (time.monotonic() - begun):.0f} images/s")
found = torch.cat(last.predict(model, test_loader))
pd.DataFrame({"label": [classes[number] for number in found]}).to_csv(answers, index=False)
