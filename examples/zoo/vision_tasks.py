"""The ViT zoo's images: eight tasks with statistics of their own, and the letters that the base is pre-trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import scenes
import torch
from glyphs import SCRIPTS, SIDE, digits, letters, render
from scenes import uniform
from torch import Generator, Tensor

Painter = Callable[[Tensor, Generator], Tensor]

#: What the camera leaves of the contrast, and adds in shade and in noise (of a range of 1).
CAMERA = {"contrast": 0.5, "shade": 0.15, "noise": 0.05}


@dataclass(frozen=True)
class VisionTask:
    """A classification task.

    Attributes:
        name: short, used for directories and tables.
        classes: names of its classes.
        paint: images (n, 3, 28, 28) in 0…1 of the given labels, under the task's own conditions.
        paint_clean: the same classes on plain paper: what the head's class vectors are taken from.
    """

    name: str
    classes: tuple[str, ...]
    paint: Painter
    paint_clean: Painter


def _pick(masks: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """One face of each label's glyph: (classes, faces, s, s) and (n,) to (n, s, s)."""
    face = torch.randint(masks.shape[1], labels.shape, generator=generator)
    return masks[labels, face]


def photographed(paint: Painter) -> Painter:
    """All tasks are seen through one camera, which the base has never looked through: pale, with shade, and noise.

    So the experts have something in common to learn; without it their merge recovers too little to compare methods by.
    """

    def paint_and_take(labels: Tensor, generator: Generator) -> Tensor:
        images = 0.5 + CAMERA["contrast"] * (paint(labels, generator) - 0.5)
        images = images + CAMERA["shade"] * scenes.clouds(generator, len(labels), 3, 1)
        return (images + CAMERA["noise"] * scenes.normal(generator, *images.shape)).clamp(0, 1)

    return paint_and_take


def _plain(masks: Tensor, generator: Generator, contrast: float = 0.6) -> Tensor:
    ink, paper = scenes.colours(generator, len(masks), contrast)
    return scenes.compose(masks, ink, paper)


def clean_glyphs(masks: Tensor) -> Painter:
    """Glyphs on plain paper, lightly turned."""

    def paint(labels: Tensor, generator: Generator) -> Tensor:
        return _plain(scenes.warp(_pick(masks, labels, generator), generator, 0.5), generator)

    return paint


def street(masks: Tensor) -> Painter:
    """As on house numbers: other digits at both sides, paper that darkens across the image."""

    def paint(labels: Tensor, generator: Generator) -> Tensor:
        n = len(labels)
        ink, paper = scenes.colours(generator, n, 0.3)
        image = scenes.warp(_pick(masks, labels, generator), generator, 0.6)
        for side in (-1, 1):
            other = torch.randint(len(masks), labels.shape, generator=generator)
            beside = scenes.warp(_pick(masks, other, generator), generator, 0.4)
            shift = 15 * side
            beside = beside.roll(shift, dims=2)
            beside[:, :, (slice(None, shift) if side > 0 else slice(shift, None))] = 0
            image = torch.maximum(image, beside)
        shade = 0.12 * scenes.clouds(generator, n, 2, 1)
        return (scenes.compose(image, ink, paper) + shade).clamp(0, 1)

    return paint


def noisy(masks: Tensor) -> Painter:
    """Heavy sensor noise and dead pixels."""

    def paint(labels: Tensor, generator: Generator) -> Tensor:
        images = _plain(scenes.warp(_pick(masks, labels, generator), generator), generator, 0.45)
        images = images + 0.13 * scenes.normal(generator, *images.shape)
        return scenes.pepper(images.clamp(0, 1), generator, 0.07)

    return paint


def clouded(masks: Tensor) -> Painter:
    """On coloured clouds, as on a photograph."""

    def paint(labels: Tensor, generator: Generator) -> Tensor:
        n = len(labels)
        ink, paper = scenes.colours(generator, n, 0.35)
        ground = paper + 0.2 * scenes.clouds(generator, n, 6)
        return scenes.compose(scenes.warp(_pick(masks, labels, generator), generator), ink, ground).clamp(0, 1)

    return paint


def rippled(masks: Tensor) -> Painter:
    """Through rippled glass, large turns."""

    def paint(labels: Tensor, generator: Generator) -> Tensor:
        return _plain(scenes.warp(_pick(masks, labels, generator), generator, 1.2, waves=0.11), generator, 0.5)

    return paint


def faded(masks: Tensor) -> Painter:
    """Out of focus and of little contrast, on striped paper."""

    def paint(labels: Tensor, generator: Generator) -> Tensor:
        n = len(labels)
        ink, paper = scenes.colours(generator, n, 0.45)
        ground = paper + 0.12 * scenes.stripes(generator, n, 3, 6)
        images = scenes.compose(scenes.warp(_pick(masks, labels, generator), generator), ink, ground)
        return scenes.blur(images, 2).clamp(0, 1)

    return paint


def barred(masks: Tensor) -> Painter:
    """Behind bars."""

    def paint(labels: Tensor, generator: Generator) -> Tensor:
        images = _plain(scenes.warp(_pick(masks, labels, generator), generator, 1.2), generator, 0.5)
        return scenes.bars(images, generator, 2, 3)

    return paint


def clean_textures(labels: Tensor, generator: Generator) -> Tensor:
    """Textures in two colours."""
    return _plain(scenes.texture_fields(labels, generator), generator)


def worn_textures(labels: Tensor, generator: Generator) -> Tensor:
    """Textures of little contrast under coloured clouds."""
    n = len(labels)
    ink, paper = scenes.colours(generator, n, 0.25)
    images = scenes.compose(scenes.texture_fields(labels, generator), ink, paper)
    return (images + 0.15 * scenes.clouds(generator, n, 3)).clamp(0, 1)


def clean_counts(labels: Tensor, generator: Generator) -> Tensor:
    """Label + 1 discs on plain paper."""
    return _plain(scenes.scattered_discs(labels + 1, generator), generator)


def crowded_counts(labels: Tensor, generator: Generator) -> Tensor:
    """Label + 1 discs on a gradient."""
    n = len(labels)
    ink, paper = scenes.colours(generator, n, 0.4)
    ground = paper + 0.12 * scenes.clouds(generator, n, 3)
    images = scenes.compose(scenes.scattered_discs(labels + 1, generator), ink, ground)
    return images.clamp(0, 1)


_DIGITS = {"latin": street, "devanagari": noisy, "bengali": clouded, "arabic": rippled, "thai": faded}
_SHAPES = ("triangle", "square", "pentagon", "star-4", "star-5", "cross", "disc", "ring", "crescent", "half-disc")
_TEXTURES = ("rows", "columns", "rising", "falling", "checks", "dots", "rings", "spokes", "clouds", "grain")


def vision_tasks(names: tuple[str, ...], fonts: Path, latin_faces: tuple[str, ...] | None = None) -> list[VisionTask]:
    """Make the tasks of these names.

    Args:
        names: out of `TASKS`.
        fonts: directory of the Noto fonts.
        latin_faces: faces for ``digits-latin`` instead of Noto's.
    """
    found = []
    for name in names:
        if name.startswith("digits-"):
            script = name.removeprefix("digits-")
            faces = latin_faces if latin_faces and script == "latin" else SCRIPTS[script].faces
            masks = render(digits(script), faces, fonts)
            classes = tuple(f"{script}-{value}" for value in range(10))
            found.append(VisionTask(name, classes, photographed(_DIGITS[script](masks)), clean_glyphs(masks)))
        elif name == "shapes":
            masks = scenes.shape_masks(SIDE).unsqueeze(1)
            found.append(VisionTask(name, _SHAPES, photographed(barred(masks)), clean_glyphs(masks)))
        elif name == "textures":
            found.append(VisionTask(name, _TEXTURES, photographed(worn_textures), clean_textures))
        else:
            classes = tuple(f"count-{value}" for value in range(1, 7))
            found.append(VisionTask(name, classes, photographed(crowded_counts), clean_counts))
    return found


#: All tasks, in the order of tables.
TASKS = (*(f"digits-{script}" for script in _DIGITS), "shapes", "textures", "counts")

#: Scripts whose letters the base is pre-trained on.
LETTER_SCRIPTS = tuple(script for script in SCRIPTS if script != "pillow")


class LetterStream:
    """Endless letters as print shows them, on plain paper, for pre-training."""

    def __init__(self, scripts: tuple[str, ...], fonts: Path) -> None:
        masks = []
        for script in scripts:
            rendered = render(letters(script), SCRIPTS[script].faces, fonts)
            faces = torch.arange(4) % rendered.shape[1]  # a script of fewer faces shows each of them more often
            masks.append(rendered[:, faces])
        self.masks = torch.cat(masks)

    @property
    def classes(self) -> int:
        """Number of letters."""
        return len(self.masks)

    def batch(self, n: int, generator: Generator, difficulty: float = 1.0) -> tuple[Tensor, Tensor]:
        """Images (n, 3, 28, 28) in 0…1 and labels (n,).

        Args:
            n: number of images.
            generator: of all that is random.
            difficulty: 0: upright, black on white; 1: turned, in all colours. A transformer shown the latter from the
                start does not begin to learn.
        """
        labels = torch.randint(self.classes, (n,), generator=generator)
        masks = scenes.warp(_pick(self.masks, labels, generator), generator, 0.2 + 0.7 * difficulty)
        images = _plain(masks, generator, 0.4)
        easy = uniform(generator, n, 1, 1, 1) >= difficulty
        return torch.where(easy, 1 - masks.unsqueeze(1), images), labels
