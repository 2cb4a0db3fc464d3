"""Small imitations of public data sets and competitions: their headers, names and folders, with drawn characters.

Each maker writes the files of one of them, as they are once unpacked, and returns what a reader has to find in them.
"""

import gzip
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

DIGITS = "0123456789"
Picture = tuple[str, np.ndarray]  # label and grey levels [H, W], the right way up


@dataclass(frozen=True)
class Truth:
    """What is in the tables: training rows in their order or by path in a folder; test rows by id, as submitted."""

    train: list[Picture] | dict[str, Picture]
    test: dict[str, Picture] = field(default_factory=dict)


class Pen:
    """Draws characters in varying places and angles. Classes alternate in a random order."""

    def __init__(self, seed: int, train: int, test: int):
        self.random, self.train, self.test = np.random.default_rng(seed), train, test

    def draw(self, text: str, height: int = 28, width: int = 0, dark: bool = False) -> np.ndarray:
        """Return a character, white on black or dark on white, uint8 [height, width]."""
        width = width or height
        scale = min(width, height) / 28
        image = Image.new("L", (width, height))
        x, y = (side / 2 + self.random.uniform(-2, 2) * scale for side in (width, height))
        ImageDraw.Draw(image).text((x, y), text, fill=255, font=ImageFont.load_default(size=20 * scale), anchor="mm")
        grey = np.asarray(image.rotate(self.random.uniform(-10, 10), Image.Resampling.BILINEAR))
        return 255 - grey if dark else grey

    def batch(self, count: int, names: list[str], texts: str = DIGITS, **options) -> list[Picture]:
        """Return so many pictures of the classes `names`, which are drawn as `texts`."""
        numbers = self.random.permutation(np.arange(count) % len(names))
        return [(names[number], self.draw(texts[number], **options)) for number in numbers]

    def both(self, names: list[str] | str = DIGITS, texts: str = DIGITS, **options) -> list[list[Picture]]:
        """Return training and test pictures."""
        return [self.batch(count, list(names), texts, **options) for count in (self.train, self.test)]

    def codes(self, count: int, length: int = 8) -> list[str]:
        """Return so many different hexadecimal names."""
        return [f"{number:0{length}x}" for number in self.random.choice(16**length - 1, count, replace=False)]


def stack(pictures: list[Picture]) -> np.ndarray:
    return np.stack([image for _, image in pictures])


def labels(pictures: list[Picture]) -> list[str]:
    return [label for label, _ in pictures]


def numbered(pictures: list[Picture], first: int = 1) -> dict[str, Picture]:
    return {str(number): picture for number, picture in enumerate(pictures, first)}


def save(path: Path, image: np.ndarray, colour: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 95} if path.suffix == ".jpg" else {}
    Image.fromarray(np.stack([image] * 3, -1) if colour else image).save(path, **options)


def save_all(folder: Path, pictures: dict[str, Picture], colour: bool = False) -> dict[str, Picture]:
    """Write pictures by their path below a folder, and return them."""
    for path, (_, image) in pictures.items():
        save(folder / path, image, colour)
    return pictures


def write_csv(path: Path, columns: dict, header: bool = True) -> None:
    pd.DataFrame(columns).to_csv(path, index=False, header=header)


def write_pixels(path: Path, pictures: list[Picture], names: list[str] | None = None, label: str = "label",
                 label_last: bool = False, levels: Callable = lambda images: images) -> None:
    """Write a row of pixels per picture, with a header if it has `names`, and the label unless that is empty."""
    table = pd.DataFrame(levels(stack(pictures)).reshape(len(pictures), -1), columns=names)
    if label:
        table.insert(table.shape[1] if label_last else 0, label, labels(pictures))
    table.to_csv(path, index=False, header=names is not None)


# ---- Tables of pixels ------------------------------------------------------------------------------------------------

def az_handwritten(folder: Path, pen: Pen) -> Truth:
    """Kaggle's A-Z letters: no header, the label first, sorted by it."""
    train = sorted(pen.batch(pen.train, list(DIGITS), "ABCDEFGHIJ"), key=lambda picture: picture[0])
    write_pixels(folder / "A_Z Handwritten Data.csv", train)
    return Truth(train)


def devanagari(folder: Path, pen: Pen) -> Truth:
    """UCI's Devanagari characters on Kaggle: zero-padded names, the character last, as text."""
    names = ["character_01_ka", "character_02_kha", "character_10_yna", "character_36_gya", "digit_0", "digit_9"]
    train = pen.batch(pen.train, names, "ABCDEF", height=32)
    write_pixels(folder / "data.csv", train, [f"pixel_{place:04d}" for place in range(1024)], "character", True)
    return Truth(train)


def optdigits(folder: Path, pen: Pen) -> Truth:
    """UCI's optical digits: no header, 8 x 8 levels from 0 to 16, the label last, in the test file too."""
    train, test = pen.both(height=16)
    blocks = [[(label, image.reshape(8, 2, 8, 2).mean(axis=(1, 3)) / 255 * 16) for label, image in pictures]
              for pictures in (train, test)]
    train, test = ([(label, image.round().astype(int)) for label, image in pictures] for pictures in blocks)
    for name, pictures in (("optdigits.tra", train), ("optdigits.tes", test)):
        write_pixels(folder / name, pictures, label_last=True)
    (folder / "optdigits.names").write_text("1. Title of Database: Optical Recognition of Handwritten Digits\n")
    return Truth(train, numbered(test))


def fashion_mnist(folder: Path, pen: Pen) -> Truth:
    """Kaggle's Fashion-MNIST: pixel1 to pixel784, labels in the test table too."""
    train, test = pen.both()
    for name, pictures in (("train", train), ("test", test)):
        write_pixels(folder / f"fashion-mnist_{name}.csv", pictures, [f"pixel{place}" for place in range(1, 785)])
    return Truth(train, numbered(test))


def usps(folder: Path, pen: Pen) -> Truth:
    """USPS as OpenML names its columns: 16 x 16 fractions from 0 to 1."""
    train, test = pen.both(height=16)
    for name, pictures in (("train", train), ("test", test)):
        write_pixels(folder / f"usps_{name}.csv", pictures, [f"double{place}" for place in range(1, 257)], "int0",
                     levels=lambda images: (images / 255).round(4))
    return Truth(train, numbered(test))


def arabic_letters(folder: Path, pen: Pen) -> Truth:
    """Kaggle's Arabic letters (AHCD): no headers, the labels in tables of their own, the pictures on their side."""
    train, test = pen.both(height=32)
    for part, size, pictures in (("Train", 13440, train), ("Test", 3360, test)):
        write_pixels(folder / f"csv{part}Images {size}x1024.csv", pictures, None, "",
                     levels=lambda images: images.swapaxes(1, 2))
        write_csv(folder / f"csv{part}Label {size}x1.csv", {"label": labels(pictures)}, header=False)
    return Truth(train, numbered(test))


# ---- Packed files ----------------------------------------------------------------------------------------------------

def medmnist(folder: Path, pen: Pen) -> Truth:
    """MedMNIST: all parts in one file, labels of shape [N, 1]."""
    train, test = pen.both()
    parts = {"train": train, "val": pen.batch(5, list(DIGITS)), "test": test}
    np.savez_compressed(folder / "organamnist.npz", **{
        f"{part}_{kind}": array for part, pictures in parts.items() for kind, array in (
            ("images", stack(pictures)), ("labels", np.array(labels(pictures), np.uint8)[:, None]))})
    return Truth(train, numbered(test))


def keras_mnist(folder: Path, pen: Pen) -> Truth:
    """Keras's mnist.npz: x_train, y_train, x_test, y_test."""
    train, test = pen.both()
    np.savez(folder / "mnist.npz", x_test=stack(test), x_train=stack(train),
             y_train=np.array(labels(train), np.uint8), y_test=np.array(labels(test), np.uint8))
    return Truth(train, numbered(test))


def sign_language_digits(folder: Path, pen: Pen) -> Truth:
    """Kaggle's Sign Language Digits: X.npy of fractions, Y.npy of rows with a single 1."""
    train = pen.batch(pen.train, list(DIGITS), height=64)
    np.save(folder / "X.npy", (stack(train) / 255).astype(np.float32))
    np.save(folder / "Y.npy", np.eye(10)[np.array(labels(train), int)])
    return Truth(train)


def emnist_idx(folder: Path, pen: Pen) -> Truth:
    """NIST's EMNIST letters: IDX files of pictures on their side, labels from 1, a mapping beside."""
    train, test = pen.both([str(number) for number in range(1, 11)], "ABCDEFGHIJ")
    for part, pictures in (("train", train), ("test", test)):
        arrays = {"images-idx3": stack(pictures).swapaxes(1, 2), "labels-idx1": np.array(labels(pictures), np.uint8)}
        for kind, array in arrays.items():
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            with gzip.open(folder / f"emnist-letters-{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())
    (folder / "emnist-letters-mapping.txt").write_text("1 65 97\n2 66 98\n")
    return Truth(train, numbered(test))


def cifar100_parquet(folder: Path, pen: Pen) -> Truth:
    """CIFAR-100 of the Hugging Face hub: img, and two columns that could be the label."""
    train, test = pen.both(height=32)
    for part, pictures in (("train", train), ("test", test)):
        rows = []
        for label, image in pictures:
            stream = io.BytesIO()
            Image.fromarray(np.stack([image] * 3, -1)).save(stream, "PNG")
            rows.append(({"bytes": stream.getvalue(), "path": None}, int(label), int(label) // 5))
        table = pd.DataFrame(rows, columns=["img", "fine_label", "coarse_label"])
        (folder / "cifar100").mkdir(exist_ok=True)
        table.to_parquet(folder / "cifar100" / f"{part}-00000-of-00001.parquet")
    return Truth(train, numbered(test))


# ---- Tables of image files -------------------------------------------------------------------------------------------

def gtsrb(folder: Path, pen: Pen) -> Truth:
    """Kaggle's German traffic signs: numbers beside class and path, a folder per class, images of many sizes."""
    train = [(str(row % 10), pen.draw(DIGITS[row % 10], 30 + row % 9, 29 + row % 7)) for row in range(pen.train)]
    test = pen.batch(pen.test, list(DIGITS), height=36)
    paths = [f"Train/{label}/000{int(label):02d}_{row:05d}_00000.png" for row, (label, _) in enumerate(train)]
    others = [f"Test/{row:05d}.png" for row in range(pen.test)]
    for name, files, pictures in (("Train", paths, train), ("Test", others, test)):
        save_all(folder, dict(zip(files, pictures)), colour=True)
        heights, widths = zip(*(image.shape for _, image in pictures))
        write_csv(folder / f"{name}.csv", {
            "Width": widths, "Height": heights, "Roi.X1": 5, "Roi.Y1": 5, "Roi.X2": np.array(widths) - 5,
            "Roi.Y2": np.array(heights) - 5, "ClassId": labels(pictures), "Path": files})
    write_csv(folder / "Meta.csv", {"Path": ["Meta/27.png"], "ClassId": 27, "ShapeId": 0})
    return Truth(train, dict(zip(others, test)))


def english_characters(folder: Path, pen: Pen) -> Truth:
    """Kaggle's English handwritten characters: images wider than high, digits and letters as labels."""
    train = sorted(pen.batch(pen.train, list("0189ABYZaz"), "0189ABYZaz", height=45, width=60, dark=True),
                   key=lambda picture: picture[0])
    paths = [f"Img/img{'0189ABYZaz'.index(label) + 1:03d}-{row:03d}.png" for row, (label, _) in enumerate(train)]
    save_all(folder, dict(zip(paths, train)), colour=True)
    write_csv(folder / "english.csv", {"image": paths, "label": labels(train)})
    return Truth(train)


BREEDS = ["affenpinscher", "afghan_hound", "airedale", "akita", "basenji", "basset", "beagle", "borzoi", "boxer",
          "briard", "cairn", "chow", "collie", "dingo", "pug", "whippet"]  # as many as the pixels of a square


def dog_breeds(folder: Path, pen: Pen) -> Truth:
    """Kaggle's dog breeds: names without extension, and a submission of probabilities, one column for each breed."""
    train, test = pen.both(BREEDS, "0123456789ABCDEF", height=40)
    ids, others = pen.codes(pen.train), pen.codes(pen.test)
    save_all(folder / "train", {f"{name}.jpg": picture for name, picture in zip(ids, train)}, colour=True)
    save_all(folder / "test", {f"{name}.jpg": picture for name, picture in zip(others, test)}, colour=True)
    write_csv(folder / "labels.csv", {"id": ids, "breed": labels(train)})
    write_csv(folder / "sample_submission.csv", {"id": others, **dict.fromkeys(BREEDS, 1 / len(BREEDS))})
    return Truth(train, dict(zip(others, test)))


def leaf_masks(folder: Path, pen: Pen) -> Truth:
    """Masks: 8-bit images whose levels are 0 and 1, ids without extension."""
    train, test = ([(label, (image > 100).astype(np.uint8)) for label, image in pictures] for pictures in pen.both())
    ids, others = ([f"{start + row}" for row in range(count)] for start, count in ((1, pen.train), (5000, pen.test)))
    save_all(folder / "masks", {f"{name}.png": picture for name, picture in zip(ids + others, train + test)})
    write_csv(folder / "train.csv", {"image_id": ids, "species": labels(train)})
    write_csv(folder / "test.csv", {"image_id": others})
    write_csv(folder / "sample_submission.csv", {"image_id": others, "species": "0"})
    return Truth(train, dict(zip(others, test)))


def kaggle_input(folder: Path, pen: Pen) -> Truth:
    """A table that was written in a notebook: its paths are those of another machine."""
    train = pen.batch(pen.train, list(DIGITS))
    save_all(folder / "train_images", {f"{row}.png": picture for row, picture in enumerate(train)})
    paths = [f"/kaggle/input/some-digits/train_images/{row}.png" for row in range(pen.train)]
    write_csv(folder / "train.csv", {"filepath": paths, "label": labels(train)})
    return Truth(train)


# ---- Folders ---------------------------------------------------------------------------------------------------------

def dogs_vs_cats(folder: Path, pen: Pen) -> Truth:
    """Kaggle's dogs and cats: the label in the file's name, numbers as ids, test1 without a table."""
    train, test = pen.both(["cat", "dog"], "AB", height=40)
    train = {f"{label}.{row}.jpg": (label, image) for row, (label, image) in enumerate(train)}
    save_all(folder / "train", train, colour=True)
    save_all(folder / "test1", {f"{name}.jpg": picture for name, picture in numbered(test).items()}, colour=True)
    write_csv(folder / "sampleSubmission.csv", {"id": range(1, pen.test + 1), "label": 0})
    return Truth(train, numbered(test))


def state_farm(folder: Path, pen: Pen) -> Truth:
    """Kaggle's distracted drivers: class folders, and the sample submission, one column per class, lists the tests."""
    classes = [f"c{number}" for number in range(10)]
    train, test = pen.both(classes, height=48, width=64)
    train = {f"{label}/img_{7 * row}.jpg": (label, image) for row, (label, image) in enumerate(train)}
    test = {f"img_{7 * row + 1}.jpg": picture for row, picture in enumerate(test)}
    save_all(folder / "imgs" / "train", train, colour=True)
    save_all(folder / "imgs" / "test", test, colour=True)
    write_csv(folder / "driver_imgs_list.csv", {
        "subject": [f"p{row % 3:03d}" for row in range(len(train))], "classname": labels(train.values()),
        "img": [path.split("/")[1] for path in train]})
    write_csv(folder / "sample_submission.csv", {"img": list(test), **dict.fromkeys(classes, 0.1)})
    return Truth(train, test)


def intel_scenes(folder: Path, pen: Pen) -> Truth:
    """Kaggle's Intel scenes: folders within folders of the same name, and images to predict."""
    train, test = pen.both(["buildings", "forest", "glacier", "mountain", "sea", "street"], "ABCDEF", height=50)
    train = {f"{label}/{row}.jpg": (label, image) for row, (label, image) in enumerate(train)}
    test = {f"{3 * row}.jpg": picture for row, picture in enumerate(test)}
    save_all(folder / "seg_train" / "seg_train", train, colour=True)
    save_all(folder / "seg_test" / "seg_test" / "sea", {"20.jpg": train[min(train)]}, colour=True)
    save_all(folder / "seg_pred" / "seg_pred", test, colour=True)
    return Truth(train, {name: test[name] for name in sorted(test)})


def chest_xray(folder: Path, pen: Pen) -> Truth:
    """X-rays as 16-bit files of 12 bits, in class folders that a Mac packed."""
    train, test = ([(label, image.astype(np.uint16) * 16 + pen.random.integers(0, 16, image.shape, np.uint16))
                    for label, image in pictures] for pictures in pen.both(["NORMAL", "PNEUMONIA"], "AB", height=40))
    parts = [{f"{label}/IM-{row:04d}-0001.png": (label, image) for row, (label, image) in enumerate(pictures)}
             for pictures in (train, test)]
    for part, pictures in zip(("train", "test"), parts):
        own = folder / "chest_xray" / part
        save_all(own, pictures)
        (own / "NORMAL" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (own / "__MACOSX").mkdir()
        (own / "__MACOSX" / "._IM-0000-0001.png").write_bytes(b"\0\5\26\7")
    tests = {path.split("/")[1]: parts[1][path] for path in sorted(parts[1])}
    return Truth(parts[0], tests)


def chinese_mnist(folder: Path, pen: Pen) -> Truth:
    """Kaggle's Chinese MNIST: suite, sample and code in the file's name; a table that does not name the files."""
    train = {f"input_{row % 7}_{row}_{int(label) + 1}.jpg": (str(int(label) + 1), image)
             for row, (label, image) in enumerate(pen.batch(pen.train, list(DIGITS), height=64))}
    save_all(folder / "data" / "data", train)
    write_csv(folder / "chinese_mnist.csv", {"suite_id": 1, "sample_id": 1, "code": [10], "value": 9,
                                             "character": "九"})
    return Truth(train)


@dataclass(frozen=True)
class Format:
    """A data set: who writes it, the flags that a user has to give, and the header of the submission ("": none)."""

    make: Callable[[Path, Pen], Truth]
    flags: str
    header: str = ""


FORMATS = {
    "az-handwritten": Format(az_handwritten, "--train-csv 'A_Z Handwritten Data.csv' --test-csv none"),
    "devanagari": Format(devanagari, "--train-csv data.csv --test-csv none"),
    "optdigits": Format(optdigits, "--train-csv optdigits.tra --test-csv optdigits.tes", "ImageId,Label"),
    "fashion-mnist": Format(fashion_mnist, "--train-csv fashion-mnist_train.csv --test-csv fashion-mnist_test.csv",
                            "ImageId,Label"),
    "usps": Format(usps, "--train-csv usps_train.csv --test-csv usps_test.csv", "ImageId,Label"),
    "medmnist": Format(medmnist, "--train-csv organamnist.npz --test-csv organamnist.npz", "ImageId,Label"),
    "keras-mnist": Format(keras_mnist, "--train-csv mnist.npz --test-csv mnist.npz", "ImageId,Label"),
    "sign-language-digits": Format(sign_language_digits, "--train-csv X.npy --test-csv none"),
    "emnist-idx": Format(emnist_idx, "--train-csv emnist-letters-train-images-idx3-ubyte.gz --transpose "
                         "--test-csv emnist-letters-test-images-idx3-ubyte.gz", "ImageId,Label"),
    "cifar100-parquet": Format(cifar100_parquet, "--train-csv cifar100/train-00000-of-00001.parquet --label-column "
                               "fine_label --test-csv cifar100/test-00000-of-00001.parquet", "ImageId,Label"),
    "gtsrb": Format(gtsrb, "--train-csv Train.csv --test-csv Test.csv --id-column Path --label-column ClassId",
                    "Path,ClassId"),
    "english-characters": Format(english_characters, "--train-csv english.csv --test-csv none"),
    "dog-breeds": Format(dog_breeds, "--train-csv labels.csv --root-dir train --test-csv test",
                         ",".join(["id", *BREEDS])),
    "dog-breeds-by-sample": Format(dog_breeds, "--train-csv labels.csv --root-dir train --test-csv "
                                   "sample_submission.csv --test-root test", ",".join(["id", *BREEDS])),
    "leaf-masks": Format(leaf_masks, "--root-dir masks", "image_id,species"),
    "dogs-vs-cats": Format(dogs_vs_cats, "--train-csv train --label-pattern '(cat|dog)[.]' --test-csv test1",
                           "id,label"),
    "state-farm": Format(state_farm, "--train-csv imgs/train --test-csv sample_submission.csv --test-root imgs/test",
                         "img,c0,c1,c2,c3,c4,c5,c6,c7,c8,c9"),
    "intel-scenes": Format(intel_scenes, "--train-csv seg_train/seg_train --test-csv seg_pred/seg_pred",
                           "example_id,label"),
    "chest-xray": Format(chest_xray, "--train-csv chest_xray/train --test-csv chest_xray/test", "example_id,label"),
    "chinese-mnist": Format(chinese_mnist, "--train-csv data --label-pattern '_([0-9]+)[.]jpg' --test-csv none"),
}


def write(folder: Path, name: str, train: int = 300, test: int = 60) -> Truth:
    """Write a data set with so many training and test rows, and return what is in it."""
    folder.mkdir(parents=True)
    return FORMATS[name].make(folder, Pen(sum(map(ord, name)), train, test))
