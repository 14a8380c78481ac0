"""The errors that layermend raises for causes that lie outside its own code.

    LayermendError              exit code 1
    ├── UsageError              exit code 2: the command line asks for something impossible
    ├── NetworkError            a model file, architecture or card that cannot be used
    │   ├── UntrustedPickleError    the file would run code, and nobody said that it may
    │   └── LayerNotFoundError      no layer of that name; the message has the closest ones
    ├── ImageError              a folder of images that cannot be used
    │   └── ClassMismatchError      class folders and model outputs do not fit together
    ├── RunError                a run folder that is missing, damaged or incomplete
    │   └── VotesError              a study's database that cannot be reached, read or written
    ├── ExportError             an exported model that did not prove equal to its source
    └── GateTripped             exit code 3: a gate or `--fail-on-flag` said no

`str(error)` is one line: what was given, what was expected, what to do. The commands print it and
exit with `exit_code`; anything else that escapes is a bug in layermend.
"""

from typing import ClassVar

__all__ = [
    "ClassMismatchError",
    "ExportError",
    "GateTripped",
    "ImageError",
    "LayerNotFoundError",
    "LayermendError",
    "NetworkError",
    "RunError",
    "UntrustedPickleError",
    "UsageError",
    "VotesError",
]


class LayermendError(Exception):
    """The root of the tree; its text is one clear line for the person at the keyboard."""

    exit_code: ClassVar[int] = 1


class UsageError(LayermendError):
    """Options that contradict each other, or a value that no model or folder could satisfy."""

    exit_code = 2


class NetworkError(LayermendError):
    """A model file, architecture or card that cannot be opened or does not fit."""


class UntrustedPickleError(NetworkError):
    """A file that can only be opened by running code that it carries."""


class LayerNotFoundError(NetworkError):
    """A layer name that is neither a module path nor an alias."""


class ImageError(LayermendError):
    """A folder of images that is missing, empty or unreadable as a whole."""


class ClassMismatchError(ImageError):
    """Class folders that match no output of the model."""


class RunError(LayermendError):
    """A run folder that is missing, damaged, incomplete or of another schema version."""


class VotesError(RunError):
    """A database of a study's votes that cannot be reached, read or written."""


class ExportError(LayermendError):
    """An exported model that could not be written or did not prove equal to its source."""


class GateTripped(LayermendError):
    """A threshold that the caller set and the results did not meet: an answer, not a fault."""

    exit_code = 3
