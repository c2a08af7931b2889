"""Images from masks: distortions, backgrounds, noise; and the drawn tasks: shapes, textures, counts.

Everything is a function on a batch and takes a `torch.Generator`, so that an image depends on the seed alone.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate

#: Side of an image in pixels.
IMAGE = 28


def uniform(generator: Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform numbers of a shape, float32."""
    return torch.rand(*shape, generator=generator) * (high - low) + low


def normal(generator: Generator, *shape: int) -> Tensor:
    """Standard normal numbers of a shape, float32."""
    return torch.randn(*shape, generator=generator)


def warp(masks: Tensor, generator: Generator, amount: float = 1.0, waves: float = 0.0, size: int = IMAGE) -> Tensor:
    """Turn, scale, shear, shift and (with `waves`) ripple masks of shape (n, s, s); returns (n, size, size)."""
    n = len(masks)
    angle = uniform(generator, n, low=-0.3, high=0.3) * amount
    scale = 1 + uniform(generator, n, low=-0.25, high=0.2) * amount
    shear = uniform(generator, n, low=-0.3, high=0.3) * amount
    shift = uniform(generator, n, 2, low=-0.15, high=0.15) * amount
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([torch.stack([cos, -sin + shear], 1), torch.stack([sin, cos], 1)], 1) * 0.72
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, -1, 2)
    grid = plane @ matrix.transpose(1, 2) + shift.unsqueeze(1)
    if waves:
        phase = uniform(generator, n, 1, 2, high=2 * math.pi)
        length = uniform(generator, n, 1, 2, low=4, high=8)
        grid = grid + waves * torch.sin(grid.flip(-1) * length + phase)
    return grid_sample(masks.unsqueeze(1), grid.view(n, size, size, 2), align_corners=False).squeeze(1)


def colours(generator: Generator, n: int, contrast: float) -> tuple[Tensor, Tensor]:
    """Ink and paper colours of shape (n, 3, 1, 1) whose brightness differs by `contrast` at least."""
    middle = uniform(generator, n, 1, low=contrast / 2, high=1 - contrast / 2)
    sign = torch.where(uniform(generator, n, 1) < 0.5, -1.0, 1.0)
    tint = 0.12 * normal(generator, 2, n, 3)
    tint = tint - tint.mean(dim=2, keepdim=True)
    ink, paper = middle + sign * contrast / 2 + tint[0], middle - sign * contrast / 2 + tint[1]
    return ink.clamp(0, 1)[:, :, None, None], paper.clamp(0, 1)[:, :, None, None]


def compose(masks: Tensor, ink: Tensor, paper: Tensor) -> Tensor:
    """Ink where the mask is, paper elsewhere: (n, 28, 28) and colours or pictures to (n, 3, 28, 28)."""
    alpha = masks.unsqueeze(1)
    return alpha * ink + (1 - alpha) * paper


def clouds(generator: Generator, n: int, cells: int, channels: int = 3) -> Tensor:
    """Smooth random fields with `cells` cells along a side, (n, channels, 28, 28), unit variance or so."""
    return interpolate(normal(generator, n, channels, cells, cells), size=IMAGE, mode="bicubic", align_corners=False)


def stripes(generator: Generator, n: int, low: float = 2.0, high: float = 5.0) -> Tensor:
    """Waves of random direction and of `low` to `high` periods across the image, (n, 1, 28, 28) in -1…1."""
    angle = uniform(generator, n, 1, 1, high=math.pi)
    periods = uniform(generator, n, 1, 1, low=low, high=high)
    phase = uniform(generator, n, 1, 1, high=2 * math.pi)
    axis = torch.arange(IMAGE) / IMAGE
    along = angle.cos() * axis.view(1, 1, -1) + angle.sin() * axis.view(1, -1, 1)
    return torch.sin(2 * math.pi * periods * along + phase).unsqueeze(1)


def blur(images: Tensor, times: int) -> Tensor:
    """A 3 × 3 mean, `times` over."""
    for _ in range(times):
        images = avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return images


def bars(images: Tensor, generator: Generator, count: int, width: int) -> Tensor:
    """Cover each image by `count` bars of random place, colour and direction."""
    n = len(images)
    place = torch.arange(IMAGE)
    for _ in range(count):
        start = uniform(generator, n, 1, high=IMAGE - width).floor()
        covered = ((place >= start) & (place < start + width)).float()
        across = (uniform(generator, n, 1, 1, 1) < 0.5).float()
        mask = across * covered[:, None, :, None] + (1 - across) * covered[:, None, None, :]
        images = images * (1 - mask) + uniform(generator, n, 3, 1, 1) * mask
    return images


def pepper(images: Tensor, generator: Generator, share: float) -> Tensor:
    """Replace a share of the pixels by black or white."""
    chance = uniform(generator, len(images), 1, IMAGE, IMAGE)
    images = torch.where(chance < share / 2, torch.zeros(()), images)
    return torch.where(chance > 1 - share / 2, torch.ones(()), images)


def regular_polygon(corners: int, inner: float = 1.0) -> Tensor:
    """Corner points of a polygon of radius 1, (m, 2); with `inner` below 1 a star."""
    count = corners if inner == 1.0 else 2 * corners
    angle = torch.arange(count) * 2 * math.pi / count - math.pi / 2
    radius = torch.ones(count)
    if inner != 1.0:
        radius[1::2] = inner
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def fill_polygon(points: Tensor, side: int) -> Tensor:
    """Mask (side, side) of a polygon around the origin with corner points (m, 2), by the even-odd rule."""
    axis = ((torch.arange(side) + 0.5) * 2 / side - 1) * side / 34
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    inside = torch.zeros(side, side, dtype=torch.bool)
    for (x0, y0), (x1, y1) in zip(points.tolist(), points.roll(-1, 0).tolist(), strict=True):
        if y0 == y1:
            continue
        crosses = (y < y0) != (y < y1)
        inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside.float()


def shape_masks(side: int) -> Tensor:
    """Ten shapes, (10, side, side): three to six corners, stars, cross, disc, ring, crescent."""
    axis = ((torch.arange(side) + 0.5) * 2 / side - 1) * side / 34
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius = (x * x + y * y).sqrt()
    polygons = [
        regular_polygon(3),
        regular_polygon(4),
        regular_polygon(5),
        regular_polygon(4, 0.4),
        regular_polygon(5, 0.4),
    ]
    masks = [fill_polygon(points, side) for points in polygons]
    masks.append(((x.abs() < 0.3) | (y.abs() < 0.3)).float() * ((x.abs() < 1) & (y.abs() < 1)))
    masks.append((radius < 1).float())
    masks.append(((radius < 1) & (radius > 0.6)).float())
    masks.append(((radius < 1) & (((x - 0.45) ** 2 + y * y).sqrt() > 0.8)).float())
    masks.append(((radius < 1) & (y > 0)).float())
    return torch.stack(masks)


def texture_fields(labels: Tensor, generator: Generator) -> Tensor:
    """Ten textures by label, (n, 28, 28) in 0…1: lines, checks, dots, rings, spokes, bricks, clouds of two sizes."""
    n = len(labels)
    axis = (torch.arange(IMAGE) + 0.5) / IMAGE - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    tilt = uniform(generator, n, 1, 1, low=-0.2, high=0.2)
    u = x * tilt.cos() - y * tilt.sin() + uniform(generator, n, 1, 1)
    v = x * tilt.sin() + y * tilt.cos() + uniform(generator, n, 1, 1)
    k = 2 * math.pi * uniform(generator, n, 1, 1, low=2.5, high=4.5)
    centre = uniform(generator, 2, n, 1, 1, low=-0.2, high=0.2)
    dx, dy = x - centre[0], y - centre[1]
    su, sv = (k * u).sin(), (k * v).sin()
    fields = [
        su,
        sv,
        (k * (u + v) / 1.4).sin(),
        (k * (u - v) / 1.4).sin(),
        (su * sv).sign(),
        3 * (su.clamp(min=0) * sv.clamp(min=0)) - 0.8,
        (1.5 * k * (dx * dx + dy * dy).sqrt()).sin(),
        (torch.atan2(dy, dx) * 6 + k).sin(),
        clouds(generator, n, 5, 1).squeeze(1),
        clouds(generator, n, 14, 1).squeeze(1),
    ]
    chosen = torch.stack(fields, 1)[torch.arange(n), labels]
    return (0.5 + 0.5 * chosen).clamp(0, 1)


def scattered_discs(counts: Tensor, generator: Generator) -> Tensor:
    """Masks (n, 28, 28) of so many discs that do not touch, in cells of a 3 × 3 grid."""
    n = len(counts)
    order = uniform(generator, n, 9).argsort(1)
    axis = torch.arange(IMAGE) + 0.5
    masks = torch.zeros(n, IMAGE, IMAGE)
    for place in range(9):
        cell = order[:, place]
        jitter = uniform(generator, 2, n, low=-1.2, high=1.2)
        cx, cy = 5 + 9 * (cell % 3) + jitter[0], 5 + 9 * (cell // 3) + jitter[1]
        radius = uniform(generator, n, 1, 1, low=1.8, high=3.4)
        distance = (
            (axis.view(1, 1, -1) - cx.view(-1, 1, 1)) ** 2 + (axis.view(1, -1, 1) - cy.view(-1, 1, 1)) ** 2
        ).sqrt()
        disc = (radius - distance + 0.5).clamp(0, 1)
        masks = torch.where((place < counts).view(-1, 1, 1), torch.maximum(masks, disc), masks)
    return masks
