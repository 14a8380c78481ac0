"""Find the layer of a pretrained image classifier that makes its systematic mistakes.

Importing this package is cheap on purpose: nothing here imports torch, so that `--help` answers at
once. Import what you need from the modules below it.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("layermend")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.1.0"

__all__ = ["__version__"]
