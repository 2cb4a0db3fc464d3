"""fastai: vision_learner, aug_transforms and fit_one_cycle. Arguments: folder, minutes, answers."""

import sys
import time
from pathlib import Path

import pandas as pd
import torch
from fastai.vision.all import (
    CategoryBlock,
    ColReader,
    DataBlock,
    ImageBlock,
    LabelSmoothingCrossEntropy,
    PILImageBW,
    RandomSplitter,
    accuracy,
    aug_transforms,
    resnet18,
    vision_learner,
)

started = time.monotonic()
folder, seconds, answers = Path(sys.argv[1]), 60 * float(sys.argv[2]), sys.argv[3]
train, test = pd.read_csv(folder / "train.csv", dtype=str), pd.read_csv(folder / "test.csv", dtype=str)
classes = CategoryBlock(vocab=sorted(train.label.unique()))
block = DataBlock((ImageBlock(PILImageBW), classes), get_x=ColReader("image_path", f"{folder}/Dataset_Image/"),
                  get_y=ColReader("label"), splitter=RandomSplitter(0.01, seed=0),
                  batch_tfms=aug_transforms(do_flip=False, max_lighting=0, max_rotate=10, max_zoom=1.1, size=32))
data = block.dataloaders(train, bs=128, num_workers=2, path=folder)
learner = vision_learner(data, resnet18, pretrained=False, n_in=1, metrics=accuracy, normalize=False,
                         loss_func=LabelSmoothingCrossEntropy())
learner.model[0][0] = torch.nn.Conv2d(1, 64, 3, padding=1, bias=False)  # the stem for small images

rows = data.train.n
data.train.n = min(rows, 40 * 128)
with learner.no_bar(), learner.no_logging():
    learner.fit_one_cycle(1, 1e-4)  # how long a step takes
    begun = time.monotonic()
    learner.fit_one_cycle(1, 1e-4)
each = (time.monotonic() - begun) / data.train.n
left = seconds - (time.monotonic() - started) - len(test) * each / 2 - 10
images = int(0.97 * left / each)
epochs = max(1, round(images / rows))
data.train.n = min(rows, images // epochs)
begun = time.monotonic()
with learner.no_bar():
    learner.fit_one_cycle(epochs, 3e-3)
print(f"{data.train.n * epochs / (time.monotonic() - begun):.0f} images/s")

with learner.no_bar():
    probabilities, _ = learner.get_preds(dl=data.test_dl(test))
pd.DataFrame({"label": [data.vocab[number] for number in probabilities.argmax(1)]}).to_csv(answers, index=False)
