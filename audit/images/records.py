"""What opening a folder of images yields: one record per image, one per file that was left out.

Plain data that the rest of the product passes around and writes to run folders. Paths are relative
to the folder's root, with forward slashes, and always valid Unicode, so that they survive JSON and
Parquet.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["SPLITS", "ImageFolder", "ImageRecord", "SkippedFile", "Split", "one_line"]

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One image: `label` is the model output it belongs to, `class_name` that output's name."""

    path: str
    label: int
    class_name: str
    split: Split
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SkippedFile:
    """One file or folder that was left out, and why, in one line."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Every usable image below `root`, sorted by path.

    `split_source` says whether the user's own train/val/test folders or a seeded draw decided the
    splits; `split_notes` says in sentences what was carved from what. `duplicates` counts the files
    left out because the same content occurs elsewhere; each is also in `skipped`. `fingerprint` is
    the SHA-256 over the sorted (path, content hash, label) of the records.
    """

    root: Path
    records: tuple[ImageRecord, ...]
    skipped: tuple[SkippedFile, ...]
    split_source: Literal["folders", "seeded"]
    duplicates: int
    fingerprint: str
    split_notes: tuple[str, ...] = ()

    def positions(self, split: Split) -> tuple[int, ...]:
        """Return the positions in `records` of the images of one split."""
        return tuple(i for i, record in enumerate(self.records) if record.split == split)


def one_line(text: str, limit: int = 200) -> str:
    """Return the text printable on one line: odd characters escaped, long text cut."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
