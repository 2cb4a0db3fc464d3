"""Augmentation by batch, on the device: tensors in, tensors out. Every image has its own random draw."""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ELASTIC_GRID = 5    # control points along a side of the elastic warp
ERASING_SIZE = 0.33  # longest side of an erased rectangle, as a share of the image's


@dataclass(frozen=True)
class WarpRanges:
    """Ranges of a warp; each image draws uniformly from its own."""

    rotation: float       # degrees to either side
    scale: float          # share by which an image grows or shrinks
    shear: float          # horizontal shear
    stretch: float        # width against height: from exp(-stretch) to exp(stretch)
    shift: float          # share of the side
    crop: float           # probability of a crop
    crop_size: float      # smallest side of a crop, as a share of the image's
    perspective: float    # strength of the perspective
    elastic: float        # standard deviation of the displacements, as a share of half the side
    recenter_warp: bool   # keep the centre and the longer side of the ink's bounding box

    @property
    def active(self) -> bool:
        """True if any image is resampled."""
        return any((self.rotation, self.scale, self.shear, self.stretch, self.shift, self.crop, self.perspective,
                    self.elastic))


class BatchRandom:
    """Random numbers for a batch, drawn on the device from a seed."""

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Return uniform numbers of this shape."""
        return torch.empty(*shape, device=self.generator.device).uniform_(low, high, generator=self.generator)

    def normal(self, deviation: float, *shape: int) -> Tensor:
        """Return normal deviates of this shape."""
        return torch.empty(*shape, device=self.generator.device).normal_(generator=self.generator) * deviation


def warp(images: Tensor, ranges: WarpRanges, image_size: int, random: BatchRandom) -> Tensor:
    """Return randomly warped ink 0..1 [B, 1, image_size, image_size] of uint8 images [B, 1, S, S]."""
    weights, horizon = draw_warps(images, ranges, random)
    basis = warp_basis(image_size, images.device)
    grid = weights @ basis
    if ranges.perspective:
        grid = grid / (1 + horizon @ basis[:2]).unsqueeze(1)
    grid = grid.unflatten(2, (image_size, image_size)).permute(0, 2, 3, 1)
    return F.grid_sample(images.float().div_(255), grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@functools.lru_cache(maxsize=4)
def warp_basis(size: int, device: torch.device) -> Tensor:
    """Return the functions that a warp is a sum of, [28, size * size]: x, y, 1 and the bumps of the elastic grid."""
    line = (torch.arange(size, device=device) * 2 + 1) / size - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    points = ELASTIC_GRID**2
    bumps = F.interpolate(torch.eye(points, device=device).view(points, 1, ELASTIC_GRID, ELASTIC_GRID),
                          size=(size, size), mode="bicubic", align_corners=True)
    return torch.cat([torch.stack([x, y, torch.ones_like(x)]).flatten(1), bumps.flatten(1)])


def draw_warps(images: Tensor, ranges: WarpRanges, random: BatchRandom) -> tuple[Tensor, Tensor]:
    """Draw each image's warp: weights of `warp_basis` for the source's x and y [B, 2, 28], and perspective [B, 2]."""
    count = len(images)

    def symmetric(limit: float, *shape: int) -> Tensor:
        return random.uniform(-limit, limit, count, *shape)

    angle, slant = symmetric(math.radians(ranges.rotation)), symmetric(ranges.shear)
    wide = symmetric(ranges.stretch).exp()
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack([cos * wide, slant * cos - sin, sin * wide, slant * sin + cos], dim=1).view(count, 2, 2)
    bumps = random.normal(ranges.elastic, count, 2, ELASTIC_GRID**2)
    shift = symmetric(2 * ranges.shift, 2, 1)  # coordinates span -1..1
    if ranges.recenter_warp:  # drawn symbols come cropped and scaled to fill their image, rotated ones too
        affine, centre = recenter_warp(images, affine, bumps)
        shift = shift + centre
    size = 1 + symmetric(ranges.scale, 1, 1)  # a warp maps output to source, so it divides by the size
    if ranges.crop:
        chosen, side = random.uniform(0, 1, count, 2, 1, 1).unbind(1)
        side = (1 - (1 - ranges.crop_size) * side).where(chosen < ranges.crop, 1.0)
        size, shift = size / side, shift + symmetric(1, 2, 1) * (1 - side)
    return torch.cat([affine / size, shift, bumps], dim=2), symmetric(ranges.perspective, 2)


def recenter_warp(images: Tensor, affine: Tensor, bumps: Tensor) -> tuple[Tensor, Tensor]:
    """Return affine parts [B, 2, 2] and shifts [B, 2, 1] that keep the ink's bounding-box centre and longer side."""
    basis = warp_basis(images.shape[-1], images.device)
    ink = (images > 127).flatten(2)
    unwarped = basis[:2] - bumps @ basis[3:]  # inverse of the elastic part: bumps are small and smooth

    def bounding_box(points: Tensor) -> tuple[Tensor, Tensor]:
        low, high = points.where(ink, 9.0).amin(dim=2), points.where(ink, -9.0).amax(dim=2)
        return (low + high) / 2, ((high - low) / 2).amax(dim=1).clamp(min=0.1)

    middle, reach = bounding_box(basis[:2].expand_as(unwarped))
    new_middle, new_reach = bounding_box(torch.linalg.inv_ex(affine).inverse @ unwarped)
    ratio = (new_reach / reach).where(ink.any(dim=2).squeeze(1), 1.0)[:, None, None]
    return affine * ratio, affine @ (new_middle[:, :, None] - ratio * middle[:, :, None])


def change_ink(ink: Tensor, contrast: float, brightness: float, random: BatchRandom) -> Tensor:
    """Bend each image's grey levels and make its ink fainter. Background stays background."""
    bend, fainter = random.uniform(0, 1, len(ink), 2, 1, 1, 1).unbind(1)
    if contrast:  # ink + bend * ink * (1 - ink) keeps 0, 1 and the order of greys for |bend| <= 1
        ink = ink * (1 + contrast * (2 * bend - 1) * (1 - ink))
    if brightness:
        ink = ink * (1 - brightness * fainter)
    return ink


def erase(ink: Tensor, probability: float, random: BatchRandom) -> Tensor:
    """Set a random rectangle to background in a share of the images (random erasing, arXiv:1708.04896)."""
    if not probability:
        return ink
    chosen, *numbers = random.uniform(0, 1, len(ink), 5, 1).unbind(1)
    side = ink.shape[-1]
    line = (torch.arange(side, device=ink.device) + 0.5) / side
    inside = [(line - middle).abs() <= (extent * ERASING_SIZE).clamp(min=1 / side) / 2  # at least one pixel
              for middle, extent in (numbers[:2], numbers[2:])]
    hole = inside[0][:, :, None] & inside[1][:, None, :] & (chosen < probability)[:, :, None]
    return ink.masked_fill(hole[:, None], 0)


def resize(ink: Tensor, image_size: int) -> Tensor:
    """Return ink [B, 1, S, S] resampled to [B, 1, image_size, image_size]."""
    return F.interpolate(ink, size=(image_size, image_size), mode="bilinear", align_corners=False)


def soften_edges(ink: Tensor, share: float) -> Tensor:
    """Give each neighbour in a row or a column this share of a pixel's ink, as bilinear resampling does on average."""
    line = F.pad(torch.full((1,), 1 - 2 * share, device=ink.device), (1, 1), value=share)  # made on the device
    return F.conv2d(ink, torch.outer(line, line)[None, None], padding=1)
