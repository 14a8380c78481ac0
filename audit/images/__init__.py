"""Labeled image folders: opened, checked, split and loaded as pixels."""

from audit.images.folders import open_image_folder
from audit.images.loading import ImageBatch, iterate_batches, load_pixels
from audit.images.records import ImageFolder, ImageRecord, SkippedFile, Split

__all__ = [
    "ImageBatch",
    "ImageFolder",
    "ImageRecord",
    "SkippedFile",
    "Split",
    "iterate_batches",
    "load_pixels",
    "open_image_folder",
]
