"""script.py: MathSymbolDataset, for any DataLoader and by batch."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.device import Runtime
from pipeline.errors import DataError
from pipeline.images import ImageStatistics
from pipeline.tables import Table, TableSource, open_table, read_test_table, read_train_table
from script import Config, MathSymbolDataset, augment, to_input

PLAIN = Config(image_size=12)


def make_table(rows: int = 12, classes: int = 3, seed: int = 0, labelled: bool = True) -> Table:
    """Return a table of random grey levels, white on black."""
    pixels = np.random.default_rng(seed).integers(1, 256, (rows, 12, 12), dtype=np.uint8)
    pixels[:, [0, -1]] = pixels[:, :, [0, -1]] = 0
    column = {"label": [str(row % classes) for row in range(rows)]} if labelled else {
        "example_id": [str(row) for row in range(rows)]}
    return Table("train.csv", pd.DataFrame(column, index=pd.RangeIndex(2, rows + 2)), pixels=pixels)


def make_dataset(config: Config = PLAIN, **options) -> MathSymbolDataset:
    rows = {name: options.pop(name) for name in ("rows", "classes", "seed", "labelled") if name in options}
    return MathSymbolDataset(make_table(**rows), config, **options)


def load_epoch(loader: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs and class numbers of an epoch."""
    inputs, classes = zip(*loader)
    return torch.cat(inputs), torch.cat(classes)


# ---- Items ----------------------------------------------------------------------------------------------------------

def test_an_item_is_ink_and_class_number():
    dataset = make_dataset()
    ink, target = dataset[4]
    original = torch.from_numpy(dataset.table.pixels[4]) / 255
    assert len(dataset) == 12 and ink.shape == (1, 12, 12) and ink.dtype == torch.float32
    assert ink.min() >= 0 and ink.max() <= 1
    assert torch.corrcoef(torch.stack([ink[0], original]).flatten(1))[0, 1] > 0.8, "softened, and the same"
    assert target == 1 and type(target) is int
    assert dataset.classes == ["0", "1", "2"] and dataset.targets.tolist() == [0, 1, 2] * 4


def test_rows_count_from_the_end_and_have_an_end():
    dataset = make_dataset()
    assert torch.equal(dataset[-1][0], dataset[11][0]) and dataset[-1][1] == 2
    for row in (12, -13):
        with pytest.raises(IndexError):
            dataset[row]
    assert len(list(dataset)) == 12, "iteration ends at the last row"


def test_statistics_and_size_are_measured_where_they_are_not_given():
    dataset = make_dataset(Config())
    assert dataset.statistics == ImageStatistics(0, 12) and dataset.config.image_size == 12
    inverted = dataclasses.replace(make_table(), pixels=255 - make_table().pixels)
    assert torch.equal(MathSymbolDataset(inverted, Config())[3][0], dataset[3][0])
    smaller = make_dataset(Config(image_size=8))
    assert smaller.statistics.size == 8 and smaller[0][0].shape == (1, 8, 8)
    assert make_dataset(Config(image_size=16))[0][0].shape == (1, 16, 16)


def test_given_classes_number_the_labels():
    dataset = MathSymbolDataset(make_table(), PLAIN, ["2", "9", "1", "0"])
    assert dataset.targets.tolist() == [3, 2, 0] * 4 and dataset[1][1] == 2


def test_rows_without_labels_have_class_number_0():
    dataset = make_dataset(labelled=False)
    assert dataset.classes == [] and dataset[5][1] == 0 and dataset.batch(np.arange(3))[1].tolist() == [0, 0, 0]


def test_a_competition_folder_is_read_as_the_docstring_says(competition, tmp_path):
    config = Config(cache_dir=str(tmp_path / "cache"))
    dataset = MathSymbolDataset(read_train_table(TableSource("train.csv", str(competition))), config, augmented=True)
    inputs, classes = load_epoch(DataLoader(dataset, batch_size=64, shuffle=True))
    assert inputs.shape == (100, 1, 32, 32) and classes.bincount().tolist() == [20] * 5
    assert dataset.classes == ["3", "17", "40", "101", "1400"] and dataset.statistics == ImageStatistics(255, 32)
    test = MathSymbolDataset(read_test_table(TableSource("test.csv", str(competition))), config, dataset.classes,
                             dataset.statistics)
    assert len(test) == 30 and test[0][0].shape == (1, 32, 32)


def test_bad_images_are_refused_or_left_blank(competition, tmp_path):
    table = open_table(TableSource("train.csv", str(competition)), "label")
    (competition / "Dataset_Image" / table.rows.image_path.iloc[3]).write_bytes(b"no image")
    config = Config(cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"train.csv, row 5: .*: not an image that Pillow can read"):
        MathSymbolDataset(table, config)
    table = open_table(TableSource("train.csv", str(competition)), "label")
    dataset = MathSymbolDataset(table, dataclasses.replace(config, on_bad_image="skip"))
    assert dataset[3][0].abs().max() == 0 and table.bad_rows.tolist() == [3]


# ---- In a DataLoader ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_every_row_with_its_label(num_workers):
    dataset = make_dataset()
    inputs, classes = load_epoch(DataLoader(dataset, batch_size=5, num_workers=num_workers))
    assert torch.equal(inputs, torch.stack([ink for ink, _ in dataset]))
    assert classes.dtype == torch.int64 and classes.tolist() == dataset.targets.tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmented_items_differ_between_epochs_and_repeat_with_a_seed(num_workers):
    loader = DataLoader(make_dataset(augmented=True), batch_size=5, num_workers=num_workers)

    def load_two_epochs(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [load_epoch(loader)[0] for _ in range(2)]

    first, second = load_two_epochs(1)
    assert all(not torch.equal(*pair) for pair in zip(first, second)), "each image is drawn anew"
    assert all(torch.equal(*pair) for pair in zip([first, second], load_two_epochs(1)))
    assert not torch.equal(first, load_two_epochs(2)[0])


def test_workers_draw_differently():
    """The same image in every row: equal items would mean that workers, or items, share their draws."""
    table = make_table()
    table.pixels[:] = table.pixels[0]
    loader = DataLoader(MathSymbolDataset(table, PLAIN, augmented=True), batch_size=3, num_workers=2)
    inputs, _ = load_epoch(loader)
    assert len({image.numpy().tobytes() for image in inputs}) == 12


def test_without_augment_an_augmented_dataset_is_plain():
    config = dataclasses.replace(PLAIN, augment=False)
    assert torch.equal(make_dataset(config, augmented=True)[2][0], make_dataset(config)[2][0])


# ---- Batches --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{}, {"image_size": 16}, {"augment": False}, {"edge_softening": 0.0}])
def test_a_plain_batch_is_the_stacked_items(settings):
    dataset, rows = make_dataset(dataclasses.replace(PLAIN, **settings)), np.array([7, 0, 7, 11])
    inputs, classes, weights = dataset.batch(rows)
    assert torch.allclose(inputs, torch.stack([dataset[row][0] for row in rows]), atol=1e-6)
    assert classes.tolist() == [dataset[row][1] for row in rows] and classes.dtype == torch.int64 and weights is None


def test_a_batch_with_a_seed_is_augmented():
    dataset, rows = make_dataset(), np.array([7, 0, 7, 11])
    inputs, classes, _ = dataset.batch(rows, seed=3)
    assert torch.equal(inputs, augment(dataset.images[rows], dataset.config, 3))
    assert torch.equal(inputs, dataset.batch(rows, seed=3)[0]) and classes.tolist() == dataset.targets[rows].tolist()
    assert not torch.equal(inputs, dataset.batch(rows, seed=4)[0])
    assert not torch.equal(inputs[0], inputs[2]), "two views of one image"


def test_ink_is_the_stored_images():
    dataset, rows = make_dataset(), np.array([5, 2])
    assert np.array_equal(dataset.ink(rows), dataset.table.pixels[rows]) and dataset.ink(rows).dtype == np.uint8


def test_for_network_shows_the_same_images_as_another_network_wants_them():
    dataset = make_dataset()
    other = dataset.for_network(dataclasses.replace(PLAIN, image_size=20, augment=False))
    assert other.batch(np.arange(4))[0].shape == (4, 1, 20, 20) and other[0][0].shape == (1, 20, 20)
    assert other.images.data_ptr() == dataset.images.data_ptr(), "images are shared"
    assert torch.equal(other[0][0], to_input(dataset.images[:1], other.config)[0])
    assert dataset[0][0].shape == (1, 12, 12), "the dataset itself is unchanged"


# ---- Rows of another table ------------------------------------------------------------------------------------------

def test_appended_rows_follow_with_their_weight():
    dataset, extra = make_dataset(), make_dataset(rows=4, seed=1)
    images = torch.cat([dataset.images, extra.images])
    dataset.append(extra, 0.5)
    assert len(dataset) == 16 and torch.equal(dataset.images, images)
    assert dataset.targets.tolist() == [0, 1, 2] * 4 + [0, 1, 2, 0]
    inputs, classes, weights = dataset.batch(np.array([0, 13]))
    assert weights.tolist() == [1.0, 0.5] and classes.tolist() == [0, 1]
    assert torch.allclose(inputs[1], extra[1][0], atol=1e-6) and torch.equal(dataset[13][0], extra[1][0])
    assert len(extra) == 4


def test_appended_rows_of_weight_1_leave_the_loss_unweighted():
    dataset = make_dataset()
    dataset.append(make_dataset(rows=4, seed=1), 1.0)
    assert len(dataset) == 16 and dataset.batch(np.array([0, 13]))[2] is None


def test_a_dataset_stays_on_the_device_of_its_runtime():
    dataset = make_dataset(runtime=Runtime(precision="bf16"))
    inputs, classes, _ = dataset.batch(np.arange(3))
    assert inputs.device.type == classes.device.type == "cpu" and inputs.dtype == torch.float32 and not dataset.pinned
