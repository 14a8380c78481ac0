"""Turn one file into pixels, or say in one line why that cannot be done.

Only regular files are opened, only raster formats are tried (formats that run an interpreter, such
as EPS, are not), and the size in the header is checked before anything is decoded. What comes out
is always upright 8-bit RGB: EXIF rotation applied, 16-bit values divided by 257, transparency
composited on white, of an animation the first frame, CMYK converted without its color profile.
Preprocessing equals torchvision's Resize and CenterCrop on PIL images.
"""

import errno
import functools
import hashlib
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from audit.errors import ImageError
from audit.images.records import one_line

if TYPE_CHECKING:
    from audit.networks.card import Preprocessing

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "UnreadableImageError",
    "content_hash",
    "decode",
    "decode_mask",
    "preprocess",
    "preprocess_mask",
    "quiet_pillow",
    "upright_size",
]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 178_956_970  # where Pillow itself stops: twice a quarter of a gigabyte of RGB

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_UPRIGHT = {  # EXIF orientation -> the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(ImageError):
    """One file cannot be used; the message is the reason, in one line, without the path."""


def decode(path: Path) -> Image.Image:
    """Return the file's image, upright, 8-bit RGB.

    Raises:
        UnreadableImageError: Whatever is wrong with the file.
    """
    with _one_line_reasons(), _open_regular(path) as file:
        image = _open_header(file)
        image.load()
        return _as_rgb(_upright(image))


def decode_mask(path: Path) -> np.ndarray:
    """Return where the file's pixels are not zero, upright, bool (H, W).

    Of palette images the index counts, of images with transparency what is opaque and not black,
    of JPEG files what is brighter than half, since their black is not exactly zero.

    Raises:
        UnreadableImageError: Whatever is wrong with the file.
    """
    with _one_line_reasons(), _open_regular(path) as file:
        image = _open_header(file)
        floor = 127 if image.format == "JPEG" else 0
        image.load()
        if image.mode == "CMYK":
            image = image.convert("RGB")
        values = np.asarray(_upright(image))
        if values.ndim == 2:
            return np.asarray(values > floor)
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
            return np.asarray((values[..., :-1] > 0).any(axis=2) & (values[..., -1] > 0))
        return np.asarray((values > floor).any(axis=2))


def upright_size(path: Path) -> tuple[int, int]:
    """Return width and height of the file's upright image; no pixel is decoded.

    Raises:
        UnreadableImageError: Whatever is wrong with the file.
    """
    with _one_line_reasons(), _open_regular(path) as file:
        image = _open_header(file)
        width, height = image.size
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def preprocess(image: Image.Image, preprocessing: "Preprocessing") -> np.ndarray:
    """Return what the network sees of an RGB image, uint8 (3, h, w).

    The image is scaled, keeping its shape, until it just covers the input size divided by `crop`;
    the input size is then cut from its center. For square inputs this is "short side to round(size
    / crop), center crop".

    Raises:
        UnreadableImageError: If the image is so thin that the scaled one would exceed `MAX_PIXELS`.
    """
    image = _place(image, preprocessing, _RESAMPLING[preprocessing.interpolation])
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # (h, w, 3) -> (3, h, w)


def preprocess_mask(mask: np.ndarray, preprocessing: "Preprocessing") -> np.ndarray:
    """Return the share of each input pixel that a mask covers, float32 (h, w) in [0, 1].

    Scaled and cut like the photo in `preprocess`, by area.

    Args:
        mask: Bool (H, W), of the size of the upright photo.

    Raises:
        UnreadableImageError: As in `preprocess`.
    """
    covered = Image.fromarray(mask.astype(np.float32))
    placed = np.asarray(_place(covered, preprocessing, Image.Resampling.BOX), dtype=np.float32)
    return placed.clip(0, 1)  # the sum of a pixel's shares is rounded


def _place(
    image: Image.Image, preprocessing: "Preprocessing", resampling: Image.Resampling
) -> Image.Image:
    height, width = preprocessing.input_size
    cover_height = round(height / preprocessing.crop)
    cover_width = round(width / preprocessing.crop)
    if cover_height * image.width >= cover_width * image.height:
        size = (cover_height * image.width // image.height, cover_height)
    else:
        size = (cover_width, cover_width * image.height // image.width)
    if size[0] * size[1] > MAX_PIXELS:
        raise UnreadableImageError(
            f"too long and thin to scale: {image.width} x {image.height} pixels"
        )
    if size != image.size:
        image = image.resize(size, resampling)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return image.crop((left, top, left + width, top + height))


def content_hash(path: Path) -> str:
    """Return the SHA-256 of an image file; its header is checked, no pixel is decoded.

    Raises:
        UnreadableImageError: If the file is no image, empty, too large or cannot be read.
    """
    with _one_line_reasons(), _open_regular(path) as file:
        _open_header(file)  # first: a huge file that is no image is not read to its end
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings: what matters in them is checked here and becomes a reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a non-empty regular file; nothing else, since opening a pipe or device may block."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImageError(f"not a regular file but a {_kind(status.st_mode)}")
    if status.st_size == 0:
        raise UnreadableImageError("empty file (0 bytes)")
    with path.open("rb") as file:
        yield file


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open_header(file: BufferedReader) -> Image.Image:
    image = Image.open(file, formats=_formats())
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImageError(
            f"decompression bomb: {image.width} x {image.height} pixels, "
            f"at most {MAX_PIXELS} are read"
        )
    return image


def _upright(image: Image.Image) -> Image.Image:
    method = _UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) where it is not known."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (
        Exception
    ):  # a damaged EXIF block says nothing about the pixels; Pillow raises many kinds
        return 1
    return orientation if isinstance(orientation, int) else 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _gray_to_rgb(_from_16_bits(np.asarray(image)))
    if image.mode == "F":
        return _gray_to_rgb(_from_unit_floats(np.asarray(image)))
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        overlay = image.convert("RGBA")
        canvas = Image.new("RGBA", overlay.size, "white")
        return Image.alpha_composite(canvas, overlay).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(values: np.ndarray) -> np.ndarray:
    """Return 16-bit gray as 8-bit: 65535 = 255 * 257, so black and white stay what they are."""
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImageError(
            "32-bit integer pixels outside [0, 65535]: their scale is not known"
        )
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_unit_floats(values: np.ndarray) -> np.ndarray:
    if not (values.min() >= 0 and values.max() <= 1):  # also true for NaN
        raise UnreadableImageError("floating-point pixels outside [0, 1]: their scale is not known")
    scaled: np.ndarray = np.rint(values * 255).astype(np.uint8)
    return scaled


def _gray_to_rgb(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values).convert("RGB")


@contextmanager
def _one_line_reasons() -> Iterator[None]:
    """Turn whatever goes wrong while reading one file into an UnreadableImageError."""
    try:
        yield
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"not an image that can be read ({', '.join(_formats())})"
        ) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"decompression bomb: {one_line(str(error))}") from error
    except OSError as error:
        raise UnreadableImageError(_system_reason(error)) from error
    except MemoryError as error:
        raise UnreadableImageError("does not fit in memory") from error
    except (
        Exception
    ) as error:  # Pillow's decoders raise SyntaxError, ValueError, struct.error, KeyError, ...
        text = one_line(f"{type(error).__name__}: {error}")
        raise UnreadableImageError(f"damaged image ({text})") from error


def _system_reason(error: OSError) -> str:
    if (
        error.errno is None
    ):  # Pillow's own, such as "image file is truncated (12 bytes not processed)"
        return f"damaged image ({one_line(str(error))})"
    if error.errno == errno.ELOOP:
        return "symbolic link that leads to itself"
    if error.errno == errno.ENOENT:
        return "missing file or broken symbolic link"
    return f"cannot be read: {one_line(os.strerror(error.errno)).lower()}"


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFIFO: "named pipe",
        stat.S_IFSOCK: "socket",
        stat.S_IFCHR: "device",
        stat.S_IFBLK: "device",
        stat.S_IFDIR: "folder",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")
