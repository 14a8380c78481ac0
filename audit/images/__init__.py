"""Labeled image folders: opened, checked, split and loaded as pixels."""

from audit.images.folders import class_names, open_image_folder
from audit.images.loading import ImageBatch, iterate_batches, load_pixels
from audit.images.records import ImageFolder, ImageRecord, SkippedFile, Split

__all__ = [
    "ImageBatch",
    "ImageFolder",
    "ImageRecord",
    "SkippedFile",
    "Split",
    "class_names",
    "iterate_batches",
    "load_pixels",
    "open_image_folder",
]
