"""Every kind of file becomes upright 8-bit RGB, or a reason in one line."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from audit.images import decoding
from audit.images.decoding import UnreadableImageError, content_hash, decode, preprocess
from audit.networks.card import Preprocessing
from audit.networks.torchvision_import import import_torchvision

Photo = Callable[..., Image.Image]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_an_rgb_file_keeps_its_pixels(tmp_path: Path, photo: Photo) -> None:
    photo().save(tmp_path / "a.png")
    assert np.array_equal(decode(tmp_path / "a.png"), photo())


def test_gray_becomes_three_equal_channels(tmp_path: Path, photo: Photo) -> None:
    gray = photo().convert("L")
    gray.save(tmp_path / "a.png")
    assert np.array_equal(decode(tmp_path / "a.png"), np.stack([np.asarray(gray)] * 3, axis=2))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, 24 * 16).astype(np.uint16).reshape(16, 24)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(values).save(path)
    with Image.open(path) as image:
        assert image.mode.startswith("I;16")
    expected = np.rint(values / 257)
    assert np.array_equal(pixels(decode(path)), np.stack([expected] * 3, axis=2))


def test_big_endian_16_bit_gray_reads_the_same(tmp_path: Path) -> None:
    values = (np.arange(24 * 16) * 170).astype(">u2").reshape(16, 24)
    image = Image.frombytes("I;16B", (24, 16), values.tobytes())
    image.save(tmp_path / "a.tif")
    assert np.array_equal(pixels(decode(tmp_path / "a.tif"))[..., 0], np.rint(values / 257))


def test_16_bit_color_is_scaled_to_within_one(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 4 * 4 * 3).astype(">u2").reshape(4, 4, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(png(4, 4, bits=16, color=2, data=zlib.compress(rows)))
    assert np.abs(pixels(decode(tmp_path / "a.png")) - values / 257).max() <= 1


def test_32_bit_pixels_of_unknown_scale_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "i.tif")
    Image.fromarray(np.array([[0.0, 300.0]], dtype=np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32)).save(tmp_path / "n.tif")
    for name in ("i.tif", "f.tif", "n.tif"):
        with pytest.raises(UnreadableImageError, match="scale is not known"):
            decode(tmp_path / name)


def test_floating_point_between_0_and_1_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "a.tif")
    assert pixels(decode(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 128, 255]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(pixels(decode(tmp_path / "a.jpg")) - (255, 0, 0)).max() <= 2


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    overlay = np.zeros((4, 4, 4), dtype=np.uint8)
    overlay[:2] = (200, 0, 0, 255)
    overlay[2] = (200, 0, 0, 51)
    Image.fromarray(overlay).save(tmp_path / "a.png")
    result = pixels(decode(tmp_path / "a.png"))
    assert (result[:2] == (200, 0, 0)).all()
    assert np.abs(result[2] - (0.2 * 200 + 0.8 * 255, 204, 204)).max() <= 1
    assert (result[3] == 255).all()


def test_the_transparent_entry_of_a_palette_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "transparent.png", transparency=0)
    image.save(tmp_path / "partly.png", transparency=bytes([0, 255]))
    assert pixels(decode(tmp_path / "plain.png"))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    for name in ("transparent.png", "partly.png"):
        assert pixels(decode(tmp_path / name))[0].tolist() == [[255] * 3, [40, 50, 60]]


def test_gray_with_alpha_and_keyed_colors_become_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[9, 255], [9, 0]]], dtype=np.uint8), mode=None).save(
        tmp_path / "la.png"
    )
    Image.fromarray(np.array([[9, 5]], dtype=np.uint8)).save(tmp_path / "l.png", transparency=5)
    for name in ("la.png", "l.png"):
        assert pixels(decode(tmp_path / name))[0].tolist() == [[9] * 3, [255] * 3]


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
        (99, lambda a: a),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_orientation_is_undone(
    tmp_path: Path,
    photo: Photo,
    orientation: int,
    undo: Callable[[np.ndarray], np.ndarray],
    suffix: str,
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo().save(tmp_path / f"a.{suffix}", exif=exif)
    assert np.array_equal(decode(tmp_path / f"a.{suffix}"), undo(np.asarray(photo())))


def test_damaged_exif_does_not_cost_the_image(tmp_path: Path, photo: Photo) -> None:
    photo().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 9)
    with decoding.quiet_pillow():
        assert decode(tmp_path / "a.jpg").size == photo().size


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(decode(tmp_path / "a.gif")) == (255, 0, 0)).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp"])
def test_truncated_files_pass_the_header_check_and_fail_at_decoding(
    tmp_path: Path, photo: Photo, suffix: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    photo(size=(200, 200)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with decoding.quiet_pillow(), pytest.raises(UnreadableImageError) as raised:
        content_hash(path)  # some formats notice already here
        decode(path)
    assert str(raised.value).isprintable()


def test_empty_and_foreign_files_have_a_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for read in (content_hash, decode):
        with pytest.raises(UnreadableImageError, match=r"^empty file \(0 bytes\)$"):
            read(tmp_path / "empty.jpg")
        for name in ("text.jpg", "script.eps"):
            with pytest.raises(UnreadableImageError, match=r"^not an image that can be read"):
                read(tmp_path / name)
        with pytest.raises(UnreadableImageError, match=r"^missing file or broken symbolic link$"):
            read(tmp_path / "missing.jpg")


def test_a_pipe_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImageError, match="named pipe"):  # opening it would hang
        content_hash(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImageError, match="device"):
        decode(Path("/dev/zero"))


@pytest.mark.parametrize("side", [14_000, 30_000])
def test_a_decompression_bomb_is_recognized_by_its_header(tmp_path: Path, side: int) -> None:
    bomb = png(side, side, bits=8, color=2, data=zlib.compress(b"\0" * 100))
    (tmp_path / "bomb.png").write_bytes(bomb)
    with decoding.quiet_pillow():
        for read in (content_hash, decode):
            with pytest.raises(UnreadableImageError, match="decompression bomb"):
                read(tmp_path / "bomb.png")


def test_the_size_limit_holds_where_pillow_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(png(14_000, 14_000, bits=8, color=2, data=b""))
    with pytest.raises(UnreadableImageError, match="bomb: 14000 x 14000 pixels, at most 178956970"):
        content_hash(tmp_path / "bomb.png")


def test_an_error_while_reading_is_a_reason(
    tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo().save(tmp_path / "a.png")

    def denied(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UnreadableImageError, match=r"^cannot be read: permission denied$"):
        content_hash(tmp_path / "a.png")


def card(height: int, width: int, crop: float, interpolation: str = "bicubic") -> Preprocessing:
    return Preprocessing(
        input_size=(height, width),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation=interpolation,
        crop=crop,
    )


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(180, 180), (37, 501), (307, 200), (96, 96), (20, 33)])
@pytest.mark.parametrize(("side", "crop"), [(96, 0.875), (64, 1.0), (33, 0.9)])
def test_preprocessing_equals_torchvision(
    photo: Photo, interpolation: str, size: tuple[int, int], side: int, crop: float
) -> None:
    import_torchvision()
    from torchvision.transforms import v2

    image = photo(seed=1, size=size)
    mode = getattr(v2.InterpolationMode, interpolation.upper())
    transform = v2.Compose(
        [v2.Resize(round(side / crop), interpolation=mode), v2.CenterCrop(side), v2.PILToTensor()]
    )
    ours = preprocess(image, card(side, side, crop, interpolation))
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, transform(image).numpy())


@pytest.mark.parametrize("size", [(180, 180), (40, 300), (300, 40)])
def test_other_input_shapes_are_covered_and_cut_from_the_center(
    photo: Photo, size: tuple[int, int]
) -> None:
    image = photo(seed=1, size=size)
    ours = preprocess(image, card(48, 96, 1.0))
    scale = max(48 / size[1], 96 / size[0])
    scaled = image.resize((int(size[0] * scale), int(size[1] * scale)), Image.Resampling.BICUBIC)
    left, top = round((scaled.width - 96) / 2), round((scaled.height - 48) / 2)
    expected = np.asarray(scaled)[top : top + 48, left : left + 96]
    assert np.array_equal(ours, expected.transpose(2, 0, 1))


def test_an_endless_strip_is_refused_rather_than_scaled() -> None:
    with pytest.raises(UnreadableImageError, match=r"too long and thin to scale: 1 x 60000 pixels"):
        preprocess(Image.new("RGB", (1, 60_000)), card(224, 224, 0.875))


def png(width: int, height: int, *, bits: int, color: int, data: bytes) -> bytes:
    """Return a PNG file written by hand."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
