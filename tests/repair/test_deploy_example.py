"""The example that deploys a model runs where there is no PyTorch, in an environment of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from audit.images import ImageFolder, load_pixels
from audit.networks import Network
from audit.runs import RepairFolder
from repair.export import Exported

from .conftest import CLASSES

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


def test_the_example_gives_the_classes_of_pytorch_there(
    python: Path,
    served: tuple[RepairFolder, Exported],
    folder: ImageFolder,
    network: Network,
    tmp_path: Path,
) -> None:
    repaired, exported = served
    chosen = folder.positions("test")[::6]
    photos = [folder.root / folder.records[i].path for i in chosen]
    # A photograph of another size is scaled and cut as ours are.
    wide = tmp_path / "wide.png"
    Image.open(photos[0]).resize((75, 61)).save(wide)
    ended = run(python, "-I", EXAMPLE, exported.model, *photos, wide)
    assert ended.returncode == 0, ended.stderr
    lines = [line.split("\t") for line in ended.stdout.splitlines()]
    pixels = load_pixels(folder, chosen, network.card.preprocessing)
    after = network.with_state(load_file(repaired.weights))
    expected = after.program.logits(after.normalize(pixels.pixels)).softmax(1)
    assert [name for _, name, _ in lines[:-1]] == [
        CLASSES[i] for i in expected.argmax(dim=1).tolist()
    ]
    given = np.array([float(score) for *_, score in lines[:-1]])
    np.testing.assert_allclose(given, expected.detach().amax(1).numpy(), atol=1e-4)


def test_the_example_prepares_photographs_as_the_proof_did(
    network: Network, tmp_path: Path
) -> None:
    from audit.images.decoding import decode, preprocess

    source = EXAMPLE.read_text(encoding="utf-8")
    body = source[source.index("    photo =") : source.index("    scores =")]
    for size in ((75, 61), (24, 100), (31, 24)):
        path = tmp_path / f"{size[0]}x{size[1]}.png"
        noise = np.random.default_rng(0).integers(0, 256, size=(*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        settings = network.card.preprocessing
        scope: dict[str, object] = {}
        code = (
            "import numpy as np\nfrom PIL import Image, ImageOps\n"
            f"settings, crop = {{'interpolation': {settings.interpolation!r}}}, {settings.crop}\n"
            f"(height, width), path = {settings.input_size}, {str(path)!r}\nif True:\n{body}"
        )
        exec(code, scope)
        expected = preprocess(decode(path), settings).transpose(1, 2, 0)
        np.testing.assert_array_equal(scope["pixels"], expected)
