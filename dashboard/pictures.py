"""Pictures for the pages, kept in memory once they are drawn.

An image that a gallery holds is shown with its maps. Any other is read from the folder that was
scanned, if it is still there: small, and only from inside that folder.
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from audit.errors import RunError
from audit.gallery import Picture, data_uri, gallery_pictures
from audit.runs import RepairFolder, Run, open_repair, open_run
from dashboard.selection import folder_state

__all__ = ["FORMATS", "kept_pictures", "scanned_picture"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
SIDE = 384  # pixels, the longer one
MOST_PIXELS = 178_956_970  # as the scan


def kept_pictures(
    folder: Run | RepairFolder, place: int, method: str, layer: str, *, cells: int
) -> tuple[Picture, ...]:
    """Return an image of a gallery with its maps, see `audit.gallery.gallery_pictures`."""
    state = folder_state(folder.path / "maps", folder.path / "maps" / method)
    repaired = isinstance(folder, RepairFolder)
    return _drawn(folder.path, repaired, place, method, layer, cells, state)


def scanned_picture(run: Run, path: str) -> Picture:
    """Return an image of the scan as it lies on the disk.

    Raises:
        RunError: It is not there any more, or it is none that can be shown.
    """
    root = (run.info.get("data") or {}).get("root")
    if not root:
        raise RunError("the run does not say where its images are")
    folder = Path(str(root)).resolve()
    try:
        file = (folder / path).resolve()
        inside = file.is_relative_to(folder) and file.is_file()
    except (OSError, ValueError) as error:  # a name too long, or with a null byte
        raise RunError("the image cannot be opened") from error
    if not inside:
        raise RunError("the image is not in the scanned folder any more")
    stat = file.stat()
    return _thumbnail(file, stat.st_mtime_ns, stat.st_size)


@st.cache_resource(max_entries=600, show_spinner=False)
def _drawn(
    path: Path,
    repaired: bool,
    place: int,
    method: str,
    layer: str,
    cells: int,
    state: tuple[tuple[str, int, int], ...],
) -> tuple[Picture, ...]:
    folder = open_repair(path) if repaired else open_run(path)
    return gallery_pictures(folder, place, method, layer, cells=cells)


@st.cache_resource(max_entries=600, show_spinner=False)
def _thumbnail(file: Path, changed_ns: int, size: int) -> Picture:
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(file, formats=FORMATS) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise RunError("the image is too large to be shown")
            picture.draft("RGB", (SIDE, SIDE))  # a large JPEG is decoded small
            upright = ImageOps.exif_transpose(picture)
            upright.thumbnail((SIDE, SIDE))
            return Picture(title="Image", uri=data_uri(np.asarray(upright.convert("RGB"))))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RunError("the image cannot be decoded any more") from error
