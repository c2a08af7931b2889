"""Glyphs of many scripts as masks: rendered once by Pillow from Debian's Noto fonts (package ``fonts-noto-core``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from neuron_methods.support.errors import UserError

#: Where Debian's package puts the fonts.
NOTO = Path("/usr/share/fonts/truetype/noto")
#: In place of a font file's name: the Latin font inside Pillow, for trials on a machine without Noto.
PILLOW = "pillow"

#: Side of a mask in pixels: twice an image's, so that it can be turned and scaled.
SIDE = 56
#: Longer side of the glyph's box within its mask.
BOX = 34


@dataclass(frozen=True)
class Script:
    """A writing system.

    Attributes:
        faces: font files (without ``.ttf``), or `PILLOW`.
        digits: code point of its zero; the other nine follow.
        letters: inclusive ranges of code points.
    """

    faces: tuple[str, ...]
    digits: int | None
    letters: tuple[tuple[int, int], ...]


def _faces(*families: str) -> tuple[str, ...]:
    return tuple(f"{family}-{style}" for family in families for style in ("Regular", "Bold"))


SCRIPTS = {
    "pillow": Script((PILLOW,), 0x30, ((0x41, 0x5A), (0x61, 0x7A))),
    "latin": Script(_faces("NotoSans", "NotoSerif"), 0x30, ((0x41, 0x5A), (0x61, 0x7A))),
    "greek": Script(
        _faces("NotoSans", "NotoSerif"), None, ((0x393, 0x394), (0x398, 0x398), (0x39E, 0x3A9), (0x3B1, 0x3C9))
    ),
    "cyrillic": Script(_faces("NotoSans", "NotoSerif"), None, ((0x414, 0x42F), (0x431, 0x44F))),
    "hebrew": Script(_faces("NotoSansHebrew", "NotoSerifHebrew"), None, ((0x5D0, 0x5EA),)),
    "arabic": Script(_faces("NotoSansArabic", "NotoNaskhArabic"), 0x660, ((0x628, 0x63A), (0x641, 0x64A))),
    "armenian": Script(_faces("NotoSansArmenian", "NotoSerifArmenian"), None, ((0x531, 0x556),)),
    "georgian": Script(_faces("NotoSansGeorgian", "NotoSerifGeorgian"), None, ((0x10D0, 0x10F0),)),
    "devanagari": Script(_faces("NotoSansDevanagari", "NotoSerifDevanagari"), 0x966, ((0x905, 0x914), (0x915, 0x939))),
    "bengali": Script(_faces("NotoSansBengali", "NotoSerifBengali"), 0x9E6, ((0x995, 0x9A8), (0x9AA, 0x9B0))),
    "thai": Script(_faces("NotoSansThai", "NotoSerifThai"), 0xE50, ((0xE01, 0xE2E),)),
    "khmer": Script(_faces("NotoSansKhmer", "NotoSerifKhmer"), 0x17E0, ((0x1780, 0x17A2),)),
    "ethiopic": Script(_faces("NotoSansEthiopic", "NotoSerifEthiopic"), None, ((0x1200, 0x1220),)),
    "telugu": Script(_faces("NotoSansTelugu", "NotoSerifTelugu"), 0xC66, ((0xC15, 0xC28), (0xC2A, 0xC33))),
    "lao": Script(_faces("NotoSansLao", "NotoSerifLao"), 0xED0, ((0xE94, 0xE97), (0xE99, 0xE9F), (0xEA1, 0xEA3))),
    "cherokee": Script(_faces("NotoSansCherokee"), None, ((0x13A0, 0x13C8),)),
}


def find_face(face: str, fonts: Path) -> Path:
    """Find the file of a Noto face.

    Raises:
        UserError: it is not there, with the package to install.
    """
    path = fonts / f"{face}.ttf"
    if not path.is_file():
        raise UserError(
            f"font {face}.ttf is not in {fonts}: install Debian's package (apt-get install fonts-noto-core), "
            "or name the directory that holds the Noto fonts with --fonts"
        )
    return path


def render(characters: list[str], faces: tuple[str, ...], fonts: Path = NOTO) -> Tensor:
    """Render masks of characters in every face.

    Args:
        characters: one character each.
        faces: see `Script.faces`.
        fonts: directory of the font files.

    Returns:
        (characters, faces, `SIDE`, `SIDE`) float32, 0 for paper and 1 for ink, boxes centred and of one size.
    """
    masks = np.zeros((len(characters), len(faces), SIDE, SIDE), dtype=np.float32)
    for column, face in enumerate(faces):
        size = 2 * BOX
        font = ImageFont.load_default(size) if face == PILLOW else ImageFont.truetype(find_face(face, fonts), size)
        for row, character in enumerate(characters):
            masks[row, column] = _mask(character, font)
    return torch.from_numpy(masks)


def _mask(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    canvas = Image.new("L", (8 * BOX, 8 * BOX))
    ImageDraw.Draw(canvas).text((2 * BOX, 2 * BOX), character, fill=255, font=font)
    box = canvas.getbbox()
    if box is None:
        raise UserError(
            f"the font {font.getname()[0]} draws nothing for U+{ord(character):04X}: is it the Noto release?"
        )
    glyph = canvas.crop(box)
    scale = BOX / max(glyph.size)
    glyph = glyph.resize([max(1, round(scale * side)) for side in glyph.size], Image.Resampling.BILINEAR)
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(glyph, ((SIDE - glyph.width) // 2, (SIDE - glyph.height) // 2))
    return np.asarray(mask, dtype=np.float32) / 255


def digits(script: str) -> list[str]:
    """The ten digits of a script, zero first."""
    zero = SCRIPTS[script].digits
    assert zero is not None, script
    return [chr(zero + value) for value in range(10)]


def letters(script: str) -> list[str]:
    """The letters of a script that stand as classes of pre-training."""
    return [chr(code) for low, high in SCRIPTS[script].letters for code in range(low, high + 1)]
