"""Run folders: where a scan and its repairs leave everything they found.

One place knows the layout (schema version 1), for writing and for reading, so that scan, repair,
report and dashboard cannot disagree about it. Files are written whole or not at all; a folder that
is damaged, half written or newer than this version is reported in one clear line and never crashes
a listing. Nothing here needs torch.

    runs/<UTC>-<model>/            start_run, open_run, newest_run, list_runs -> Run
        run.json  images.parquet  layers.parquet  verdict.json  groups.json  maps/
        repairs/<UTC>-<layer>/     Run.start_repair, Run.repairs -> RepairFolder
            repair.json  history.parquet  images.parquet  maps/  weights.*  model.onnx  onnx.json
"""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import quote

import numpy as np

from audit.errors import RunError
from audit.files import read_json, write_arrays, write_bytes, write_json, write_table
from audit.locks import lock_file
from audit.record_shapes import check_record

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

__all__ = [
    "SCHEMA_VERSION",
    "DamagedFolder",
    "RepairFolder",
    "Run",
    "list_damaged_runs",
    "list_runs",
    "newest_run",
    "open_repair",
    "open_run",
    "open_run_or_newest",
    "start_run",
    "write_gallery",
    "write_maps",
]

SCHEMA_VERSION = 1

Columns = Mapping[str, Any] | Sequence[Mapping[str, Any]]
When = Literal["before", "after"]

FEWEST_ROWS = 10_000  # that a table may have whatever its size
LARGEST_ARRAYS = 2**30

# How the readers of .npz files say that one is damaged.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, EOFError, NotImplementedError, MemoryError, OverflowError),
    *(TypeError, SyntaxError, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError),
)

_STAMP = re.compile(r"\d{8}T\d{6}Z-")

_TEXT, _INT, _REAL, _FLAG = "string", "int32", "float64", "bool"
_KINDS = {_INT: "i", _REAL: "f", _FLAG: "b"}  # as NumPy calls them

RUN_IMAGES = {
    "path": _TEXT,
    "label": _INT,
    "label_name": _TEXT,
    "predicted": _INT,
    "predicted_name": _TEXT,
    "right": _FLAG,
    "p_true": _REAL,
    "p_predicted": _REAL,
    "ce": _REAL,
    "case": "int8",
    "map_mean": _REAL,
    "map_peak_x": _REAL,
    "map_peak_y": _REAL,
    "map_accurate": _FLAG,
    "map_energy_inside": _REAL,
    "map_pointing_hit": _FLAG,
    "mask_area": _REAL,
    "map_faithfulness": _REAL,
    "split": _TEXT,
    "sha256": _TEXT,
}
# Columns that joined the schema later: null where a run was written before.
ADDED_LATER = frozenset(
    {
        *("map_accurate", "map_energy_inside", "map_pointing_hit", "mask_area"),
        *("map_faithfulness", "bn_drift", "bn_drift_onset"),
        *("gradient_agreement", "gradient_conflict"),
        *("energy_inside", "pointing_game", "energy_drop"),
        *("trial_steps", "blame", "channel_gain", "channel_gain_low", "channel_gain_high"),
        *("silent_channels", "norm_outlier", "moves_gain", "moves_gain_low", "moves_gain_high"),
        *("bn_drift_unexplained", "bn_drift_by_signs"),
    }
)
RUN_LAYERS = {
    "index": _INT,
    "name": _TEXT,
    "alias": _TEXT,
    "kind": _TEXT,
    "shape": _TEXT,
    "parameters": "int64",
    "gradient_norm": _REAL,
    "relative_gradient_norm": _REAL,
    "gradient_snr": _REAL,
    "gradient_agreement": _REAL,
    "gradient_conflict": _REAL,
    "map_mean_right": _REAL,
    "map_mean_wrong": _REAL,
    "map_auroc": _REAL,
    "map_auroc_low": _REAL,
    "map_auroc_high": _REAL,
    "penalty": _REAL,
    "energy_inside": _REAL,
    "pointing_game": _REAL,
    "energy_drop": _REAL,
    "bn_drift": _REAL,
    "bn_drift_onset": _REAL,
    "bn_drift_unexplained": _REAL,
    "bn_drift_by_signs": _REAL,
    "silent_channels": _REAL,
    "norm_outlier": _REAL,
    "blame": _REAL,
    "channel_gain": _REAL,
    "channel_gain_low": _REAL,
    "channel_gain_high": _REAL,
    "moves_gain": _REAL,
    "moves_gain_low": _REAL,
    "moves_gain_high": _REAL,
    "trial_gain": _REAL,
    "trial_gain_low": _REAL,
    "trial_gain_high": _REAL,
    "trial_step": _REAL,
    "trial_steps": _INT,
    "trial_broken": _REAL,
    "rank": _INT,
}
REPAIR_IMAGES = {
    "path": _TEXT,
    "label": _INT,
    "label_name": _TEXT,
    "split": _TEXT,
    "predicted_before": _INT,
    "predicted_before_name": _TEXT,
    "right_before": _FLAG,
    "p_true_before": _REAL,
    "ce_before": _REAL,
    "predicted_after": _INT,
    "predicted_after_name": _TEXT,
    "right_after": _FLAG,
    "p_true_after": _REAL,
    "ce_after": _REAL,
    "predicted_control": _INT,
    "right_control": _FLAG,
    "ce_control": _REAL,
    "ssim": _REAL,
    "case_before": _INT,
    "case_after": _INT,
}
REPAIR_HISTORY = {
    "role": _TEXT,
    "epoch": _INT,
    "loss": _REAL,
    "ce": _REAL,
    "saliency_mean": _REAL,
    "r1": _REAL,
    "r2": _REAL,
    "learning_rate": _REAL,
    "val_ce": _REAL,
    "val_accuracy": _REAL,
    "best": _FLAG,
    "seconds": _REAL,
}


# --- finding and starting runs --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DamagedFolder:
    """A run or repair folder that cannot be read, and why in one line."""

    path: Path
    reason: str


def start_run(root: Path, model_name: str, info: Mapping[str, Any] | None = None) -> Run:
    """Return a new run under `root`, its `run.json` written with status `running`."""
    return Run(_create_folder(root, model_name), _opening_record(info), write=True)


def open_run(path: Path) -> Run:
    """Return the run at `path`: a run folder, its `run.json`, or the newest in a folder of runs."""
    path = path.parent if path.name == Run.record else path
    if (path / Run.record).is_file() or _STAMP.match(path.name):
        return Run(path, _read_record(path, Run.record))
    return newest_run(path)


def newest_run(root: Path = Path("runs"), *, status: str | None = None) -> Run:
    """Return the newest readable run under `root`, of the given status where one is asked for.

    Raises:
        RunError: There is none, with the command that makes one.
    """
    runs = [run for run in list_runs(root) if status in (None, run.status)]
    if runs:
        return runs[0]
    kind = f"{status} run" if status else "run"
    damaged = list_damaged_runs(root)
    seen = f" ({len(damaged)} damaged: {damaged[0].reason})" if damaged else ""
    raise RunError(
        f"no {kind} under {_shown(root)}{seen}; start with `audit scan MODEL --data DIR`"
    )


def open_run_or_newest(path: Path | None) -> Run:
    """Return the run at `path`, or the newest complete one under ./runs when None."""
    return newest_run(status="complete") if path is None else open_run(path)


def list_runs(root: Path) -> list[Run]:
    """Return every readable run under `root`, newest first; empty where there is none."""
    return _survey(root, Run)[0]


def list_damaged_runs(root: Path) -> list[DamagedFolder]:
    """Return the folders under `root` that look like runs and cannot be read."""
    return _survey(root, Run)[1]


def open_repair(path: Path) -> RepairFolder:
    """Return the repair at `path`, a folder inside a run's `repairs/`."""
    return RepairFolder(path, _read_record(path, RepairFolder.record))


# --- the two kinds of folder ----------------------------------------------------------------------


class _Folder:
    """A folder with one JSON record that says what it is and how far it came."""

    record: str

    def __init__(self, path: Path, info: dict[str, Any], *, write: bool = False) -> None:
        self.path = path
        self.info = info
        if write:
            write_json(self.path / self.record, self.info)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.status})"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def status(self) -> str:
        return str(self.info.get("status", "unknown"))

    @property
    def created_utc(self) -> str:
        return str(self.info.get("created_utc") or "")

    def write_info(self, **updates: Any) -> None:
        """Merge `updates` into the record and write it."""
        self.info = {**self.info, **updates}
        write_json(self.path / self.record, self.info)

    def finish(self, **updates: Any) -> None:
        """Write `updates` with status `complete` and the time."""
        self.write_info(**updates, status="complete", finished_utc=_now())

    def fail(self, reason: str) -> None:
        """Write status `failed`, why, and the time."""
        self.write_info(status="failed", failure=reason, finished_utc=_now())

    @property
    def gallery(self) -> dict[str, Any]:
        """The index of the maps: `images`, `layers`, `methods`; empty lists where there is none."""
        index = self.path / "maps" / "index.json"
        empty: dict[str, Any] = {"images": [], "layers": [], "methods": []}
        return {**empty, **_read_document(index)} if index.is_file() else empty

    def gallery_image(self, image_id: str) -> Path:
        """Return where the picture of one gallery image lies, as the network saw it."""
        return self.path / "maps" / "images" / f"{_file_name(image_id)}.png"

    def has_maps(self, method: str, layer: str, when: When | None = None) -> bool:
        return _maps_path(self.path / "maps", method, layer, when).is_file()

    def _maps(self, method: str, layer: str, when: When | None) -> np.ndarray:
        path = _maps_path(self.path / "maps", method, layer, when)
        if not path.is_file():
            held = ", ".join(map(str, self.gallery["layers"])) or "none"
            raise RunError(f"no {method} maps of {layer} in {_shown(self.path)}; layers: {held}")
        with _arrays(path) as arrays:
            return _stack_of_maps(arrays["maps"])

    def _table(self, name: str, schema: Mapping[str, str]) -> pd.DataFrame:
        table = self._columns(name, schema)
        try:
            return table.select(_in_order(table.column_names, schema)).to_pandas()
        except (ValueError, MemoryError, OverflowError) as error:  # Arrow's own are ValueErrors
            raise _damaged(self.path / name, error) from error

    def _columns(
        self, name: str, schema: Mapping[str, str], wanted: Sequence[str] | None = None
    ) -> pa.Table:
        """Return the columns `wanted` of a table, all there are when None; others are not read."""
        path = self.path / name
        if not path.is_file():
            raise RunError(f"{_shown(path)} is not there; the run is {self.status}")
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._check_table_size(path, pq.read_metadata(path).num_rows)
            with pq.ParquetFile(path) as file:
                held = file.schema_arrow.names
                missing = sorted(set(schema) - set(held) - ADDED_LATER)
                if missing:
                    lacks = f"{_shown(path)} lacks the columns {', '.join(missing)}; scan again"
                    raise RunError(lacks)
                read = None if wanted is None else [one for one in wanted if one in held]
                table = file.read(columns=read)
            for column in [one for one in wanted or schema if one not in held]:
                unknown = pa.nulls(len(table), pa.type_for_alias(schema[column]))
                table = table.append_column(column, unknown)
            for place, column in enumerate(table.column_names):
                if column in schema:
                    kind = pa.type_for_alias(schema[column])
                    table = table.set_column(place, column, table.column(column).cast(kind))
            return table if wanted is None else table.select(list(wanted))
        except (OSError, pa.ArrowException, ValueError, MemoryError, OverflowError) as error:
            raise _damaged(path, error) from error

    def _check_table_size(self, path: Path, rows: int) -> None:
        """Raise RunError where a table claims more rows than its bytes can hold, as a bomb does."""
        if rows > max(FEWEST_ROWS, path.stat().st_size):
            raise RunError(
                f"{_shown(path)} claims {rows:,} rows in {path.stat().st_size:,} bytes; scan again"
            )


F = TypeVar("F", bound=_Folder)


class Run(_Folder):
    """One scan: its record, tables, verdict, maps, and the repairs made from it."""

    record = "run.json"
    _lock: int | None = None

    @cached_property
    def verdict(self) -> dict[str, Any]:
        return _read_document(self.path / "verdict.json")

    @property
    def flagged_layer(self) -> str | None:
        """The layer that the verdict would have repaired, None where it names none.

        Of runs that do not say, the most blamed one.
        """
        layers = self.verdict.get("layers") or []
        return str(self.verdict.get("flagged") or layers[0]) if layers else None

    @property
    def best_by_trial(self) -> str | None:
        """The layer whose trial repair did most, None where none was tried.

        To begin with where the verdict flags none: it says so of this layer.
        """
        try:
            tried = self.layers.dropna(subset=["trial_gain"])
        except RunError:
            return None
        return str(tried.loc[tried["trial_gain"].idxmax(), "name"]) if len(tried) else None

    @cached_property
    def images(self) -> pd.DataFrame:
        return self._table("images.parquet", RUN_IMAGES)

    def image_columns(self, *names: str) -> pa.Table:
        """Return some columns of the images' table, in that order; nothing else is read."""
        return self._columns("images.parquet", RUN_IMAGES, names)

    @cached_property
    def layers(self) -> pd.DataFrame:
        return self._table("layers.parquet", RUN_LAYERS)

    @property
    def aliases(self) -> dict[str, str]:
        """The alias of each layer that has one, by the layer's name."""
        pairs = zip(self.layers["name"], self.layers["alias"], strict=True)
        # A missing text is None or NaN, as pandas' version has it.
        return {
            name: alias
            for name, alias in pairs
            if isinstance(alias, str) and alias not in ("", name)
        }

    @property
    def repairs(self) -> list[RepairFolder]:
        """Every readable repair of this run, newest first."""
        return _survey(self.path / "repairs", RepairFolder)[0]

    @property
    def damaged_repairs(self) -> list[DamagedFolder]:
        return _survey(self.path / "repairs", RepairFolder)[1]

    def maps(self, method: str, layer: str) -> np.ndarray:
        """Return the gallery's maps of one layer, (N, h, w) float32 in [0, 1]."""
        return self._maps(method, layer, None)

    def claim(self) -> bool:
        """Return whether this process may write the run from here on; False while another does.

        The claim ends with `release`, or with the process.
        """
        if os.name != "posix":
            return True  # no lock that ends with its process; two at once are then up to the user
        path = self.path / "progress" / "lock"
        path.parent.mkdir(exist_ok=True)
        self._lock = lock_file(path)
        if self._lock is None:
            return False
        # Whoever held it may have finished the run in the meantime.
        self.info = _read_record(self.path, self.record)
        if self.status == "complete":
            self.release()
            return False
        return True

    def release(self) -> None:
        """Give up the claim, where there is one."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __getstate__(self) -> dict[str, Any]:
        """Other processes of a team get the run without the claim to it."""
        return {**vars(self), "_lock": None}

    def begin(self) -> None:
        """Write status `running`, as of a run that was never interrupted; clear what is half done.

        Files that a killed process was writing bear names that nobody reads (`audit.files`).
        """
        for left in (found for found in self.path.rglob(".partial-*") if found.is_file()):
            if "repairs" not in left.relative_to(self.path).parts:
                left.unlink()
        self.info.pop("failure", None)
        self.write_info(status="running", finished_utc=None)

    def write_images(self, rows: Columns) -> None:
        """Write one row per image; columns of the schema that are not given become null."""
        write_table(self.path / "images.parquet", _to_table(rows, RUN_IMAGES))
        self.__dict__.pop("images", None)

    def write_layers(self, rows: Columns) -> None:
        """Write one row per layer; columns of the schema that are not given become null."""
        write_table(self.path / "layers.parquet", _to_table(rows, RUN_LAYERS))
        self.__dict__.pop("layers", None)

    def write_verdict(self, verdict: Mapping[str, Any]) -> None:
        write_json(self.path / "verdict.json", verdict)
        self.__dict__.pop("verdict", None)

    def write_gallery(self, index: Mapping[str, Any], images: Sequence[np.ndarray]) -> None:
        write_gallery(self.path, index, images)

    @cached_property
    def groups(self) -> dict[str, Any]:
        """The error groups: `groups` and how they were tested; no groups where none were sought."""
        path = self.path / "groups.json"
        if not path.is_file():
            return {"groups": []}
        document = _read_document(path)
        if document.get("schema_version") != SCHEMA_VERSION:
            raise RunError(
                f"{_shown(path)} has schema version {document.get('schema_version')!r}, this "
                f"layermend reads {SCHEMA_VERSION}; update layermend or scan again"
            )
        if not isinstance(document.get("groups"), list):
            raise RunError(f"{_shown(path)} holds no list of groups; scan again")
        return document

    def group_maps(self, kind: Literal["wrong", "right", "examples"]) -> np.ndarray:
        """Return maps of the error groups, float32 in [0, 1].

        Args:
            kind: `wrong` or `right`, the mean map of each group or of the right images that it was
                compared with, (groups, h, w), NaN where there are none; or those of the
                `examples`, (images, h, w), in the order of their ids.
        """
        with _arrays(self.path / "maps" / "groups.npz") as arrays:
            return _stack_of_maps(arrays[kind])

    def group_image(self, image_id: str) -> Path:
        """Return where the picture of one example of the error groups lies."""
        return self.path / "maps" / "groups" / f"{_file_name(image_id)}.png"

    def group_artefact(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pixels that the images of one of the groups share, as the network sees them.

        Args:
            place: Of the group, from 0.

        Returns:
            Where they are, (H, W) bool, and what is there, (H, W, 3) uint8.
        """
        with _arrays(self.path / "maps" / "artefacts.npz") as arrays:
            masks, pictures = arrays["masks"], arrays["pictures"]
            if masks.dtype != np.bool_ or masks.ndim != 3 or not masks[place : place + 1].any():
                raise ValueError(f"it holds no mask of group {place + 1}")
            if pictures.dtype != np.uint8 or pictures.shape != (*masks.shape, 3):
                raise ValueError("pictures and masks do not go together")
        return masks[place], pictures[place]

    def write_groups(
        self,
        document: Mapping[str, Any],
        maps: Mapping[str, np.ndarray],
        pictures: Sequence[np.ndarray],
        artefacts: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Write `groups.json`, its arrays in `maps` and the pictures `maps/groups/ID.png`.

        Args:
            document: `groups`, each with its `examples`, and how they were tested.
            maps: `wrong`, `right` and `examples`, as `group_maps` returns them; kept as float16.
            pictures: HWC uint8 of the examples, in the order of their ids `0000`, `0001`, ...
            artefacts: `masks` and `pictures`, by group what `group_artefact` returns; None where
                none were sought.
        """
        for place, pixels in enumerate(pictures):
            _write_picture(self.group_image(f"{place:04d}"), pixels)
        arrays = {name: np.asarray(values, dtype=np.float16) for name, values in maps.items()}
        write_arrays(self.path / "maps" / "groups.npz", **arrays)
        if artefacts is not None:
            write_arrays(self.path / "maps" / "artefacts.npz", **artefacts)
        # Last: whoever finds it also finds every map and picture it names.
        write_json(self.path / "groups.json", {"schema_version": SCHEMA_VERSION, **document})
        self.__dict__.pop("groups", None)

    def write_maps(self, method: str, layer: str, maps: np.ndarray) -> None:
        write_maps(self.path, method, layer, maps)

    def start_repair(self, layer: str, info: Mapping[str, Any] | None = None) -> RepairFolder:
        """Return a new repair of `layer`, its `repair.json` written with status `running`."""
        record = {**_opening_record(info), "layer": layer}
        return RepairFolder(_create_folder(self.path / "repairs", layer), record, write=True)


class RepairFolder(_Folder):
    """One repair: its record, history, held-out images, maps before and after, and its export."""

    record = "repair.json"

    @property
    def run_path(self) -> Path:
        return self.path.parent.parent

    @property
    def layer(self) -> str:
        return str(self.info.get("layer", ""))

    @property
    def decision(self) -> str | None:
        """`accepted`, `rejected`, or None while there is none."""
        decision = self.info.get("decision")
        return str(decision) if decision else None

    @cached_property
    def history(self) -> pd.DataFrame:
        return self._table("history.parquet", REPAIR_HISTORY)

    @cached_property
    def images(self) -> pd.DataFrame:
        return self._table("images.parquet", REPAIR_IMAGES)

    def image_columns(self, *names: str) -> pa.Table:
        """Return some columns of the held-out images' table, in that order."""
        return self._columns("images.parquet", REPAIR_IMAGES, names)

    @property
    def onnx(self) -> dict[str, Any] | None:
        """The export's proof, or None where nothing was exported."""
        path = self.path / "onnx.json"
        return _read_document(path) if path.is_file() else None

    @property
    def onnx_model(self) -> Path:
        return self.path / "model.onnx"

    @property
    def onnx_card(self) -> Path:
        """What the exported model says about itself, Markdown."""
        return self.path / "model.md"

    @property
    def weights(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def card(self) -> Path:
        return self.path / "weights.toml"

    @property
    def program(self) -> Path:
        """The repaired network as an exported program, where its architecture has no name."""
        return self.path / "model.pt2"

    def maps(self, method: str, layer: str, when: When) -> np.ndarray:
        """Return the gallery's maps before or after the repair, (N, h, w) float32 in [0, 1]."""
        return self._maps(method, layer, when)

    def write_history(self, rows: Columns) -> None:
        write_table(self.path / "history.parquet", _to_table(rows, REPAIR_HISTORY))
        self.__dict__.pop("history", None)

    def write_images(self, rows: Columns) -> None:
        """Write one row per held-out image; columns that are not given become null."""
        write_table(self.path / "images.parquet", _to_table(rows, REPAIR_IMAGES))
        self.__dict__.pop("images", None)

    def write_gallery(self, index: Mapping[str, Any], images: Sequence[np.ndarray]) -> None:
        write_gallery(self.path, index, images)

    def write_maps(self, method: str, layer: str, maps: np.ndarray, when: When) -> None:
        write_maps(self.path, method, layer, maps, when)

    def write_onnx(self, proof: Mapping[str, Any]) -> None:
        write_json(self.path / "onnx.json", proof)


# --- writing maps and tables ----------------------------------------------------------------------


def write_gallery(folder: Path, index: Mapping[str, Any], images: Sequence[np.ndarray]) -> None:
    """Write `maps/index.json` of a run or repair folder, and the picture of each image in it.

    Args:
        folder: The run or repair folder.
        index: `images` (each with an `id`), `layers`, `methods`, `shown_layer`, `shown_method`.
        images: HWC uint8, [0, 255], in the order of `index["images"]`.
    """
    entries = index["images"]
    if len(entries) != len(images):
        raise ValueError(f"gallery index names {len(entries)} images, {len(images)} were given")
    for entry, pixels in zip(entries, images, strict=True):
        _write_picture(folder / "maps" / "images" / f"{_file_name(entry['id'])}.png", pixels)
    # The index last: whoever finds it also finds every picture it names.
    write_json(folder / "maps" / "index.json", index)


def write_maps(
    folder: Path, method: str, layer: str, maps: np.ndarray, when: When | None = None
) -> None:
    """Write the gallery's maps of one layer, (N, h, w) in [0, 1], as float16.

    Args:
        folder: The run or repair folder.
        when: `before` or `after` inside a repair, None inside a run.
    """
    path = _maps_path(folder / "maps", method, layer, when)
    write_arrays(path, maps=np.asarray(maps, dtype=np.float16))


def _write_picture(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8)).save(encoded, format="PNG")
    write_bytes(path, encoded.getvalue())


def _maps_path(root: Path, method: str, layer: str, when: When | None) -> Path:
    suffix = f".{when}.npz" if when else ".npz"
    return root / _file_name(method) / f"{_file_name(layer)}{suffix}"


def _file_name(name: str) -> str:
    """Return `name` percent-encoded: no separator or hidden name reaches the file system."""
    encoded = quote(name, safe="")
    return "%2E" + encoded[1:] if encoded.startswith(".") else encoded


def _to_table(rows: Columns, schema: Mapping[str, str]) -> pa.Table:
    """Return a table with every column of `schema`, typed, then whatever else was given."""
    import pyarrow as pa

    columns = _columns(rows)
    lengths = {len(values) for values in columns.values()}
    if len(lengths) > 1:
        raise ValueError(
            f"columns of different lengths: { {k: len(v) for k, v in columns.items()} }"
        )
    length = lengths.pop() if lengths else 0
    arrays = {}
    for name, kind in schema.items():
        values = columns.pop(name, [None] * length)
        typed = pa.type_for_alias(kind)
        # Arrays of the column's own kind as they are: lists of a million numbers take much memory.
        alike = isinstance(values, np.ndarray) and values.dtype.kind == _KINDS.get(kind)
        arrays[name] = pa.array(values if alike else _plain(values), typed, from_pandas=True)
    arrays |= {name: pa.array(_plain(values), from_pandas=True) for name, values in columns.items()}
    return pa.table(arrays)


def _columns(rows: Columns) -> dict[str, Any]:
    if isinstance(rows, Mapping):
        return dict(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _plain(values: Any) -> list[Any]:
    """Return `values` as Python scalars; arrays and CPU tensors are accepted."""
    return [
        value.item() if hasattr(value, "item") else value
        for value in (values.tolist() if hasattr(values, "tolist") else values)
    ]


# --- folders on disk ------------------------------------------------------------------------------


def _survey(root: Path, kind: type[F]) -> tuple[list[F], list[DamagedFolder]]:
    """Return the readable folders of one kind under `root`, newest first, and the damaged ones."""
    readable: list[F] = []
    damaged: list[DamagedFolder] = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if not path.is_dir() or not ((path / kind.record).exists() or _STAMP.match(path.name)):
            continue
        try:
            readable.append(kind(path, _read_record(path, kind.record)))
        except RunError as error:
            damaged.append(DamagedFolder(path=path, reason=str(error)))
    # The time in the record has microseconds; the stamp in the name has seconds.
    readable.sort(key=lambda folder: (folder.created_utc, folder.name), reverse=True)
    return readable, damaged


def _read_document(path: Path) -> dict[str, Any]:
    document = read_json(path)
    check_record(document, path)
    return document


def _read_record(path: Path, name: str) -> dict[str, Any]:
    if not path.is_dir():
        raise RunError(f"no run at {_shown(path)}; start with `audit scan MODEL --data DIR`")
    if not (path / name).is_file():
        raise RunError(f"{_shown(path)} has no {name}: never finished starting, or not a run")
    record = _read_document(path / name)
    version = record.get("schema_version")
    if not isinstance(version, int) or version < 1:
        raise RunError(f"{_shown(path / name)} has schema version {version!r}, expected a number")
    if version > SCHEMA_VERSION:
        raise RunError(
            f"{_shown(path)} was written by a newer layermend (schema version {version}, "
            f"this one reads {SCHEMA_VERSION}); update layermend"
        )
    return record


def _opening_record(info: Mapping[str, Any] | None) -> dict[str, Any]:
    opening = {"schema_version": SCHEMA_VERSION, "status": "running", "created_utc": _now()}
    return {**opening, "finished_utc": None, **(info or {})}


def _create_folder(root: Path, name: str) -> Path:
    """Return a new folder `<UTC>-<name>` under `root`; the second within a second ends in `-2`."""
    root.mkdir(parents=True, exist_ok=True)
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "model"
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{safe}"
    for attempt in range(1, 10_000):
        path = root / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            path.mkdir()  # fails where it exists: two processes never share a folder
        except FileExistsError:
            continue
        return path
    raise RunError(f"no free folder name under {_shown(root)} for {stem}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _in_order(names: Sequence[str], schema: Mapping[str, str]) -> list[str]:
    """Return the columns of the schema, then whatever else a table has."""
    return [*schema, *(name for name in names if name not in schema)]


def _stack_of_maps(values: np.ndarray) -> np.ndarray:
    if values.ndim != 3 or values.dtype.kind != "f" or 0 in values.shape[1:]:
        raise ValueError(f"{values.dtype} of shape {values.shape}, expected maps (N, h, w)")
    return np.asarray(values, dtype=np.float32)


@contextmanager
def _arrays(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """Open an archive of arrays; whatever is wrong with it, or found wrong in it, is a RunError."""
    if not path.is_file():
        raise RunError(f"{_shown(path)} is not there; scan again")
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > LARGEST_ARRAYS:  # more than any gallery needs
            raise ValueError(f"it unpacks to {claimed:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except _UNREADABLE as error:
        raise _damaged(path, error) from error


def _shown(path: Path) -> str:
    """Return `path` as a user would type it: relative paths start with `./`."""
    text = str(path)
    return text if path.is_absolute() or text.startswith(".") else f"./{text}"


def _damaged(path: Path, error: BaseException) -> RunError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RunError(f"{_shown(path)} is damaged ({reason}); scan or repair again")
