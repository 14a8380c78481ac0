"""Fuzzing: mutated models, images and run folders, and what became of each.

A case is a family, a kind of file and a seed. It is built in an empty folder, read as the commands
read it, and ends in one of five ways: `right` (what was read equals what an independent reader
reads), `line` (refused by one clear line), or the three that must not happen: `traceback`, `hang`
and `code run`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw

from audit import console
from audit.errors import LayermendError
from audit.networks import ModelCard, Network, Preprocessing, open_network, write_card
from audit.networks.small_vgg import ARCHITECTURE, SmallVGG
from tests.mutations import (
    HOSTILE_TEXTS,
    Canary,
    hostile_pickle,
    mutate_archive,
    mutate_bytes,
    mutate_json,
    mutate_toml,
)

Ending = Literal["right", "line", "traceback", "hang", "code run"]

HANG_S = 10.0  # of the processor, so that a busy machine is no hang
BLOCKED_S = 60.0  # of waiting, say for a pipe
CLASSES = ("disk", "square")
FORMATS = (
    "png",
    "jpg",
    "gif",
    "bmp",
    "tiff",
    "webp",
    "ppm",
    "jp2",
    "avif",
    "palette.png",
    "exif.jpg",
)
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
)

_ran: list[str] = []  # what a file's code did; filled by the audit hook while a case is read
_watching = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one case: `detail` is the line it was refused with, or what went wrong.

    `seconds` are those of the processor; of a case through the command line, those that passed.
    """

    family: str
    kind: str
    seed: int
    ending: Ending
    seconds: float
    detail: str = ""


class HangError(BaseException):
    """Raised into whatever still computes after `HANG_S`, or still waits after `BLOCKED_S`."""


class WrongError(Exception):
    """What was read is not what the file holds."""


def watch_for_code() -> None:
    """From here on, count what only a file's own code would do while a case is read."""

    def notice(event: str, arguments: tuple[Any, ...]) -> None:
        if _watching and event in _FORBIDDEN:
            _ran.append(f"{event} {str(arguments)[:80]}")

    sys.addaudithook(notice)


def observe(family: str, kind: str, seed: int, canary: Path, read: Callable[[], None]) -> Outcome:
    """Return how reading one case ended; `read` raises `WrongError` where it reads wrongly."""
    global _watching
    started_s, started_processor_s = time.monotonic(), time.process_time()
    ending: Ending = "right"
    detail = ""
    _ran.clear()
    _watching = True
    try:
        with _alarm(), contextlib.redirect_stderr(io.StringIO()):
            read()
    except HangError:
        ending, detail = "hang", "still running when the time was up"
    except LayermendError as error:
        ending, detail = "line", console.error_line(error)
        if not _is_one_clear_line(detail):
            ending = "traceback"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        place = _innermost(error)
        ending, detail = "traceback", f"{type(error).__name__}: {error} ({place})"[:400]
    finally:
        _watching = False
    seconds = time.process_time() - started_processor_s
    if seconds > HANG_S or time.monotonic() - started_s > BLOCKED_S:
        ending, detail = "hang", f"{seconds:.1f} s of the processor"
    if canary.exists() or _ran:
        ending, detail = "code run", "; ".join(_ran) or "the canary's folder is there"
        shutil.rmtree(canary, ignore_errors=True)
    return Outcome(
        family=family, kind=kind, seed=seed, ending=ending, seconds=seconds, detail=detail
    )


def _is_one_clear_line(line: str) -> bool:
    return line.isprintable() and 10 <= len(line) <= 2000 and "Traceback" not in line


def _innermost(error: BaseException) -> str:
    places = []
    traceback = error.__traceback__
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        if (
            f"{os.sep}audit{os.sep}" in name
            or f"{os.sep}repair{os.sep}" in name
            or "dashboard" in name
        ):
            places.append(f"{Path(name).name}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return " ".join(places[-3:])


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise HangError

    timers = {
        signal.SIGALRM: (signal.ITIMER_REAL, BLOCKED_S),
        signal.SIGPROF: (signal.ITIMER_PROF, HANG_S),
    }
    before = {number: signal.signal(number, ring) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


# ------------------------------------------------------------------------- models

MODEL_KINDS = (
    *("state.pt", "legacy.pt", "archive.pt", "pickle.pt", "tensors.pt", "state.safetensors"),
    *("header.safetensors", "program.pt2", "graph.pt2", "card.toml", "classes.txt"),
)


@dataclass(frozen=True)
class ModelSeeds:
    """A tiny network in every form that can be opened; bytes by file name."""

    files: dict[str, bytes]
    card: str
    state: dict[str, torch.Tensor]


def model_seeds(folder: Path) -> ModelSeeds:
    """Return the seeds; the files are made in an empty folder."""
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = SmallVGG(classes=len(CLASSES), widths=(2,), convolutions=(1,)).eval()
    state = module.state_dict()
    card = ModelCard(
        arch=ARCHITECTURE,
        arch_args={"classes": len(CLASSES), "widths": [2], "convolutions": [1]},
        classes=CLASSES,
        preprocessing=Preprocessing(
            input_size=(16, 16),
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            interpolation="bilinear",
            crop=1.0,
        ),
        provenance={"trained_by": "nobody"},
    )
    write_card(card, folder / "card.toml")
    torch.save(state, folder / "state.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "state.safetensors")
    dimension = torch.export.Dim("n")
    program = torch.export.export(
        module, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: dimension},)
    )
    torch.export.save(program, folder / "program.pt2")
    names = ("state.pt", "legacy.pt", "state.safetensors", "program.pt2")
    files = {name: (folder / name).read_bytes() for name in names}
    return ModelSeeds(files, (folder / "card.toml").read_text(), state)


def model_case(seeds: ModelSeeds, kind: str, seed: int, folder: Path) -> Outcome:
    """Build and open one mutated model."""
    rng = random.Random(f"{kind} {seed}")
    canary = folder / "canary"
    path, classes = _write_model(seeds, kind, rng, folder, canary)

    def read() -> None:
        network = open_network(str(path), classes=classes)
        _check_network(network, path)

    return observe("models", kind, seed, canary, read)


def _write_model(
    seeds: ModelSeeds, kind: str, rng: random.Random, folder: Path, canary: Path
) -> tuple[Path, Path | None]:
    suffix = {"card.toml": ".pt", "classes.txt": ".pt"}.get(kind, Path(kind).suffix)
    path, classes = folder / f"model{suffix}", None
    card = seeds.card.encode()
    match kind:
        case "archive.pt":
            data = mutate_archive(seeds.files["state.pt"], rng, canary)
        case "pickle.pt":
            data = hostile_pickle(rng, canary)
        case "tensors.pt":
            data = _saved(_mutated_state(seeds.state, rng, canary))
        case "header.safetensors":
            data = _mutated_header(seeds.files["state.safetensors"], rng)
        case "graph.pt2":
            data = mutate_archive(seeds.files["program.pt2"], rng, canary)
        case "card.toml":
            data, card = seeds.files["state.pt"], mutate_toml(seeds.card, rng)
        case "classes.txt":
            data, classes = seeds.files["state.pt"], folder / "classes.txt"
            text = rng.choice(
                (json.dumps(CLASSES), '{"0": "disk", "1": "square"}', "disk\nsquare\n")
            )
            as_json = text[0] in "[{" and rng.random() < 0.7
            classes.write_bytes(
                mutate_json(text, rng) if as_json else mutate_bytes(text.encode(), rng)
            )
        case _:
            data = mutate_bytes(seeds.files[kind], rng)
    path.write_bytes(data)
    path.with_suffix(".toml").write_bytes(card)
    return path, classes


def _saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _mutated_state(state: dict[str, torch.Tensor], rng: random.Random, canary: Path) -> Any:
    """Return a state dict of other names, shapes, types and values."""
    changed: dict[Any, Any] = {name: value.clone() for name, value in state.items()}
    name = rng.choice(list(changed))
    value = changed[name]
    match rng.randrange(12):
        case 0:
            value.view(-1)[rng.randrange(value.numel())] = rng.choice((np.nan, np.inf, -np.inf))
        case 1:
            changed[name] = torch.zeros(rng.choice(((), (0,), (1,) * 20, (7, 3), (2, 3, 3))))
        case 2:  # a view that claims far more than is stored
            changed[name] = torch.zeros(1).expand(
                rng.choice((10**5, 10**7)), rng.choice((3, 10**6))
            )
        case 3:
            types = (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64)
            changed[name] = value.to(rng.choice(types))
        case 4:
            changed[name] = rng.choice((None, 3, "text", [value], {"deep": value}, Canary(canary)))
        case 5:
            changed[rng.choice((*HOSTILE_TEXTS[:-1], 3, (1, 2), None))] = changed.pop(name)
        case 6:
            changed[name] = value.to_sparse()
        case 7:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated, and still in files
                changed[name] = torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)
        case 8:
            changed[name] = torch.empty(value.shape, device="meta")
        case 9:
            nested: Any = changed
            for _ in range(rng.choice((1, 3, 300))):
                nested = {rng.choice(("state_dict", "model")): nested}
            return nested
        case 10:
            cycle: dict[str, Any] = dict(changed)
            cycle["model"] = cycle
            return cycle
        case _:
            del changed[name]
    return changed


def _mutated_header(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + length].decode(), rng)
    claimed = len(header) if rng.random() < 0.9 else rng.choice((0, 2**40, 2**63))
    return claimed.to_bytes(8, "little") + header + data[8 + length :]


def _check_network(network: Network, path: Path) -> None:
    """Raise WrongError unless the network's tensors are those that an independent reader finds."""
    state = network.program.state
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise WrongError("weights that are not finite were let through")
    logits = network.program.logits(torch.zeros(2, 3, *network.program.input_size))
    if logits.shape != (2, len(network.card.classes)):
        raise WrongError(f"logits of shape {tuple(logits.shape)}")
    if path.suffix == ".pt2":
        return
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        stored = {name: torch.from_numpy(value) for name, value in load_file(path).items()}
    else:
        stored = torch.load(path, weights_only=True)
    while not all(isinstance(value, torch.Tensor) for value in stored.values()):
        stored = next(value for value in stored.values() if isinstance(value, dict))
    for name, value in stored.items():
        own = next((state[key] for key in state if name.endswith(key)), None)
        if own is None or not torch.allclose(own, value.to(own.dtype)):
            raise WrongError(f"{name} differs from what the file holds")


# ------------------------------------------------------------------------- images


def image_seeds() -> dict[str, bytes]:
    """Return one small photo in every format, bytes by suffix."""
    picture = Image.new("RGB", (40, 30), "navy")
    ImageDraw.Draw(picture).ellipse((8, 5, 30, 25), fill="orange")
    seeds = {}
    for kind in FORMATS:
        suffix = kind.rpartition(".")[2]
        form = {"jpg": "JPEG", "jp2": "JPEG2000"}.get(suffix, suffix.upper())
        shown, options = picture, {}
        if kind == "palette.png":
            shown = picture.convert("P")
            options = {"transparency": 0}
        if kind == "exif.jpg":
            exif = Image.Exif()
            exif[274] = 6
            options = {"exif": exif}
        buffer = io.BytesIO()
        shown.save(buffer, format=form, **options)
        seeds[kind] = buffer.getvalue()
    return seeds


IMAGE_KINDS = (*FORMATS, "special file", "mask", "coco.json")
_COCO = {
    "images": [{"id": 1, "file_name": "disk/good.png", "width": 40, "height": 30}],
    "categories": [{"id": 1, "name": "disk"}],
    "annotations": [
        {"image_id": 1, "category_id": 1, "bbox": [8, 5, 20, 20]},
        {"image_id": 1, "category_id": 1, "segmentation": [[8, 5, 30, 5, 30, 25]], "bbox": [1] * 4},
        {
            "image_id": 1,
            "category_id": 1,
            "segmentation": {"size": [30, 40], "counts": [600, 300, 300]},
        },
    ],
}
_PREPROCESSING = Preprocessing(
    input_size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop=1.0
)


def image_case(seeds: dict[str, bytes], kind: str, seed: int, folder: Path) -> Outcome:
    """Build a folder with one good photo and one mutated file; open it and load every pixel."""
    rng = random.Random(f"{kind} {seed}")
    photos = folder / "photos"
    for name in CLASSES:
        (photos / name).mkdir(parents=True)
    (photos / "disk" / "good.png").write_bytes(seeds["png"])
    if kind in ("mask", "coco.json"):
        return observe(
            "images", kind, seed, folder / "canary", _mask_reader(seeds, kind, rng, folder)
        )
    if kind == "special file":
        expected = _make_special_file(photos / "square", rng)
    else:
        expected = 1
        name = _file_name(rng, kind)
        (photos / "square" / name).write_bytes(mutate_bytes(seeds[kind], rng))

    def read() -> None:
        _check_folder(photos, expected)

    return observe("images", kind, seed, folder / "canary", read)


def _file_name(rng: random.Random, kind: str) -> str:
    hostile = (
        "new\nline",
        "\x1b[31mred\x1b[0m",
        "<img src=x onerror=alert(1)>",
        "[bold]x",
        "\udcff\udcfe",
        "a" * 200,
        "\u202ecod",
        "' or 1=1 --",
        "x",
        "x",
    )
    return f"{rng.choice(hostile)}.{kind}"


def _make_special_file(folder: Path, rng: random.Random) -> int:
    """Put something that is no photo there; return how many files are to be told of it."""
    match rng.randrange(9):
        case 0:
            os.mkfifo(folder / "pipe.png")
        case 1:
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
                here = Path.cwd()
                os.chdir(folder)  # addresses of sockets are short
                listening.bind("socket.png")
                os.chdir(here)
        case 2:
            (folder / "device.png").symlink_to("/dev/zero")
        case 3:
            (folder / "loop.png").symlink_to("loop.png")
        case 4:
            (folder / "up").symlink_to("..")
        case 5:
            (folder / "gone.png").symlink_to("/nowhere/at/all.png")
        case 6:
            (folder / "secret.png").symlink_to("/etc/passwd")
        case 7:
            deep = folder
            for _ in range(15):
                deep = deep / ("d" * 240)
                try:
                    deep.mkdir()
                except OSError:
                    break
            with contextlib.suppress(OSError):
                (deep / "deep.png").write_bytes(b"no image")
            return -1  # a path that is too long may not even be listed
        case _:
            (folder / "folder.png").mkdir()
            return 0
    return 1


def _check_folder(photos: Path, expected: int) -> None:
    """Raise WrongError unless the good photo is there and everything else is right or told."""
    from audit.images import load_pixels, open_image_folder
    from audit.images.decoding import upright_size

    folder = open_image_folder(photos, CLASSES)
    said: dict[int, str] = {}
    batch = load_pixels(
        folder, range(len(folder.records)), _PREPROCESSING, on_skip=said.__setitem__
    )
    told = [*folder.skipped]
    paths = [record.path for record in folder.records]
    # A file left as it was has the good photo's content, under another class: both are left out.
    same = any("same content" in skip.reason for skip in told)
    if not same and "disk/good.png" not in paths:
        raise WrongError("the good photo is gone")
    if len(batch.indices) + len(said) != len(paths):
        raise WrongError("an image was lost without a word")
    if expected >= 0 and len(paths) + len(told) != 1 + expected:
        raise WrongError(f"{len(paths)} images and {len(told)} left out of {1 + expected}")
    for text in (*(skip.reason for skip in told), *said.values()):
        if not text.isprintable() or not 5 <= len(text) <= 500:
            raise WrongError(f"a reason that is not one clear line: {text!r}")
    json.dumps([skip.path for skip in told] + paths).encode()
    for path in paths:
        "".join(path).encode("utf-8")
    if tuple(batch.pixels.shape[1:]) != (3, 16, 16) or batch.pixels.dtype != torch.uint8:
        raise WrongError(f"pixels {tuple(batch.pixels.shape)}, {batch.pixels.dtype}")
    for place in batch.indices.tolist():
        _check_size(photos / paths[place], upright_size(photos / paths[place]))


def _check_size(path: Path, size: tuple[int, int]) -> None:
    """Raise WrongError where Pillow's own upright image has another size."""
    from PIL import ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as image:
                image.load()
                upright = ImageOps.exif_transpose(image).size
        except Exception:  # Pillow without our care for damaged EXIF
            return
    if upright != size:
        raise WrongError(f"{size} pixels, {upright} by Pillow")


def _mask_reader(
    seeds: dict[str, bytes], kind: str, rng: random.Random, folder: Path
) -> Callable[[], None]:
    from audit.images import open_image_folder
    from audit.images.masks import object_mask, open_masks

    if kind == "mask":
        path = folder / "masks"
        (path / "disk").mkdir(parents=True)
        form = rng.choice(("png", "gif", "tiff", "palette.png"))
        suffix = form.rpartition(".")[2]
        (path / "disk" / f"good.{suffix}").write_bytes(mutate_bytes(seeds[form], rng))
    else:
        path = folder / "coco.json"
        path.write_bytes(mutate_json(json.dumps(_COCO), rng))

    def read() -> None:
        from audit.images.decoding import UnreadableImageError

        photos = open_image_folder(folder / "photos", CLASSES)
        masks = open_masks(path, photos)
        for record in photos.records:
            if record.path not in masks:
                continue
            with contextlib.suppress(UnreadableImageError):
                mask = object_mask(masks, record.path, _PREPROCESSING)
                if mask.shape != (16, 16) or not (mask.min() >= 0 and mask.max() <= 1):
                    raise WrongError(f"a mask of {mask.shape}, {mask.min()} to {mask.max()}")

    return read


# ------------------------------------------------------------------------- run folders

DASHBOARD_PAGES = ("overview", "layers", "cases", "images", "groups", "repair", "export")
RUN_KINDS = (
    *("report", "gate", "repair gate", "repair", "export"),
    *(f"dashboard {page}" for page in DASHBOARD_PAGES),
)
_RUN_FILES = (
    *("run.json", "run.json", "verdict.json", "groups.json", "images.parquet", "layers.parquet"),
    *("maps/index.json", "maps", "repair.json", "repair.json", "repair.images.parquet"),
    *("history.parquet", "onnx.json", "weights.toml", "weights.safetensors", "table", "special"),
)


def run_case(seed_run: Path, kind: str, seed: int, folder: Path) -> Outcome:
    """Copy a run, mutate one to three of its files, and read it as one of the commands does."""
    rng = random.Random(f"{kind} {seed}")
    run = folder / seed_run.name
    shutil.copytree(seed_run, run)
    canary = folder / "canary"
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _mutate_run(run, rng, canary)
    return observe("runs", kind, seed, canary, lambda: _READERS[kind](run))


def _mutate_run(run: Path, rng: random.Random, canary: Path) -> None:
    repair = next(iter((run / "repairs").iterdir()))
    chosen = rng.choice(_RUN_FILES)
    paths = {
        "repair.json": repair / "repair.json",
        "repair.images.parquet": repair / "images.parquet",
        "history.parquet": repair / "history.parquet",
        "onnx.json": repair / "onnx.json",
        "weights.toml": repair / "weights.toml",
        "weights.safetensors": repair / "weights.safetensors",
    }
    path = paths.get(chosen, run / chosen)
    if chosen == "maps":
        maps = sorted(p for p in run.rglob("*") if p.suffix in (".npz", ".png"))
        path = rng.choice(maps)
    if chosen == "table":
        _mutate_table(run, repair, rng)
        return
    if chosen == "special":
        _make_special_entry(run, repair, rng)
        return
    if not path.is_file():
        return
    if path.suffix == ".json":
        path.write_bytes(
            mutate_json(path.read_text(errors="replace"), rng) if _is_json(path) else b"{"
        )
    elif path.suffix == ".toml":
        path.write_bytes(mutate_toml(path.read_text(errors="replace") or "a = 1", rng))
    elif path.suffix == ".npz":
        _mutate_arrays(path, rng, canary)
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return True


def _mutate_table(run: Path, repair: Path, rng: random.Random) -> None:
    """Write a table whose columns have other types, values, names or lengths."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = rng.choice(
        [
            run / "images.parquet",
            run / "layers.parquet",
            repair / "images.parquet",
            repair / "history.parquet",
        ]
    )
    try:
        table = pq.read_table(path)
    except Exception:  # mutated before
        return
    column = rng.choice(table.column_names)
    place = table.column_names.index(column)
    rows = len(table)
    action = rng.randrange(7)
    values: list[Any] = [rng.choice(HOSTILE_TEXTS[:12]) for _ in range(rows)]
    if action == 0:
        table = table.drop([column])
    elif action == 1:
        table = table.slice(0, rng.choice((0, 1)))
    elif action == 2:
        kept = table.column(column).to_pylist()
        kept[rng.randrange(rows)] = None
        values = kept
    elif action == 3:
        values = [rng.choice((-1, 10**9, 2**31 - 1)) for _ in range(rows)]
    elif action == 4:
        values = [rng.choice((float("nan"), float("inf"), -1e300)) for _ in range(rows)]
    elif action == 5:
        values = [[1, 2]] * rows
    if action > 1:
        table = table.set_column(place, column, pa.array(values))
    pq.write_table(table, path)


def _mutate_arrays(path: Path, rng: random.Random, canary: Path) -> None:
    try:
        with np.load(path) as found:
            arrays = {name: found[name] for name in found.files}
    except Exception:  # mutated before
        return
    name = rng.choice(list(arrays))
    match rng.randrange(7):
        case 0:
            arrays[name] = np.array([Canary(canary)], dtype=object)
        case 1:
            arrays[name] = arrays[name][:1]
        case 2:
            arrays[name] = np.full_like(arrays[name], np.nan)
        case 3:
            arrays[name] = np.zeros((2, 2, 2, 2, 2))
        case 4:
            arrays[name] = np.array(["text"])
        case 5:
            arrays = {"other": arrays[name]}
        case _:
            path.write_bytes(mutate_bytes(path.read_bytes(), rng))
            return
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _make_special_entry(run: Path, repair: Path, rng: random.Random) -> None:
    """Replace a file of the run by a pipe, a folder, a link out of the run or to itself."""
    names = ("run.json", "verdict.json", "groups.json", "images.parquet", "maps/index.json")
    path = rng.choice(
        [*(run / name for name in names), repair / "repair.json", repair / "onnx.json"]
    )
    if not path.is_file():
        return
    path.unlink()
    match rng.randrange(5):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(path.name)
        case 3:
            path.symlink_to("/dev/zero")
        case _:
            path.symlink_to("/etc/passwd")


def _read_report(run: Path) -> None:
    from audit.report import write_report
    from audit.runs import open_run

    page = write_report(open_run(run), run.parent / "report.html").read_text(encoding="utf-8")
    if "</html>" not in page or "<script>alert" in page:
        raise WrongError("a report that is cut off, or holds a file's markup")


def _gate_reader(repair: bool) -> Callable[[Path], None]:
    def read(run: Path) -> None:
        from audit.files import json_text
        from audit.gate import GateConfig, Limits, gate
        from audit.runs import open_run
        from audit.summary import gate_failures, gate_summary

        further = {} if repair else {"max_case3": 1.0, "max_flagged": 0, "max_groups": 3}
        limits = Limits(min_accuracy=0.1, max_cross_entropy=9.0, min_worst_class=0.0, **further)
        result = gate(open_run(run), GateConfig(limits=limits, repair=repair))
        printed = io.StringIO()
        console.Console(file=printed, width=120).print(gate_summary(result))
        gate_failures(result)
        json.loads(json_text(result.as_dict()))
        for one in result.outcomes:
            if not isinstance(one.judged, int | float) or isinstance(one.judged, bool):
                raise WrongError(f"{one.option} was judged by {one.judged!r}")
            if one.kind == "share" and not 0 <= one.judged <= 1:
                raise WrongError(f"{one.option} is a share and {one.judged!r}")

    return read


def _read_for_repair(run: Path) -> None:
    from audit.runs import open_run
    from repair.material import RepairImages
    from repair.sources import open_scanned_network

    opened = open_run(run)
    network = open_scanned_network(opened)
    network.layer(str(opened.layers["name"].iloc[0]))
    images = RepairImages.open(opened, network)
    for record in images.folder.records:
        if record.split not in ("train", "val", "test"):
            raise WrongError(f"an image in the split {record.split!r}")
        if not 0 <= record.label < len(network.card.classes):
            raise WrongError(f"an image of the class {record.label}")


def _read_for_export(run: Path) -> None:
    from audit.runs import open_run

    for repair in open_run(run).repairs:
        _ = repair.layer, repair.decision, repair.onnx, repair.images, repair.history
        open_network(str(repair.weights))


def _page_reader(page: str) -> Callable[[Path], None]:
    """Return what shows a page in Streamlit's own test harness, exceptions included."""

    def read(run: Path) -> None:
        from streamlit.testing.v1 import AppTest

        from dashboard import cli

        os.environ[cli.RUNS_VARIABLE] = str(run)
        app = AppTest.from_file(str(cli.APP), default_timeout=BLOCKED_S).run()
        if page != "overview":
            app = app.switch_page(f"views/{page}.py").run()
        for shown in app.exception:
            raise WrongError(f"{shown.message} {shown.stack_trace[-4:]}")

    return read


def run_seed(folder: Path) -> Path:
    """Return a run with an exported repair, made by the commands' own code from tiny photos."""
    from audit.runs import open_run
    from audit.scan import ScanConfig, ScanRequest, scan_model
    from repair.config import RepairConfig
    from repair.export import ExportRequest, export_network
    from repair.layer import RepairRequest, repair_layer

    models = folder / "models"
    models.mkdir()
    seeds = model_seeds(models)
    (models / "state.toml").write_text(seeds.card)
    _draw_photos(folder / "photos")
    request = ScanRequest(
        model=str(models / "state.pt"),
        data=folder / "photos",
        out=folder / "runs",
        command=("audit",),
    )
    run = scan_model(request, ScanConfig())
    repair = repair_layer(
        run,
        RepairConfig(epochs=1, controls=("ce",)),
        RepairRequest(layer=run.layers["name"][0], command=("repair",)),
    )
    export_network(open_run(run.path), ExportRequest())
    if repair.decision != "accepted":  # which a gate on repairs asks for
        repair.write_info(decision="accepted")
    return run.path


def _draw_photos(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(0, 200, size=(20, 20, 3), dtype=np.uint8)
            pixels[5:15, 5:15, label] = 255
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")


_READERS: dict[str, Callable[[Path], None]] = {
    "report": _read_report,
    "gate": _gate_reader(repair=False),
    "repair gate": _gate_reader(repair=True),
    "repair": _read_for_repair,
    "export": _read_for_export,
    **{f"dashboard {page}": _page_reader(page) for page in DASHBOARD_PAGES},
}
