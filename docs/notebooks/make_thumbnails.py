"""Writes the pictures of the gallery from the figures in the built site.

python docs/notebooks/make_thumbnails.py docs/_build/html
"""

import re
import sys
from pathlib import Path

from PIL import Image, ImageOps

FIGURES = {
    "quickstart_nnx": 0,
    "quickstart_linen": 0,
    "vision": -1,
    "matrix_factorization": 0,
    "calibration": 1,
    "serving": 0,
}
"""Which of the figures of each notebook is shown."""

SIZE = (560, 270)


def write(figure: Path, thumbnail: Path) -> None:
    """Writes a figure as a PNG of at most 40 kB."""
    with Image.open(figure) as image:
        picture = ImageOps.pad(image.convert("RGB"), SIZE, Image.Resampling.LANCZOS, color="white")
    picture.quantize(200, dither=Image.Dither.NONE).save(thumbnail, optimize=True)
    print(f"{thumbnail.stat().st_size / 1e3:5.1f} kB  {thumbnail}")


def main(site: Path) -> None:
    """Writes the thumbnail of each notebook."""
    folder = Path(__file__).parent / "thumbnails"
    for name, place in FIGURES.items():
        page = site / "notebooks" / f"{name}.html"
        figures = re.findall(r'<img[^>]* src="([^"]+_images/[0-9a-f]{64}\.png)"', page.read_text())
        write(page.parent / figures[place], folder / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
