"""torchvision imports beside the installed torch, whichever build that is.

Each test has a child process of its own: what is imported here is imported for good.
"""

import subprocess
import sys

WORKING = """
import gc
import sys
from audit.networks import torchvision_import

first = torchvision_import.import_torchvision()
import torch, torchvision.datasets, torchvision.models, torchvision.transforms.v2
gc.collect()
assert torchvision_import.import_torchvision() is first is torchvision

network = torchvision.models.mobilenet_v3_small(weights=None).eval()
assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)
image = torch.zeros(3, 8, 8, dtype=torch.uint8)
assert torchvision.transforms.v2.Resize(4)(image).shape == (3, 4, 4)
assert torchvision.datasets.FakeData(size=1)[0][1] in range(10)

import timm
assert timm.create_model("tf_efficientnet_lite0", pretrained=False).num_classes == 1000

boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1)
try:
    assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [0]
except RuntimeError as error:
    # Without compiled operators there is a clear message, never a wrong answer.
    assert torchvision_import._library is not None
    assert "Couldn't load custom C++ ops" in str(error)
else:
    assert torchvision_import._library is None
"""

NOT_NEEDED = """
import importlib, sys, types
from audit.networks import torchvision_import

sys.modules["torchvision"] = present = types.ModuleType("torchvision")
assert torchvision_import.import_torchvision() is present
assert torchvision_import._library is None

def fail(name):
    raise RuntimeError("compiled with different CUDA major versions")

importlib.import_module = fail
try:
    torchvision_import.import_torchvision()
except RuntimeError as error:
    assert "different CUDA major versions" in str(error)
else:
    raise AssertionError("the failure was swallowed")
assert torchvision_import._library is None
"""


def run(program: str) -> tuple[int, str]:
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    return finished.returncode, finished.stderr


def test_models_transforms_data_sets_and_timm_work_after_the_import() -> None:
    assert run(WORKING) == (0, "")


def test_nothing_is_defined_where_it_would_not_help() -> None:
    assert run(NOT_NEEDED) == (0, "")
