"""The example that deploys a model runs where there is no PyTorch, in an environment of its own."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file

from audit.images import ImageFolder
from audit.images.decoding import decode, preprocess
from audit.networks import Network

from .conftest import CLASSES, PhotoModel

EXAMPLE = Path(__file__).parents[2] / "examples" / "deploy.py"
# What the example imports, and the folders of libraries that wheels keep beside their packages.
PACKAGES = ("numpy", "numpy.libs", "PIL", "pillow.libs", "onnxruntime")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees onnxruntime, numpy and Pillow, and nothing else."""
    root = tmp_path_factory.mktemp("environment")
    made = [sys.executable, "-m", "venv", "--without-pip", root / "venv"]
    subprocess.run(made, check=True)
    packages = root / "packages"
    packages.mkdir()
    for name in PACKAGES:
        spec = importlib.util.find_spec(name.removesuffix(".libs").replace("pillow", "PIL"))
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent.parent / name
        if folder.is_dir():
            (packages / name).symlink_to(folder, target_is_directory=True)
    (site,) = (root / "venv").glob("lib/python*/site-packages")
    (site / "deploy.pth").write_text(f"{packages}\n", encoding="utf-8")
    return root / "venv" / "bin" / "python"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )


def test_pytorch_cannot_be_imported_there(python: Path) -> None:
    for package in ("torch", "onnx", "audit", "repair"):
        ended = run(python, "-I", "-c", f"import {package}")
        assert ended.returncode == 1 and f"No module named '{package}'" in ended.stderr


def test_the_example_has_ten_lines() -> None:
    (docstring, *body) = ast.parse(EXAMPLE.read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()[body[0].lineno - 1 :]
    assert len([line for line in lines if line.strip()]) <= 10
    assert ";" not in "".join(lines)


def test_the_example_gives_the_classes_of_pytorch_there(
    python: Path, photo_model: PhotoModel, folder: ImageFolder, network: Network, tmp_path: Path
) -> None:
    repaired, exported = photo_model
    photos = [folder.root / folder.records[i].path for i in folder.positions("test")[::6]]
    # Photographs of other sizes are scaled and cut as ours are; one lies on its side.
    for number, size in enumerate([(75, 61), (24, 100), (61, 160), (31, 24)]):
        path = tmp_path / f"{number}.png"
        Image.open(photos[number]).resize(size).save(path)
        photos.append(path)
    turned, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(photos[0]).resize((90, 50)).save(turned, exif=exif)
    photos.append(turned)

    ended = run(python, "-I", EXAMPLE, exported.model, *photos)
    assert ended.returncode == 0, ended.stderr
    lines = [line.split("\t") for line in ended.stdout.splitlines()]
    assert [path for path, *_ in lines] == [str(path) for path in photos]
    settings = network.card.preprocessing
    seen = np.stack([preprocess(decode(path), settings) for path in photos])
    after = network.with_state(load_file(repaired.weights))
    expected = after.program.logits(after.normalize(torch.from_numpy(seen))).softmax(1)
    assert [name for _, name, _ in lines] == [CLASSES[i] for i in expected.argmax(dim=1).tolist()]
    given = np.array([float(score) for *_, score in lines])
    np.testing.assert_allclose(given, expected.detach().amax(1).numpy(), atol=1e-4)
