"""Models that would never end, or take all memory, are refused quickly and in one line."""

from __future__ import annotations

import contextlib
import io
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from audit.errors import NetworkError
from audit.networks import ModelCard, Preprocessing, open_network, write_card
from audit.networks.bombs import check_compression, check_unfolding, limited_building
from audit.networks.small_vgg import ARCHITECTURE, SmallVGG

PREPROCESSING = Preprocessing(
    input_size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop=1.0
)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return SmallVGG(classes=2, widths=(2,), convolutions=(1,)).state_dict()


def saved(content: Any, folder: Path, **arguments: Any) -> Path:
    """Write a checkpoint with a card that fits a small network, but for the arguments."""
    torch.save(content, folder / "model.pt")
    arch_args = {"classes": 2, "widths": [2], "convolutions": [1], **arguments}
    card = ModelCard(arch=ARCHITECTURE, arch_args=arch_args, preprocessing=PREPROCESSING)
    write_card(card, folder / "model.toml")
    return folder / "model.pt"


def refused(path: Path) -> str:
    started_s = time.monotonic()
    with pytest.raises(NetworkError) as caught:
        open_network(str(path))
    assert time.monotonic() - started_s < 10
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_checkpoint_itself_opens(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert open_network(str(saved(state, tmp_path))).program.classes == 2


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = saved(state, tmp_path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data/99", bytes(100_000_000))
    told = refused(path)
    assert "unpacks to 100,0" in told and "a decompression bomb" in told
    path.rename(tmp_path / "model.pt2")
    assert "a decompression bomb" in refused(tmp_path / "model.pt2")


@pytest.mark.parametrize("name", ["/etc/cron.d/x", "../../x", "model/../../x"])
def test_members_with_paths_of_their_own_are_written_nowhere(
    state: dict[str, torch.Tensor], tmp_path: Path, name: str
) -> None:
    path = saved(state, tmp_path)
    before = sorted(tmp_path.parent.rglob("*"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")
    with contextlib.suppress(NetworkError):  # torch wants all members in one folder
        open_network(str(path))
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_an_ordinary_archive_is_no_bomb(tmp_path: Path) -> None:
    torch.save({"zeros": torch.zeros(3_000_000)}, tmp_path / "model.pt")
    check_compression(tmp_path / "model.pt")
    check_compression(Path(__file__))


def laughing_key(levels: int) -> bytes:
    """Return the pickle of {((("ha",), ("ha",)), ...): 1}, a dict whose key has 2^levels ends."""
    doubled = b"".join(b"q%ch%c\x86" % (level, level) for level in range(levels))
    return b"\x80\x02}X\x02\x00\x00\x00ha\x85" + doubled + b"K\x01s."


def test_a_pickle_that_never_ends_is_refused_before_it_begins(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = saved(state, tmp_path)
    parts = {}
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, laughing_key(60) if name.endswith("data.pkl") else content)
    assert "unfold into more than 1,000,000 values" in refused(path)
    path.write_bytes(laughing_key(60))
    assert "unfold into more than 1,000,000 values" in refused(path)


def test_what_a_state_dict_holds_does_not_unfold(tmp_path: Path) -> None:
    network = nn.Sequential(*(nn.Linear(3, 3) for _ in range(200)))
    optimizer = torch.optim.Adam(network.parameters())
    content = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "losses": [0.1]}
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        check_unfolding(buffer.getvalue(), tmp_path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(1).expand(10**7, 10**6), "a tensor of 10,000,000,000,000 numbers in 4 bytes"),
        (torch.eye(2).to_sparse(), "a sparse tensor"),
        (torch.zeros(2, dtype=torch.complex64), "a tensor of complex numbers"),
        (torch.empty(2, device="meta"), "a tensor on the device 'meta', without values"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(
    state: dict[str, torch.Tensor], tmp_path: Path, value: torch.Tensor, expected: str
) -> None:
    told = refused(saved({**state, "predictions.bias": value}, tmp_path))
    assert f"holds 'predictions.bias', {expected}" in told


def test_wrappers_without_end_are_no_state_dict(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    endless: dict[str, Any] = dict(state)
    endless["model"] = endless
    assert "expected a state dict" in refused(saved(endless, tmp_path))


def test_names_that_are_no_texts_are_not_written_out(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    assert "a name of type tuple" in refused(saved({(1, 2): torch.zeros(1)}, tmp_path))
    assert len(refused(saved({"x" * 10**6: torch.zeros(1)}, tmp_path))) < 1000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"widths": [200_000] * 2, "convolutions": [1, 1]}, "cannot be built with the arguments"),
        ({"widths": [9_000] * 2, "convolutions": [1, 1]}, "would have more than"),
        ({"convolutions": [10**9]}, "would have more than 10,000 modules"),
        ({"classes": 10**9}, "would have more than"),
    ],
)
def test_a_card_that_asks_for_a_network_beyond_all_bounds_is_refused(
    state: dict[str, torch.Tensor], tmp_path: Path, arguments: dict[str, Any], expected: str
) -> None:
    assert expected in refused(saved(state, tmp_path, **arguments))


def test_other_networks_may_be_of_any_size_again_afterwards() -> None:
    with pytest.raises(NetworkError), limited_building(0, "it"):
        nn.Linear(20_000, 20_000, device="meta")
    nn.Linear(20_000, 20_000, device="meta")


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "1" * 5000])
def test_a_card_that_never_ends_is_refused(
    state: dict[str, torch.Tensor], tmp_path: Path, text: str
) -> None:
    path = saved(state, tmp_path)
    path.with_suffix(".toml").write_text(text)
    assert "is not valid TOML" in refused(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '["' + "a" * 10, "[" + "1" * 5000 + "]"])
def test_class_names_that_never_end_are_refused(
    state: dict[str, torch.Tensor], tmp_path: Path, text: str
) -> None:
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(NetworkError, match="is not valid JSON"):
        open_network(str(saved(state, tmp_path)), classes=tmp_path / "names.json")


@pytest.mark.parametrize("field", ["crop", "std"])
def test_a_number_too_large_for_a_float_is_named(
    state: dict[str, torch.Tensor], tmp_path: Path, field: str
) -> None:
    path = saved(state, tmp_path)
    lines = path.with_suffix(".toml").read_text().splitlines()
    changed = [
        f"{field} = 1{'0' * 400}" if line.startswith(f"{field} = ") else line for line in lines
    ]
    path.with_suffix(".toml").write_text("\n".join(changed))
    assert f"{field} is 1000" in refused(path)


def test_an_archive_with_a_member_of_no_valid_name_is_damaged(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = saved(state, tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/\N{LATIN SMALL LETTER E WITH ACUTE}", b"x")
    path.write_bytes(
        path.read_bytes().replace("\N{LATIN SMALL LETTER E WITH ACUTE}".encode(), b"\xf4x")
    )
    assert "is no readable torch file" in refused(path)
