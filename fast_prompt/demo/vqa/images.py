"""Image files as the pixels that the image encoder was trained on, and back."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fast_prompt.demo import MOST_PIXELS
from fast_prompt.demo.vqa.data import IMAGE_HEIGHT, IMAGE_WIDTH
from fast_prompt.nn.checks import check_count

WIDEST_STRETCH = 1.25  # an image may be so much wider or narrower than three squares
PILLOWS_LIMIT = 178_956_970  # pixels; Pillow opens no larger image

# Grey of more than 8 bits, by Pillow's modes, and what white may be: the first that no value exceeds.
DEEP_GREY = {
    **dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N"), (65535,)),
    **dict.fromkeys(("I", "F"), (1, 255, 65535)),
}
BLACK, WHITE = (0, 0, 0, 255), (255, 255, 255, 255)


def read_image(path: Path, max_pixels: int = MOST_PIXELS) -> Tensor:
    """An image file as pixels [1, 8, 24] in [-1, 1], bright strokes on dark.

    Any format that Pillow reads, in colour or grey of any depth, turned as its EXIF data say, and any size about three
    times as wide as high; it is scaled down or up to 8 x 24. Dark strokes on a bright ground are turned round. What is
    transparent becomes the ground: it contrasts with strokes that lie on nothing, and goes on where most is opaque.

    Args:
        path: of the file.
        max_pixels: a larger image is refused before it is decoded; up to 178,956,970.

    Raises:
        ValueError: the file is missing, no image, broken, too large, transparent everywhere, or of another shape.
    """
    check_count("max_pixels", max_pixels, PILLOWS_LIMIT)
    if not path.is_file():
        raise ValueError(f"{path}: cannot be read as an image (there is no such file)")
    try:
        image = _decoded(path, max_pixels)
    except Exception as error:  # a decoder raises whatever it meets in a broken file
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error
    stretch = image.width / image.height / (IMAGE_WIDTH / IMAGE_HEIGHT)
    if not 1 / WIDEST_STRETCH <= stretch <= WIDEST_STRETCH:
        raise ValueError(
            f"{path}: expected three digits side by side, about three times as wide as high, got {image.width} x "
            f"{image.height}"
        )
    on_black, on_white = (_scaled(_laid_on(ground, image)) for ground in (BLACK, WHITE))
    opaque = 255 - (on_white - on_black)
    if not opaque.any():
        raise ValueError(f"{path}: nothing can be seen, it is transparent everywhere")
    bright, covered = on_black.sum() > opaque.sum() / 2, opaque.mean() > 127.5
    levels = on_white if bright == covered else on_black
    if levels.mean() > 127.5:
        levels = 255 - levels
    return levels / 127.5 - 1


def write_image(pixels: Tensor, path: Path) -> None:
    """Pixels [1, 8, 24] in [-1, 1] as a grey image file."""
    levels = ((pixels[0] + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(levels.numpy()).save(path)


def _decoded(path: Path, max_pixels: int) -> Image.Image:
    """The image upright, with 8 bits a channel."""
    # From an open file: of a path Pillow maps some TIFFs into memory, and then turns them wrongly.
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
        with Image.open(file) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels, and at most {max_pixels:,} are decoded")
            return _in_8_bits(ImageOps.exif_transpose(image))


def _in_8_bits(image: Image.Image) -> Image.Image:
    if image.mode not in DEEP_GREY:
        return image
    values, whites = np.asarray(image), DEEP_GREY[image.mode]
    least, most = float(values.min()), float(values.max())  # NaN if there is any
    white = next((white for white in whites if least >= 0 and most <= white), None)
    if white is None:
        raise ValueError(f"expected grey from 0 to {whites[-1]}, got {least:g} to {most:g}")
    grey = Image.fromarray((values * np.float32(255 / white)).round().astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.uint8(255) * (values != image.info["transparency"]))))


def _laid_on(ground: tuple[int, ...], image: Image.Image) -> Image.Image:
    """In grey, opaque."""
    if not image.has_transparency_data:
        return image.convert("L")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, ground), layer).convert("L")


def _scaled(grey: Image.Image) -> Tensor:
    """Its levels, float32 [1, 8, 24] from 0 to 255."""
    scaled = grey.resize((IMAGE_WIDTH, IMAGE_HEIGHT), Image.Resampling.BOX)
    return torch.tensor(list(scaled.tobytes()), dtype=torch.float32).view(1, IMAGE_HEIGHT, IMAGE_WIDTH)
