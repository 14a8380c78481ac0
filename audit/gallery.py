"""What the network looked at: a picture, its maps laid over it, and the words beneath.

Maps are drawn in magma, a color map that keeps its order for every kind of color vision and in
gray; where a map is zero the picture shows through. A page lays them over the picture itself, so
that their opacity can change and the pointer finds each value. Cards are plain data for a template:
text is never marked up here, so the template's escaping covers every name that came from a file.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from audit.errors import RunError
from audit.runs import RepairFolder, Run
from audit.wording import fixed, percent

__all__ = [
    "Card",
    "Picture",
    "card",
    "color_scale",
    "data_uri",
    "gallery_pictures",
    "heat_picture",
    "image_facts",
    "layer_strip",
    "outcome",
    "overlay",
    "read_pixels",
]

COLOR_MAP = "magma"
DRAWN_SIDE = 64  # pixels that a map has at least as it is drawn
GRID_CELLS = 12  # a side, of the values that the pointer finds on a card
LARGEST_PICTURE = 4096 * 4096
Outcome = Literal["right", "wrong", "fixed", "broken", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image as a data URI, and what it shows.

    Attributes:
        heat: A map to lay over it, as a data URI that is clear where the map is zero.
        values: The map's values as text, a row of cells each, for the pointer.
    """

    title: str
    uri: str
    heat: str = ""
    values: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Card:
    """One image with its maps, ready for a template; `href` is where it can be seen large."""

    name: str
    outcome: Outcome
    pictures: tuple[Picture, ...]
    facts: tuple[tuple[str, str], ...]
    href: str = ""


def overlay(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return the picture with a map laid over it, HWC uint8 of the picture's size.

    Args:
        pixels: The picture, HWC uint8, [0, 255].
        heat: The map, (h, w) in [0, 1], any size; it is scaled up smoothly.
    """
    heat = np.clip(_resized(np.nan_to_num(heat), pixels.shape[:2]), 0, 1)
    # Half gray, so that the colors of the map are not read as colors of the picture.
    gray = pixels @ np.array([0.299, 0.587, 0.114])
    muted = 0.5 * pixels + 0.5 * gray[..., None]
    opacity = 0.8 * np.sqrt(heat)[..., None]
    mixed = (1 - opacity) * muted + opacity * 255 * _colors(heat)
    return np.asarray(np.rint(mixed), dtype=np.uint8)


def heat_picture(title: str, uri: str, heat: np.ndarray, *, cells: int = GRID_CELLS) -> Picture:
    """Return a picture with a map to be laid over it.

    Args:
        uri: The picture.
        heat: The map, (h, w) in [0, 1].
        cells: Most cells a side whose values can be read; a larger map is averaged down to them.
    """
    heat = np.clip(np.nan_to_num(heat), 0, 1)
    readable = _pooled(heat, cells)
    # Smooth by itself: what prints a page does not always smooth what it scales up.
    height, width = heat.shape
    drawn = np.clip(_resized(heat, (max(height, DRAWN_SIDE), max(width, DRAWN_SIDE))), 0, 1)
    opacity = np.sqrt(drawn)[..., None]
    colors = np.concatenate([_colors(drawn), opacity], axis=-1)  # (h, w) -> (h, w, 4)
    return Picture(
        title=title,
        uri=uri,
        heat=_png_uri(np.rint(255 * colors).astype(np.uint8)),
        values=tuple(tuple(f"{value:.2f}" for value in row) for row in readable),
    )


def outcome(entry: Mapping[str, Any]) -> Outcome:
    """Return how the network fared on one image: `fixed` and `broken` only after a repair."""
    before, after = entry.get("right"), entry.get("right_after")
    if before is None:
        return "unknown"
    if after is None or bool(before) == bool(after):
        return "right" if before else "wrong"
    return "fixed" if after else "broken"


def card(folder: Run | RepairFolder, place: int, method: str, layer: str) -> Card:
    """Return one image of a gallery with its map, or its maps before and after a repair.

    Args:
        place: The image's position in the gallery's index.
    """
    entry = folder.gallery["images"][place]
    return Card(
        name=str(entry.get("path", entry["id"])),
        outcome=outcome(entry),
        pictures=gallery_pictures(folder, place, method, layer),
        facts=tuple(image_facts(entry)),
    )


def gallery_pictures(
    folder: Run | RepairFolder, place: int, method: str, layer: str, *, cells: int = GRID_CELLS
) -> tuple[Picture, ...]:
    """Return one image of a gallery, then its map, or its maps before and after a repair.

    Args:
        place: The image's position in the gallery's index.
        cells: Most cells a side whose values can be read.
    """
    entry = folder.gallery["images"][place]
    uri = data_uri(read_pixels(folder.gallery_image(str(entry["id"]))))
    if isinstance(folder, RepairFolder):
        kept = {
            "Before": folder.maps(method, layer, "before"),
            "After": folder.maps(method, layer, "after"),
        }
    else:
        kept = {"Map": folder.maps(method, layer)}
    maps = [
        heat_picture(title, uri, _one_map(found, place), cells=cells)
        for title, found in kept.items()
    ]
    return (Picture(title="Image", uri=uri), *maps)


def layer_strip(run: Run, place: int, method: str, titles: Mapping[str, str]) -> list[Picture]:
    """Return one image's map in each layer that has maps, in the order given.

    Args:
        titles: What to call each layer, by its name.
    """
    entry = run.gallery["images"][place]
    uri = data_uri(read_pixels(run.gallery_image(str(entry["id"]))))
    return [
        heat_picture(title, uri, _one_map(run.maps(method, layer), place))
        for layer, title in titles.items()
        if run.has_maps(method, layer)
    ]


def color_scale(steps: int = 9) -> list[str]:
    """Return the color map from 0 to 1 as CSS colors, for a legend."""
    colors = np.rint(255 * _colors(np.linspace(0, 1, steps))).astype(int)
    return ["#{:02x}{:02x}{:02x}".format(*color) for color in colors]


def image_facts(entry: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Return what is known of one image, by an entry of a gallery or a row of the tables."""
    yield "Label", str(entry.get("label_name", ""))
    repaired = entry.get("predicted_after_name") is not None
    yield ("Said before" if repaired else "Said"), str(entry.get("predicted_name", ""))
    if repaired:
        yield "Says after", str(entry["predicted_after_name"])
    if entry.get("p_true") is not None:
        yield "Chance of the label", _changed(entry, "p_true", percent)
    if entry.get("case") is not None:
        yield "Case", _changed(entry, "case", str)
    if entry.get("ssim") is not None:
        yield "Similarity of maps", fixed(entry["ssim"])


# --- pieces ---------------------------------------------------------------------------------------


def _changed(entry: Mapping[str, Any], name: str, written: Callable[[Any], str]) -> str:
    later = entry.get(f"{name}_after")
    change = "" if later is None else f" \N{RIGHTWARDS ARROW} {written(later)}"
    return f"{written(entry[name])}{change}"


def read_pixels(path: Path) -> np.ndarray:
    """Return a kept picture, HWC uint8; raises RunError where it cannot be read."""
    from PIL import Image

    try:
        if path.exists() and not path.is_file():  # a pipe would block
            raise RunError(f"gallery picture {path.name} is no regular file")
        with Image.open(path, formats=("PNG",)) as picture:
            if picture.width * picture.height > LARGEST_PICTURE:
                raise RunError(
                    f"gallery picture {path.name} has {picture.width} x {picture.height} pixels, "
                    "more than any network takes; scan again"
                )
            return np.asarray(picture.convert("RGB"))
    except RunError:
        raise
    except Exception as error:  # Pillow raises of every kind
        raise RunError(f"gallery picture {path.name} cannot be read: {error}") from error


def _one_map(maps: np.ndarray, place: int) -> np.ndarray:
    if place >= len(maps):
        raise RunError(f"the gallery has an image {place} and only {len(maps)} maps; scan again")
    return np.asarray(maps[place])


def _pooled(heat: np.ndarray, cells: int) -> np.ndarray:
    """Return the map averaged down to at most so many cells a side."""
    for axis in (0, 1):
        size = heat.shape[axis]
        if size > cells:
            edges = np.arange(cells) * size // cells
            widths = np.diff([*edges, size])
            shape = (-1, 1) if axis == 0 else (1, -1)
            heat = np.add.reduceat(heat, edges, axis=axis) / widths.reshape(shape)
    return heat


def _png_uri(pixels: np.ndarray) -> str:
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}"


def data_uri(pixels: np.ndarray) -> str:
    """Return a picture, HWC uint8, as something a page shows without loading it."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}"


def _resized(heat: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    picture = Image.fromarray(np.asarray(heat, dtype=np.float32))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _colors(values: np.ndarray) -> np.ndarray:
    """Return the colors of values in [0, 1], RGB in [0, 1] along a new last axis."""
    return np.asarray(_color_map()(values))[..., :3]


@lru_cache(maxsize=1)
def _color_map() -> Any:
    import matplotlib

    return matplotlib.colormaps[COLOR_MAP]
