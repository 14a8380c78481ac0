"""Memory, disk, recomputation: the same bits, chosen by budget, and a disk cache that cleans up."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import repair.cli
import repair.crossing
import repair.layer
from audit.files import read_json, sha256_file
from audit.images import ImageFolder, load_pixels
from audit.networks import ModelCard, Network, Program, Split
from audit.runs import Run
from repair.cache import (
    CacheKind,
    DiskCache,
    DiskSpace,
    RecomputedPrefix,
    cross_tensors,
    default_disk_bytes,
)
from repair.config import RepairConfig, Saliency
from repair.layer import RepairRequest, repair_layer
from repair.training import train_layer

from ..audit import example_networks
from .conftest import DAMAGED, SIDE

MakeRun = Callable[..., Run]

KINDS: tuple[CacheKind, ...] = ("memory", "disk", "recompute")
GENEROUS = 2**40
QUICK = RepairConfig(epochs=2, learning_rate=0.02, loss="ce")


class Killed(BaseException):
    """What a killed process looks like from inside."""


@pytest.fixture
def residual(card: ModelCard) -> Network:
    """Batch norm, a residual, and a projection beside it: two tensors cross before `conv2`."""
    program = Program.capture(example_networks.network("residual"), (SIDE, SIDE))
    classes = tuple("abcde"[: example_networks.CLASSES])
    card = replace(card, arch=None, arch_args={}, classes=classes)
    return Network(program=program, card=card, source="test", sha256="0" * 64)


@pytest.fixture
def space(tmp_path: Path) -> DiskSpace:
    return DiskSpace(folder=tmp_path / "cache" / "train", budget_bytes=GENEROUS)


def layer_of(network: Network) -> str:
    return "conv2" if "conv2" in [layer.name for layer in network.program.layers] else DAMAGED


def cross(
    network: Network,
    folder: ImageFolder,
    space: DiskSpace | None,
    split: str = "train",
    *,
    layer: str | None = None,
    **more: Any,
) -> Any:
    return cross_tensors(
        network,
        network.program.split(layer or layer_of(network)),
        folder,
        folder.positions(split),  # type: ignore[arg-type]
        **{"budget_bytes": 0, "disk": space, **more},
    )


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse every write beyond `size`, as a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("name", "tensors"), [("network", 1), ("residual", 2)])
@pytest.mark.parametrize(
    ("loss", "batch_size", "saliency"),
    [("trust", 32, "gradcam"), ("ce", 20, "gradcam"), ("trust", 20, "guided-gradcam")],
)
def test_training_ends_with_the_same_bits_from_every_kind(
    request: pytest.FixtureRequest,
    folder: ImageFolder,
    tmp_path: Path,
    name: str,
    tensors: int,
    loss: str,
    batch_size: int,
    saliency: Saliency,
) -> None:
    network: Network = request.getfixturevalue(name)
    config = RepairConfig(
        epochs=2, learning_rate=0.02, loss=loss, batch_size=batch_size, saliency=saliency
    )
    trained = {}
    for kind in KINDS:
        spaces = (DiskSpace(folder=tmp_path / split, budget_bytes=0) for split in ("train", "val"))
        train, val = (
            cross(
                network,
                folder,
                space,
                split,
                kind=kind,
                batch_size=batch_size,
                beside=config.beside.get(split),
            )
            for split, space in zip(("train", "val"), spaces, strict=True)
        )
        assert (train.kind, val.kind, train.tensors) == (kind, kind, tensors)
        gates = train.batch(torch.arange(2)).gates
        assert (gates is not None) == (saliency == "guided-gradcam")
        split = network.program.split(layer_of(network))
        trained[kind] = train_layer(split, train, val, config, loss=loss)
    memory = trained["memory"]
    assert memory.steps == 2 * -(-len(folder.positions("train")) // batch_size)
    for kind in ("disk", "recompute"):
        for parameter, value in memory.parameters.items():
            assert torch.equal(trained[kind].parameters[parameter], value), (kind, parameter)
        for row, expected in zip(trained[kind].history, memory.history, strict=True):
            assert {**row, "seconds": 0} == {**expected, "seconds": 0}


def test_guided_training_from_gates_is_that_of_the_whole_network(
    network: Network, folder: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RepairConfig(epochs=2, learning_rate=0.02, loss="trust", saliency="guided-gradcam")
    split = network.program.split(DAMAGED)
    trained = []
    for without in (False, True):
        if without:
            monkeypatch.setattr(split, "guided_prefix", None)
        train, val = (
            cross(network, folder, None, name, layer=DAMAGED, budget_bytes=GENEROUS, beside="gates")
            for name in ("train", "val")
        )
        batch = train.batch(torch.arange(2))
        assert ((batch.images is None), (batch.gates is None)) == (not without, without)
        trained.append(train_layer(split, train, val, config, loss="trust"))
    gated, whole = trained
    for name, value in whole.parameters.items():
        assert not torch.equal(value, split.parameters[name])
        torch.testing.assert_close(gated.parameters[name], value, rtol=1e-4, atol=1e-5)


def test_the_files_hold_what_the_uncut_network_computes_there(
    residual: Network, folder: ImageFolder, space: DiskSpace
) -> None:
    images = cross(residual, folder, space)
    assert isinstance(images, DiskCache)
    positions = folder.positions("train")
    module = example_networks.network("residual")
    seen: dict[str, torch.Tensor] = {}
    for part in ("relu1", "down"):
        module.get_submodule(part).register_forward_hook(
            lambda module, given, output, part=part: seen.update({part: output.detach()})
        )
    pixels = load_pixels(folder, positions, residual.card.preprocessing).pixels
    with torch.no_grad():
        module((pixels / 255 - 0.5) / 0.25)
    files = sorted(space.folder.glob("*.bin"))
    stored = [np.fromfile(file, np.float32).reshape(len(positions), 8, 12, 12) for file in files]
    assert len(stored) == 2 and images.bytes == sum(values.nbytes for values in stored)
    entering = [seen["relu1"].numpy(), seen["down"].numpy()]
    for expected in entering:
        assert any(np.allclose(values, expected, atol=1e-5) for values in stored)
    rows = torch.tensor([5, 0, 77])
    for tensor, values in zip(images.batch(rows).crossing, stored, strict=True):
        assert np.array_equal(tensor.numpy(), values[rows.numpy()])
    labels = [folder.records[positions[row]].label for row in rows.tolist()]
    assert images.batch(rows).labels.tolist() == labels


def test_memory_then_disk_then_recomputation(
    residual: Network, folder: ImageFolder, tmp_path: Path
) -> None:
    needed = 4 * 2 * 8 * 12 * 12 * len(folder.positions("val"))

    def choice(memory: int, disk: int | None) -> tuple[str, int]:
        given = None if disk is None else DiskSpace(folder=tmp_path / "val", budget_bytes=disk)
        images = cross(residual, folder, given, "val", budget_bytes=memory)
        return images.kind, images.bytes

    assert choice(needed, needed) == ("memory", needed)
    assert choice(needed - 1, needed) == ("disk", needed)
    assert choice(needed - 1, needed - 1) == ("recompute", 0)
    assert choice(needed - 1, None) == ("recompute", 0)


def test_a_quarter_of_the_free_disk_is_the_budget(tmp_path: Path) -> None:
    system = os.statvfs(tmp_path)
    free = system.f_bavail * system.f_frsize
    assert default_disk_bytes(tmp_path) == pytest.approx(free / 4, rel=0.05)


def test_complete_files_are_taken_over_with_what_was_skipped(
    residual: Network, folder: ImageFolder, space: DiskSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = folder.positions("train")
    records = list(folder.records)
    records[wanted[1]] = replace(records[wanted[1]], path="not-there.png")
    damaged = replace(folder, records=tuple(records))
    calls: list[list[Any]] = [[], []]
    counts: list[list[int]] = [[], []]
    images = []
    for attempt in range(2):
        images.append(
            cross(
                residual,
                damaged,
                space,
                on_skip=lambda *skip, attempt=attempt: calls[attempt].append(skip),
                on_batch=counts[attempt].append,
            )
        )
        monkeypatch.setattr(Split, "prefix", None)  # nothing is computed the second time
    rows = torch.arange(len(wanted) - 1)
    assert calls[0] == calls[1] and [position for position, _ in calls[0]] == [wanted[1]]
    assert sum(counts[0]) == sum(counts[1]) == len(images[1]) == len(rows)
    first, second = (one.batch(rows) for one in images)
    assert first.positions.tolist() == [place for place in wanted if place != wanted[1]]
    for one, other in zip(first.crossing, second.crossing, strict=True):
        assert torch.equal(one, other)


def truncate(folder: Path) -> None:
    file = folder / "1.bin"
    file.write_bytes(file.read_bytes()[:-4])


@pytest.mark.parametrize(
    "harm",
    [
        truncate,
        lambda folder: (folder / "0.bin").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{}"),
        lambda folder: (folder / "manifest.json").write_text('{"fingerprint": '),
    ],
)
def test_incomplete_files_are_computed_again(
    residual: Network, folder: ImageFolder, space: DiskSpace, harm: Callable[[Path], object]
) -> None:
    rows = torch.arange(9)
    expected = cross(residual, folder, None, kind="memory").batch(rows).crossing
    cross(residual, folder, space)
    harm(space.folder)
    again = cross(residual, folder, space)
    assert again.kind == "disk"
    found = again.batch(rows).crossing
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("changed", ["model", "image", "layer", "preprocessing", "pass"])
def test_files_of_anything_else_are_not_taken_over(
    residual: Network, folder: ImageFolder, space: DiskSpace, changed: str
) -> None:
    def fingerprint(network: Network, images: ImageFolder, **more: Any) -> str:
        cross(network, images, space, **more)
        return str(read_json(space.folder / "manifest.json")["fingerprint"])

    before = fingerprint(residual, folder)
    assert fingerprint(residual, folder) == before
    match changed:
        case "model":
            after = fingerprint(replace(residual, sha256="1" * 64), folder)
        case "image":
            records = list(folder.records)
            place = folder.positions("train")[3]
            records[place] = replace(records[place], sha256="2" * 64)
            after = fingerprint(residual, replace(folder, records=tuple(records)))
        case "layer":
            # Tensors of equal shapes cross before both.
            before, after = (fingerprint(residual, folder, layer=one) for one in ("conv1", "down"))
        case "preprocessing":
            settings = replace(residual.card.preprocessing, mean=(0.4, 0.5, 0.5))
            card = replace(residual.card, preprocessing=settings)
            after = fingerprint(replace(residual, card=card), folder)
        case _:
            after = fingerprint(residual, folder, batch_size=50)
    assert after != before


@pytest.mark.parametrize("trouble", ["full while writing", "full before", "not writable"])
def test_a_disk_that_fails_leads_to_recomputation_and_nothing_is_left(
    residual: Network,
    folder: ImageFolder,
    space: DiskSpace,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    written = []
    if trouble == "full while writing":
        with largest_file(2 * 32 * 8 * 12 * 12 * 4):
            images = cross(residual, folder, space, on_batch=written.append)
        assert written, "the disk must have taken some of it"
        reason = "File too large"
    elif trouble == "full before":
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr("repair.cache.shutil.disk_usage", lambda path: usage)
        images = cross(residual, folder, space, on_batch=written.append)
        assert not written
        reason = "No space left on device"
    else:
        space.folder.parent.write_text("in the way")
        images = cross(residual, folder, space)
        reason = "Not a directory"
    assert isinstance(images, RecomputedPrefix)
    assert images.failure == reason
    assert not space.folder.exists()


def test_a_kill_while_filling_leaves_nothing(
    residual: Network, folder: ImageFolder, space: DiskSpace
) -> None:
    def kill(count: int) -> None:
        assert list(space.folder.iterdir())
        raise Killed

    with pytest.raises(Killed):
        cross(residual, folder, space, on_batch=kill)
    assert not space.folder.exists()


def test_a_repair_gives_the_same_network_from_every_kind_and_says_which(
    make_run: MakeRun, capfd: pytest.CaptureFixture[str]
) -> None:
    hashes = {}
    gib = {"memory": (1.0, 0.0), "disk": (0.0, 1.0), "recompute": (0.0, 0.0)}
    said = {
        "memory": "kept in memory for train, val, test (607.5 KiB)",
        "disk": "kept on disk until the repair is finished for train, val, test (607.5 KiB)",
        "recompute": "computed again for each batch for train, val, test (it exceeds the budgets; "
        "--cache-gib and --cache-disk-gib raise them)",
    }
    for kind, (memory, disk) in gib.items():
        request = RepairRequest(cache_gib=memory, cache_disk_gib=disk)
        repaired = repair_layer(make_run(), QUICK, request)
        cache = repaired.info["cache"]
        assert cache["kind"] == kind and set(cache["splits"].values()) == {kind}
        # 180 images, each 6 channels of 12 x 12 in single precision
        assert cache["bytes"] == (0 if kind == "recompute" else 180 * 6 * 12 * 12 * 4)
        line = f"what enters {DAMAGED} is {said[kind]}"
        assert capfd.readouterr().err.splitlines().count(line) == 1
        assert not (repaired.path / "cache").exists()
        hashes[kind] = sha256_file(repaired.weights)
    assert len(set(hashes.values())) == 1


def test_room_goes_to_the_training_images_first(make_run: MakeRun, folder: ImageFolder) -> None:
    image_bytes = 6 * 12 * 12 * 4
    counts = {split: len(folder.positions(split)) for split in ("train", "val", "test")}  # type: ignore[arg-type]
    memory = counts["val"] * image_bytes / 2**30
    disk = (counts["train"] + 1) * image_bytes / 2**30
    request = RepairRequest(cache_gib=memory, cache_disk_gib=disk)
    cache = repair_layer(make_run(), QUICK, request).info["cache"]
    assert cache["splits"] == {"train": "disk", "val": "memory", "test": "recompute"}
    assert cache["bytes"] == (counts["train"] + counts["val"]) * image_bytes


def test_a_killed_repair_keeps_its_kind_and_its_files(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = repair_layer(make_run(), QUICK, RepairRequest(cache_gib=1))

    def kill(*given: object, **more: object) -> None:
        raise Killed

    run = make_run()
    with monkeypatch.context() as patch:
        patch.setattr(repair.layer, "train_layer", kill)
        with pytest.raises(Killed):
            repair_layer(run, QUICK, RepairRequest(cache_gib=0, cache_disk_gib=1))
    begun = next(repair for repair in run.repairs if repair.status == "running")
    kept = {file: file.stat().st_mtime_ns for file in (begun.path / "cache").rglob("*.bin")}
    assert len(kept) == 3
    after: dict[Path, int] = {}
    predict = repair.layer.predict

    def look(*given: Any, **more: Any) -> Any:
        after.update({file: file.stat().st_mtime_ns for file in kept})
        return predict(*given, **more)

    monkeypatch.setattr(repair.layer, "predict", look)
    resumed = repair_layer(run, QUICK, RepairRequest(resume=True, cache_gib=1))
    assert resumed.path == begun.path and after == kept
    assert set(resumed.info["cache"]["splits"].values()) == {"disk"}
    assert sha256_file(resumed.weights) == sha256_file(undisturbed.weights)
    assert not (resumed.path / "cache").exists()


def test_a_kill_between_two_splits_does_not_change_the_choice(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    cross_one = repair.crossing.cross_tensors
    done: list[Any] = []

    def killing(*given: Any, **more: Any) -> Any:
        if done:
            raise Killed
        done.append(cross_one(*given, **more))
        return done[0]

    run = make_run()
    with monkeypatch.context() as patch:
        patch.setattr(repair.crossing, "cross_tensors", killing)
        with pytest.raises(Killed):
            repair_layer(run, QUICK, RepairRequest(cache_gib=0, cache_disk_gib=1))
    resumed = repair_layer(run, QUICK, RepairRequest(resume=True, cache_gib=1))
    expected = {"train": "disk", "val": "memory", "test": "memory"}
    assert resumed.info["cache"]["splits"] == expected


def test_a_repair_whose_disk_fails_says_so_in_one_line_and_finishes(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("repair.cache.shutil.disk_usage", lambda path: usage)
    finished = repair_layer(make_run(), QUICK, RepairRequest(cache_gib=0, cache_disk_gib=1))
    lines = [line for line in capfd.readouterr().err.splitlines() if "disk" in line]
    assert lines == [
        f"what enters {DAMAGED} is computed again for each batch for train, val, test "
        "(the disk cache failed: No space left on device)"
    ]
    assert finished.info["cache"]["kind"] == "recompute"
    assert not (finished.path / "cache").exists()


def test_the_command_takes_both_budgets(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    options = ["--loss", "ce", "--epochs", "1", "--cache-gib", "0", "--cache-disk-gib", "0.5"]
    monkeypatch.setattr(sys, "argv", ["repair", "layer", "--run", str(run.path), *options])
    with pytest.raises(SystemExit) as ended:
        repair.cli.main()
    assert not ended.value.code, capfd.readouterr().err
    assert run.repairs[0].info["cache"]["kind"] == "disk"
