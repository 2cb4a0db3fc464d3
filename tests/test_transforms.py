"""pipeline/transforms.py, by way of script.augment and script.to_input: augmentation by batch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from pipeline.transforms import ERASING_SIZE, BatchRandom, change_ink, erase, soften_edges
from script import Config, augment, to_input

NONE = Config(image_size=32, rotation=0, scale=0, shear=0, stretch=0, shift=0, perspective=0, elastic=0,
              recenter_warp=False, brightness=0, contrast=0, erasing=0, edge_softening=0)
STRONG = Config(image_size=48, rotation=25, scale=0.3, shear=0.3, stretch=0.3, shift=0.2, perspective=0.3, elastic=0.2,
                recenter_warp=True, brightness=0.5, contrast=0.8, erasing=0.9)


def change(config: Config = NONE, **settings) -> Config:
    return dataclasses.replace(config, **settings)


def make_random(seed: int = 0) -> BatchRandom:
    return BatchRandom(seed, torch.device("cpu"))


def make_images(count: int = 16) -> torch.Tensor:
    """Return images with a rectangle of ink left of and above the centre."""
    images = torch.zeros(count, 1, 32, 32, dtype=torch.uint8)
    images[:, :, 4:14, 6:12] = 255
    return images


def centre(ink: torch.Tensor) -> torch.Tensor:
    """Return the mean x and y of each image's ink, in -1..1."""
    line = (torch.arange(ink.shape[-1]) * 2 + 1) / ink.shape[-1] - 1
    mass = ink.sum(dim=(1, 2, 3))
    moments = [(ink * place).sum(dim=(1, 2, 3)) for place in (line, line[:, None])]
    return torch.stack(moments, dim=1) / mass[:, None]


def bounding_boxes(ink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return centre [B, 2] (x, y) and longer side [B] of what is at least half inked, as shares of the image's side."""
    ends = []
    for across in (2, 3):
        line = (ink[:, 0] > 0.5).any(dim=across - 1)
        places = (torch.arange(line.shape[1]) + 0.5) / line.shape[1]
        ends.append([places.where(line, 9.0).amin(dim=1), places.where(line, -9.0).amax(dim=1)])
    middle = torch.stack([(low + high) / 2 for low, high in ends], dim=1)
    return middle, torch.stack([high - low for low, high in ends], dim=1).amax(dim=1)


# ---- All of it ------------------------------------------------------------------------------------------------------

def test_a_blank_image_stays_blank():
    assert augment(torch.zeros(64, 1, 32, 32, dtype=torch.uint8), STRONG, seed=0).abs().max() == 0


def test_without_changes_an_image_stays_the_same():
    images = torch.randint(0, 256, (8, 1, 32, 32), dtype=torch.uint8, generator=make_random().generator)
    assert torch.allclose(augment(images, NONE, seed=0), to_input(images, NONE), atol=1e-5)
    large = change(image_size=48)
    larger = augment(make_images(), large, seed=0)
    assert larger.shape == (16, 1, 48, 48) and torch.allclose(larger, to_input(make_images(), large), atol=1e-4)


@pytest.mark.parametrize("name", ["rotation", "scale", "shear", "stretch", "shift", "perspective", "elastic",
                                  "brightness", "erasing"])
def test_each_image_has_its_own_draw(name):
    images = torch.full_like(make_images(), 255) if name == "erasing" else make_images()  # a hole shows in ink only
    augmented = augment(images, change(**{name: getattr(STRONG, name)}), seed=0)
    distinct = {tuple(image.flatten().tolist()) for image in augmented}
    assert len(distinct) >= (12 if name == "erasing" else 16)  # erasing spares one image in ten


def test_a_seed_gives_the_same_batch():
    assert torch.equal(augment(make_images(), STRONG, seed=3), augment(make_images(), STRONG, seed=3))
    assert not torch.equal(augment(make_images(), STRONG, seed=3), augment(make_images(), STRONG, seed=4))


def test_strong_augmentation_gives_ink_between_0_and_1():
    ink = augment(make_images(), STRONG, seed=0)
    assert ink.shape == (16, 1, 48, 48) and ink.isfinite().all() and ink.min() >= 0 and ink.max() <= 1 + 1e-6


def test_all_geometry_is_one_resampling(monkeypatch):
    """Each resampling would blur the image again."""
    calls, real = [], F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda *args, **options: calls.append(1) or real(*args, **options))
    augment(make_images(), STRONG, seed=0)
    assert calls == [1]


# ---- Warps ----------------------------------------------------------------------------------------------------------

def test_rotation_turns_by_up_to_its_degrees():
    before = centre(to_input(make_images(200), NONE))
    turned = centre(augment(make_images(200), change(rotation=20.0), seed=0))
    angles = torch.rad2deg(torch.atan2(turned[:, 1], turned[:, 0]) - torch.atan2(before[:, 1], before[:, 0]))
    assert angles.abs().max() < 20.5 and angles.min() < -17 and angles.max() > 17
    assert torch.allclose(turned.norm(dim=1), before.norm(dim=1), atol=0.02)


def test_scale_grows_and_shrinks_by_up_to_its_share():
    before = centre(to_input(make_images(200), NONE))
    grown = centre(augment(make_images(200), change(scale=0.2), seed=0)).norm(dim=1) / before.norm(dim=1)
    assert 0.79 < grown.min() < 0.83 and 1.17 < grown.max() < 1.21


def test_shift_is_a_share_of_the_side():
    moved = centre(augment(make_images(200), change(shift=0.1), seed=0)) - centre(to_input(make_images(200), NONE))
    assert 0.18 < moved.abs().max() < 0.205  # of a span of 2


def test_stretch_changes_the_width_against_the_height():
    ink = augment(make_images(200), change(image_size=96, stretch=0.3), seed=0)[:, 0] > 0.5
    wide, high = ink.any(dim=1).sum(dim=1), ink.any(dim=2).sum(dim=1)
    assert (high - 30).abs().max() <= 1 and wide.min() < 15 and wide.max() > 22  # of 30 by 18


def test_a_crop_is_scaled_up_in_a_share_of_the_images():
    images = torch.zeros(400, 1, 32, 32, dtype=torch.uint8)
    images[:, :, 12:20, 12:20] = 255
    mass = augment(images, change(crop=0.5, crop_size=0.5), seed=0).sum(dim=(1, 2, 3))
    whole = (mass - 64).abs() < 1e-3
    assert 0.4 < whole.float().mean() < 0.6
    assert 2.5 * 64 < mass.max() <= 4.1 * 64 and mass.min() > 0  # up to twice as long and as wide; never all outside


def test_pixels_from_outside_are_background():
    full = torch.full((64, 1, 32, 32), 255, dtype=torch.uint8)
    corners = augment(full, change(rotation=45.0, shift=0.3), seed=0)[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 0).any(dim=1).all() and corners.max() <= 1


@pytest.mark.parametrize(("elastic", "tolerance"), [(0.0, 0.025), (0.04, 0.05)])
def test_recenter_warp_keeps_centre_and_longer_side_of_the_ink(elastic, tolerance):
    config = change(image_size=96, rotation=30.0, shear=0.3, stretch=0.3, elastic=elastic)
    middle, side = bounding_boxes(to_input(make_images(200), change(image_size=96)))

    def deviations(recenter_warp: bool) -> tuple[float, float]:
        warped = bounding_boxes(augment(make_images(200), change(config, recenter_warp=recenter_warp), seed=0))
        return float((warped[0] - middle).abs().max()), float((warped[1] / side - 1).abs().max())

    moved, resized = deviations(recenter_warp=True)
    assert moved < tolerance and resized < 4 * tolerance
    moved, resized = deviations(recenter_warp=False)
    assert moved > 2 * tolerance and resized > 5 * tolerance


def test_recenter_warp_keeps_blank_images_and_single_pixels():
    images = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    images[1, 0, 20, 7] = 255
    warped = augment(images, change(STRONG, image_size=32, erasing=0.0), seed=0)
    assert warped[0].abs().max() == 0 and 0 < warped[1].sum() < 4


# ---- Ink ------------------------------------------------------------------------------------------------------------

def test_contrast_bends_greys_and_keeps_background_and_full_ink():
    greys = torch.tensor([0, 100, 255], dtype=torch.uint8).repeat(16, 1, 32, 11)[..., :32].contiguous()
    changed = augment(greys, change(contrast=0.8), seed=0)
    assert changed[..., 0].max() == 0 and changed[..., 2].min() > 0.999
    assert changed[:, 0, 5, 1].unique().numel() == 16


def test_contrast_keeps_the_order_of_greys():
    greys = torch.linspace(0, 1, 100).expand(200, 1, 1, 100)
    assert (change_ink(greys, 1.0, 0.0, make_random()).diff() > -1e-6).all()


def test_brightness_makes_ink_fainter_by_up_to_its_share():
    faint = change_ink(torch.ones(400, 1, 1, 1), 0.0, 0.5, make_random())
    assert 0.5 <= faint.min() < 0.52 and 0.98 < faint.max() <= 1


def test_erasing_hits_its_share_of_the_images():
    holes = (erase(torch.ones(400, 1, 32, 32), 0.25, make_random()) == 0).sum(dim=(1, 2, 3))
    assert 0.15 < (holes > 0).float().mean() < 0.32
    assert (ERASING_SIZE * 32 / 2) ** 2 < holes.max() <= (ERASING_SIZE * 32 + 1) ** 2
    small = erase(torch.ones(400, 1, 2, 2), 1.0, make_random()) == 0
    assert (small.sum(dim=(1, 2, 3)) >= 1).float().mean() > 0.99, "the smallest hole is a pixel"


# ---- Images that are not augmented ----------------------------------------------------------------------------------

def test_images_that_are_not_resampled_are_softened_alike():
    dot = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    dot[:, :, 10, 20] = 255
    warped = change(edge_softening=0.1, rotation=10)
    soft = to_input(dot, warped)
    assert torch.allclose(soft[0, 0, 10, 19:22], torch.tensor([0.08, 0.64, 0.08])) and soft[0].sum() == pytest.approx(1)
    assert to_input(dot * 0, warped).abs().max() == 0
    for hard in (change(warped, augment=False), change(edge_softening=0.1), change(warped, edge_softening=0.0)):
        assert torch.equal(to_input(dot, hard), dot / 255), "only what training warps is softened"


def test_softening_gives_each_neighbour_its_share():
    dot = torch.zeros(1, 1, 9, 9)
    dot[..., 4, 4] = 1
    assert torch.equal(soften_edges(dot, 0.0), dot)
    soft = soften_edges(dot, 0.25)[0, 0]
    for line in (soft.sum(dim=0), soft.sum(dim=1)):
        assert torch.allclose(line[3:6], torch.tensor([0.25, 0.5, 0.25])) and line.sum() == pytest.approx(1)


def test_images_are_resized_to_the_network():
    resized = to_input(make_images(), change(image_size=16))
    assert resized.shape == (16, 1, 16, 16)
    assert torch.equal(resized, F.interpolate(make_images() / 255, size=(16, 16), mode="bilinear"))
