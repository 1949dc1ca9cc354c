"""Image files that may be anything: their pixels, or why there are none."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from evaluators.base import NoImage

# A shard's images are in memory together, and FLUX's largest have a quarter of these.
MOST_PIXELS = 4096 * 4096
# Models that scale an image's short side up to theirs would make millions of pixels of a strip.
MOST_ASPECT = 16
FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow would hand others to other programs


def decode_image(content: bytes, name: str) -> np.ndarray | NoImage:
    """Pixels uint8 [H, W, 3] of a file that is called `name`, or what is wrong with it.

    Nothing is converted: what a transparent, palette or 16-bit image shows is for whoever made it to say.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                return NoImage(f"{name}: {image.width}x{image.height} pixels, more than {MOST_PIXELS:,}; scale it down")
            if max(image.size) > MOST_ASPECT * min(image.size):
                return NoImage(
                    f"{name}: {image.width}x{image.height} pixels, one side over {MOST_ASPECT} times the other"
                )
            if image.mode != "RGB":
                return NoImage(f"{name}: an image of mode {image.mode}; save it as 8-bit RGB")
            return np.array(image)
    except UnidentifiedImageError:
        return NoImage(f"{name}: not a PNG, JPEG or WebP image")
    # Pillow's readers raise all of these for damaged files, SyntaxError for a PNG's checksums.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        return NoImage(f"{name}: cannot be read ({' '.join(str(error).split())})")
