"""Model cards: round trips, where they are found, and what a wrong one says."""

import string
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audit.errors import NetworkError
from audit.networks import imagenet
from audit.networks.card import ModelCard, Preprocessing, find_card, read_card, write_card

PREPROCESSING = Preprocessing(
    input_size=(48, 64),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.2, 0.1),
    interpolation="bicubic",
    crop=0.875,
)
CARD = ModelCard(
    arch="torchvision:vgg16",
    arch_args={"num_classes": 2, "dropout": 0.0},
    classes=("cat", "dog"),
    preprocessing=PREPROCESSING,
    provenance={"trained_by": "train.py"},
)

names = st.text(min_size=1, max_size=12).filter(str.strip)
keys = st.text(alphabet=string.ascii_letters + ' ."=[]\n\\é', min_size=1, max_size=8)
scalars = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
units = st.floats(0.001, 2)
cards = st.builds(
    ModelCard,
    arch=st.none() | names,
    arch_args=st.dictionaries(keys, values, max_size=4),
    classes=st.lists(names, unique=True, max_size=5),
    preprocessing=st.builds(
        Preprocessing,
        input_size=st.tuples(st.integers(1, 1024), st.integers(1, 1024)),
        mean=st.tuples(units, units, units),
        std=st.tuples(units, units, units),
        interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
        crop=st.floats(0.01, 1),
    ),
    provenance=st.dictionaries(keys, st.text(max_size=20), max_size=3),
)


@given(card=cards)
@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
def test_every_card_reads_back_equal(card: ModelCard, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("card") / "model.toml"
    write_card(card, path)
    assert read_card(path) == card


def test_names_with_quotes_newlines_and_any_script_survive(tmp_path: Path) -> None:
    classes = ('12" ruler', "it's", "back\\slash", "two\nlines", "tab\tbed", "猫", "\x7f\x00", "#")
    card = ModelCard(arch=None, classes=classes, preprocessing=PREPROCESSING)
    write_card(card, tmp_path / "model.toml")
    assert tomllib.loads((tmp_path / "model.toml").read_text("utf-8"))["classes"] == list(classes)


def test_own_card_wins_over_the_folders_card(tmp_path: Path) -> None:
    model = tmp_path / "photos.safetensors"
    assert find_card(model) is None
    (tmp_path / "MODEL.toml").touch()
    assert find_card(model) == tmp_path / "MODEL.toml"
    (tmp_path / "photos.toml").touch()
    assert find_card(model) == tmp_path / "photos.toml"


@pytest.mark.parametrize(
    ("line", "replacement", "expected"),
    [
        ("crop = 0.875", "crop = 0.0", "crop is 0.0; expected a number above 0 and at most 1"),
        ("crop = 0.875", "crop = true", "crop is True"),
        ("crop = 0.875", "", "[preprocessing] lacks crop"),
        ("mean = [0.5, 0.4, 0.3]", "mean = [0.5]", "mean is (0.5,); expected three numbers"),
        ("mean = [0.5, 0.4, 0.3]", "mean = [nan, 0.4, 0.3]", "mean is (nan,"),
        ("std = [0.2, 0.2, 0.1]", "std = [0.2, 0, 0.1]", "std is (0.2, 0, 0.1)"),
        ("input_size = [48, 64]", "input_size = 64", "input_size is 64"),
        ("input_size = [48, 64]", "input_size = [48, 64.5]", "input_size is (48, 64.5)"),
        ("input_size = [48, 64]", "input_size = [0, 64]", "input_size is (0, 64)"),
        ('"bicubic"', '"cubic"', "interpolation is 'cubic'; expected one of nearest, bilinear"),
        ('["cat", "dog"]', '["cat", "cat"]', "classes is 'cat'; expected a different name"),
        ('["cat", "dog"]', '["cat", 7]', "classes[1] is 7"),
        ('["cat", "dog"]', '"cat"', "classes is 'cat'; expected a list"),
        ('"torchvision:vgg16"', "16", "arch is 16"),
        ('"train.py"', "3", "provenance.trained_by is 3"),
        ("dropout = 0.0", "when = 2024-01-01", "arch_args.when is"),
        ("arch = ", "arhc = ", "unknown field 'arhc'; did you mean 'arch'?"),
        ("mean = ", "maen = ", "unknown field 'preprocessing.maen'; did you mean 'mean'?"),
        ("crop = 0.875", "crop = ", "is not valid TOML"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(
    tmp_path: Path, line: str, replacement: str, expected: str
) -> None:
    path = tmp_path / "model.toml"
    write_card(CARD, path)
    text = path.read_text("utf-8")
    assert line in text
    path.write_text(text.replace(line, replacement), "utf-8")
    with pytest.raises(NetworkError) as caught:
        read_card(path)
    message = str(caught.value)
    assert expected in message
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"\xff\xfe", b""])
def test_a_card_that_is_no_card_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.toml"
    path.write_bytes(content)
    with pytest.raises(NetworkError) as caught:
        read_card(path)
    assert "\n" not in str(caught.value)


def test_a_missing_card_is_named(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"no model card at .*gone\.toml"):
        read_card(tmp_path / "gone.toml")


def test_values_that_toml_cannot_hold_are_refused_by_name() -> None:
    with pytest.raises(NetworkError, match=r"arch_args\.drop is None"):
        ModelCard(arch="x", arch_args={"drop": None}, preprocessing=PREPROCESSING)


def test_imagenet_classes_are_those_of_the_published_networks() -> None:
    from audit.networks.torchvision_import import import_torchvision

    import_torchvision()
    from torchvision.models import ResNet18_Weights

    published = ResNet18_Weights.DEFAULT.meta["categories"]
    ours = imagenet.names()
    assert len(ours) == len(set(ours)) == len({name.casefold() for name in ours}) == 1000
    assert len(set(imagenet.synset_ids())) == 1000
    # torchvision numbers no repeats and shortens five names; every other name is the same.
    differing = [
        (mine, theirs)
        for mine, theirs in zip(ours, published, strict=True)
        if mine.partition(" (")[0] != theirs
    ]
    assert len(differing) <= 20, differing
    assert ours[134] == "crane (n02012849)"
    assert ours[517] == "crane (n03126707)"
    assert imagenet.lemmas()[0] == ("tench", "Tinca tinca")
