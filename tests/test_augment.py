"""Room 4, second half: augmentation by batch."""

import dataclasses

import numpy as np
import pytest
import torch

import script
from script import Config, augment, to_input

STILL = Config(image_size=32, rotation=0, scale=0, shear=0, stretch=0, shift=0, perspective=0, elastic=0, refit=False,
               brightness=0, contrast=0, erasing=0, soften=0)
STRONG = Config(image_size=48, rotation=25, scale=0.3, shear=0.3, stretch=0.3, shift=0.2, perspective=0.3, elastic=0.2,
                refit=True, brightness=0.5, contrast=0.8, erasing=0.9, thickness=0.5)


def seeded(seed: int = 0) -> script.Draws:
    return script.Draws(seed, torch.device("cpu"))


def pages(count: int = 16) -> torch.Tensor:
    """A square of ink left of and above the middle."""
    images = torch.zeros(count, 1, 32, 32, dtype=torch.uint8)
    images[:, :, 4:14, 6:12] = 255
    return images


def centre(ink: torch.Tensor) -> torch.Tensor:
    """Mean x and y of each image's ink, in -1..1."""
    line = (torch.arange(ink.shape[-1]) * 2 + 1) / ink.shape[-1] - 1
    mass = ink.sum(dim=(1, 2, 3))
    moments = [(ink * place).sum(dim=(1, 2, 3)) for place in (line, line[:, None])]
    return torch.stack(moments, dim=1) / mass[:, None]


def test_a_crop_is_scaled_up_in_a_share_of_the_images():
    config = dataclasses.replace(STILL, crop=0.5, crop_size=0.5)
    images = torch.zeros(400, 1, 32, 32, dtype=torch.uint8)
    images[:, :, 12:20, 12:20] = 255
    mass = augment(images, config, seeded()).sum(dim=(1, 2, 3))
    kept = (mass - 64).abs() < 1e-3
    assert 0.4 < kept.float().mean() < 0.6
    assert 2.5 * 64 < mass.max() <= 4.1 * 64 and mass.min() > 0  # up to twice as long and as wide; never all outside


def test_a_blank_page_stays_blank():
    blank = torch.zeros(64, 1, 32, 32, dtype=torch.uint8)
    assert augment(blank, STRONG, seeded()).abs().max() == 0


def test_new_pixels_are_paper():
    full = torch.full((64, 1, 32, 32), 255, dtype=torch.uint8)
    config = dataclasses.replace(STILL, rotation=45.0, shift=0.3)
    corners = augment(full, config, seeded())[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 0).any(dim=1).all() and corners.max() <= 1


def test_no_change_is_the_identity():
    images = torch.randint(0, 256, (8, 1, 32, 32), dtype=torch.uint8, generator=seeded().generator)
    assert torch.allclose(augment(images, STILL, seeded()), to_input(images, STILL), atol=1e-5)
    large = dataclasses.replace(STILL, image_size=48)
    larger = augment(pages(), large, seeded())
    assert larger.shape == (16, 1, 48, 48) and torch.allclose(larger, to_input(pages(), large), atol=1e-4)


@pytest.mark.parametrize("name", ["rotation", "scale", "shear", "stretch", "shift", "perspective", "elastic",
                                  "brightness", "erasing", "thickness"])
def test_each_image_has_its_own_draw(name):
    config = dataclasses.replace(STILL, **{name: getattr(STRONG, name)})
    images = torch.full_like(pages(), 255) if name == "erasing" else pages()  # a hole shows in ink alone
    flat = {tuple(image.flatten().tolist()) for image in augment(images, config, seeded())}
    assert len(flat) >= (12 if name == "erasing" else 16)  # one image in ten is spared


def test_contrast_bends_greys_and_keeps_paper_and_full_ink():
    greys = torch.tensor([0, 100, 255], dtype=torch.uint8).repeat(16, 1, 32, 11)[..., :32].contiguous()
    changed = augment(greys, dataclasses.replace(STILL, contrast=0.8), seeded())
    assert changed[..., 0].max() == 0 and changed[..., 2].min() > 0.999
    assert changed[:, 0, 5, 1].unique().numel() == 16


def test_the_same_generator_gives_the_same_batch():
    assert torch.equal(augment(pages(), STRONG, seeded(3)), augment(pages(), STRONG, seeded(3)))
    assert not torch.equal(augment(pages(), STRONG, seeded(3)), augment(pages(), STRONG, seeded(4)))


def test_rotation_and_scale_do_what_they_say(monkeypatch):
    """The ink's centre turns by the drawn angle about the image's, and its distance grows by the drawn scale."""
    before = centre(to_input(pages(200), STILL))
    turned = centre(augment(pages(200), dataclasses.replace(STILL, rotation=20.0), seeded()))
    angles = torch.rad2deg(torch.atan2(turned[:, 1], turned[:, 0]) - torch.atan2(before[:, 1], before[:, 0]))
    assert angles.abs().max() < 20.5 and angles.min() < -17 and angles.max() > 17
    assert torch.allclose(turned.norm(dim=1), before.norm(dim=1), atol=0.02)
    scaled = centre(augment(pages(200), dataclasses.replace(STILL, scale=0.2), seeded()))
    grown = scaled.norm(dim=1) / before.norm(dim=1)
    assert 0.79 < grown.min() < 0.83 and 1.17 < grown.max() < 1.21


def test_shift_is_a_share_of_the_side():
    shifted = centre(augment(pages(200), dataclasses.replace(STILL, shift=0.1), seeded()))
    moved = shifted - centre(to_input(pages(200), STILL))
    assert 0.18 < moved.abs().max() < 0.205  # of a span of 2


def boxes(ink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Middle [B, 2] (x, y) and longer side [B] of what is at least half inked, as shares of the image's side."""
    ends = []
    for across in (2, 3):
        line = (ink[:, 0] > 0.5).any(dim=across - 1)
        places = (torch.arange(line.shape[1]) + 0.5) / line.shape[1]
        ends.append([places.where(line, 9.0).amin(dim=1), places.where(line, -9.0).amax(dim=1)])
    middle = torch.stack([(low + high) / 2 for low, high in ends], dim=1)
    return middle, torch.stack([high - low for low, high in ends], dim=1).amax(dim=1)


@pytest.mark.parametrize(("elastic", "reach"), [(0.0, 0.025), (0.04, 0.05)])
def test_refit_leaves_the_ink_in_its_place(elastic, reach):
    config = dataclasses.replace(STILL, image_size=96, rotation=30.0, shear=0.3, stretch=0.3, elastic=elastic)
    middle, side = boxes(to_input(pages(200), dataclasses.replace(STILL, image_size=96)))
    off = {}
    for refit in (True, False):
        warped = boxes(augment(pages(200), dataclasses.replace(config, refit=refit), seeded()))
        off[refit] = (warped[0] - middle).abs().max(), (warped[1] / side - 1).abs().max()
    assert off[True][0] < reach and off[True][1] < 4 * reach
    assert off[False][0] > 2 * reach and off[False][1] > 5 * reach


def test_refit_leaves_blank_pages_and_single_pixels_whole():
    images = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    images[1, 0, 20, 7] = 255
    warped = augment(images, dataclasses.replace(STRONG, image_size=32, erasing=0.0), seeded())
    assert warped[0].abs().max() == 0 and 0 < warped[1].sum() < 4


def test_stretch_changes_the_width_against_the_height():
    ink = augment(pages(200), dataclasses.replace(STILL, image_size=96, stretch=0.3), seeded())[:, 0] > 0.5
    wide, high = ink.any(dim=1).sum(dim=1), ink.any(dim=2).sum(dim=1)
    assert (high - 30).abs().max() <= 1 and wide.min() < 15 and wide.max() > 22  # of 30 by 18


def test_strokes_become_thicker_and_thinner():
    ink = torch.zeros(400, 1, 16, 16)
    ink[..., 6:9, :] = 1.0  # a beam of three pixels
    change = Config(thickness=0.5)
    amounts = script.change_strokes(ink, change, seeded())[..., 1:-1].sum(dim=(1, 2, 3)) / 14  # height of its middle
    assert amounts.min() == pytest.approx(2.0, abs=0.05) and amounts.max() == pytest.approx(4.0, abs=0.05)
    assert amounts.mean() == pytest.approx(3.0, abs=0.1)
    assert script.change_strokes(torch.zeros(4, 1, 8, 8), change, seeded()).sum() == 0
    block, edge = torch.zeros(2, 1, 9, 9).split(1)
    block[..., 3:6, 3:6], edge[..., :3, 3:6] = 1.0, 1.0
    assert script.thinner(block).sum() == script.thinner(edge).sum() == 1, "outside an image is paper"


def test_erasing_hits_its_share_of_the_images():
    full = torch.full((400, 1, 32, 32), 255, dtype=torch.uint8)
    config = dataclasses.replace(STILL, erasing=0.25, erasing_size=0.5)
    erased = augment(full, config, seeded()) == 0
    holes = erased.sum(dim=(1, 2, 3))
    assert 0.15 < (holes > 0).float().mean() < 0.32 and holes.max() <= 17 * 17
    small = augment(full, dataclasses.replace(STILL, erasing=1.0, erasing_size=0.02), seeded()) == 0
    assert (small.sum(dim=(1, 2, 3)) >= 1).float().mean() > 0.99, "the smallest hole is a pixel"


def test_what_is_not_resampled_is_softened_alike():
    dot = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    dot[:, :, 10, 20] = 255
    warped = dataclasses.replace(STILL, soften=0.1, rotation=10)
    soft = to_input(dot, warped)
    assert torch.allclose(soft[0, 0, 10, 19:22], torch.tensor([0.08, 0.64, 0.08])) and soft[0].sum() == pytest.approx(1)
    assert to_input(dot * 0, warped).abs().max() == 0
    for hard in (dataclasses.replace(warped, augment=False), dataclasses.replace(STILL, soften=0.1)):
        assert torch.equal(to_input(dot, hard), dot / 255), "what is not warped in training is not softened after it"


def test_all_geometry_is_one_resampling(monkeypatch):
    calls, real = [], script.F.grid_sample
    monkeypatch.setattr(script.F, "grid_sample", lambda *args, **options: calls.append(1) or real(*args, **options))
    augment(pages(), STRONG, seeded())
    assert calls == [1]
    assert np.isfinite(augment(pages(), STRONG, seeded()).numpy()).all()
