"""What the JSON documents of a run folder may hold, checked where they are read.

A folder may come from somebody else, from another version, or from a disk that lost bits. A field
of another type than its writer gives it is refused in one line that names it; fields that are not
there, are null, or that nobody here knows, are left to the readers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audit.errors import LayermendError, RunError

__all__ = ["check_record", "reading"]

# What a document that holds other things than it should makes of its readers.
_UNEXPECTED = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError),
    *(TypeError, ValueError),
)


@dataclass(frozen=True)
class Each:
    """A table of any names whose values have one shape."""

    shape: Any


TEXT, FLAG, NUMBER, COUNT = "a text", "true or false", "a finite number", "a whole number"
TABLE = "a table of names and values"
LIST = "a list"

_INTERVAL = {
    **dict.fromkeys(("value", "low", "high"), NUMBER),
    **{"n": COUNT, "count": COUNT, "name": TEXT},
}
_METRICS = {
    "n": COUNT,
    **dict.fromkeys(("accuracy", "precision", "recall", "cross_entropy"), _INTERVAL),
    "worst_class": _INTERVAL,
    "per_class": [_INTERVAL],
}
_MCNEMAR = {"fixed": COUNT, "broken": COUNT, "p_value": NUMBER}
_DIFFERENCE = {"accuracy": _INTERVAL, "cross_entropy": _INTERVAL, "mcnemar": _MCNEMAR}
_PAIR = dict.fromkeys(("before", "after", "control", "difference"), _INTERVAL)
_SKIPPED = {"path": TEXT, "reason": TEXT}
_OPENING = {
    "schema_version": COUNT,
    "status": TEXT,
    "created_utc": TEXT,
    "finished_utc": TEXT,
    "failure": TEXT,
    "command": [TEXT],
    "config": TABLE,
    "seed": COUNT,
    "versions": TABLE,
    "device": TABLE,
    "timings_s": Each(NUMBER),
    "peak_memory_mib": NUMBER,
}

SHAPES: dict[str, dict[str, Any]] = {
    "run.json": {
        **_OPENING,
        "model": {
            **dict.fromkeys(("source", "arch", "sha256"), TEXT),
            "parameters": COUNT,
            "layers": COUNT,
            "classes": [TEXT],
            "preprocessing": TABLE,
        },
        "data": {
            **dict.fromkeys(("root", "fingerprint", "split_source"), TEXT),
            "split_notes": [TEXT],
            **dict.fromkeys(("images", "skipped", "duplicates"), COUNT),
            "splits": Each(COUNT),
            "skipped_files": [_SKIPPED],
        },
        "metrics": Each(_METRICS),
        "cases": {
            **dict.fromkeys(("source", "rule", "note", "layer", "method"), TEXT),
            "threshold": NUMBER,
            "images": COUNT,
            "without": COUNT,
            "table": [
                {
                    "class": TEXT,
                    "n": COUNT,
                    "without": COUNT,
                    **{f"case{number}": _INTERVAL for number in range(1, 5)},
                }
            ],
            "scores": {
                **dict.fromkeys(("energy_inside", "pointing_hits", "faithfulness"), _INTERVAL),
                "energy_by_chance": NUMBER,
            },
        },
    },
    "verdict.json": {
        "verdict": TEXT,
        "layers": [TEXT],
        "flagged": TEXT,
        "confidence": NUMBER,
        "reasons": [TEXT],
        "numbers": TABLE,
    },
    "groups.json": {
        "schema_version": COUNT,
        "layer": TEXT,
        "method": TEXT,
        **dict.fromkeys(("images", "errors", "errors_looked_at", "right_looked_at"), COUNT),
        **dict.fromkeys(("tests", "alpha", "minimum_size"), NUMBER),
        "correction": TEXT,
        "groups": [
            {
                **dict.fromkeys(("id", "kind", "sentence", "label_name", "region"), TEXT),
                "predicted_name": TEXT,
                "test": TEXT,
                **dict.fromkeys(("label", "predicted", "size", "of", "compared"), COUNT),
                **dict.fromkeys(("expected", "p_value", "p_adjusted"), NUMBER),
                "share_of_errors": NUMBER,
                "compared_share": NUMBER,
                "share": _INTERVAL,
                "box": [NUMBER],
                "cells": LIST,
                "ninths": TABLE,
                "artefact": {
                    "sentence": TEXT,
                    **dict.fromkeys(("share_of_image", "threshold", "agreeing"), NUMBER),
                    "box": [NUMBER],
                    **dict.fromkeys(("looked_at", "carriers"), COUNT),
                    **dict.fromkeys(("right_looked_at", "right_carriers"), COUNT),
                },
                "paths": [TEXT],
                "examples": [
                    {
                        **dict.fromkeys(("id", "path", "label_name", "predicted_name"), TEXT),
                        "right": FLAG,
                        "split": TEXT,
                        "p_predicted": NUMBER,
                    }
                ],
            }
        ],
    },
    "index.json": {
        "images": [
            {
                **dict.fromkeys(("id", "path", "label_name", "split"), TEXT),
                **dict.fromkeys(("predicted_name", "predicted_after_name"), TEXT),
                **dict.fromkeys(("right", "right_after"), FLAG),
                **dict.fromkeys(("p_true", "p_true_after", "ssim"), NUMBER),
            }
        ],
        "layers": [TEXT],
        "methods": [TEXT],
        "shown_layer": TEXT,
        "shown_method": TEXT,
    },
    "repair.json": {
        **_OPENING,
        "layer": TEXT,
        "alias": TEXT,
        "decision": TEXT,
        "reasons": [TEXT],
        "model": TABLE,
        "controls_left_out": Each(TEXT),
        "cache": {"kind": TEXT, "bytes": NUMBER, "splits": Each(TEXT)},
        "frozen": {"tensors": COUNT, "identical": COUNT, "changed": [TEXT]},
        "data": {"changed": [_SKIPPED], "skipped": [_SKIPPED]},
        "splits": Each(COUNT),
        "training": {"best_epoch": COUNT, "steps": COUNT, "stopped": TEXT, "seconds": NUMBER},
        "before": _METRICS,
        "after": _METRICS,
        "difference": _DIFFERENCE,
        "controls": [
            {
                **dict.fromkeys(("name", "description", "layer", "alias", "loss"), TEXT),
                "after": _METRICS,
                "difference": _DIFFERENCE,
                "versus_repair": _DIFFERENCE,
                "best_epoch": COUNT,
                "stopped": TEXT,
            }
        ],
        "ssim": _INTERVAL,
        "cases": {
            **dict.fromkeys(("layer", "method", "source", "rule", "note"), TEXT),
            "images": COUNT,
            "without": COUNT,
            "table": [[COUNT]],
            "accurate": {**_PAIR, "mcnemar": _MCNEMAR},
            "insertion": _PAIR,
            "pointing": TABLE,
        },
        "calibration": _PAIR,
        "penalty": {"earned": FLAG, "sentence": TEXT, "sentences": [TEXT]},
    },
    "onnx.json": {
        "status": TEXT,
        "images": COUNT,
        "reasons": [TEXT],
        "batches": LIST,
        "providers": LIST,
        "changed_initializers": LIST,
        **dict.fromkeys(("max_abs_error", "max_rel_error", "tolerance", "bytes"), NUMBER),
    },
}


def check_record(document: Mapping[str, Any], path: Path) -> None:
    """Raise RunError where a document of a run folder has a field of another type than it should.

    Args:
        document: What the file holds.
        path: The file; its name decides which fields are known.
    """
    shape = SHAPES.get(path.name)
    if shape is not None:
        _check(document, shape, "", path)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn what a damaged folder makes of those who read it into one RunError.

    The last resort, behind the checks: a number that no writer writes, a table that does not fit
    the others. `--debug` shows where it came from.
    """
    try:
        yield
    except LayermendError:
        raise
    except _UNEXPECTED as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise RunError(
            f"{folder} does not hold what a run holds ({reason}); it is damaged or was changed: "
            "restore it from a copy, or scan and repair again"
        ) from error


def _check(value: Any, shape: Any, where: str, path: Path) -> None:
    if value is None:
        return
    if isinstance(shape, Each | Mapping):
        if not isinstance(value, Mapping):
            raise _refusal(value, TABLE, where, path)
        for name, entry in value.items():
            known = shape.shape if isinstance(shape, Each) else shape.get(name)
            if known is not None:
                _check(entry, known, f"{where}.{name}" if where else name, path)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise _refusal(value, LIST, where, path)
        for place, entry in enumerate(value):
            if entry is None:
                raise _refusal(entry, "no null", f"{where}[{place}]", path)
            _check(entry, shape[0], f"{where}[{place}]", path)
    elif not _is(value, shape):
        raise _refusal(value, shape, where, path)


def _is(value: Any, kind: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == TEXT:
        return isinstance(value, str)
    if kind == FLAG:
        return isinstance(value, bool)
    if kind == NUMBER:
        return number and abs(value) < 1e300 and math.isfinite(value)
    if kind == COUNT:
        return number and abs(value) < 2**63 and value == int(value)
    return isinstance(value, list if kind == LIST else Mapping)


def _refusal(value: Any, expected: str, where: str, path: Path) -> RunError:
    given = type(value).__name__ if isinstance(value, list | Mapping) else repr(value)[:60]
    return RunError(
        f"{path}: {where} is {given}, expected {expected}; restore the file, or run the command "
        "that wrote it again"
    )
