"""Which run, and which of its repairs, the pages show.

The choice is made in the sidebar on every page and read by the page with `selected`; it stands in
the address. Folders are read anew when a file in them has changed, so a scan that is still running
fills in as it goes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import streamlit as st

from audit.errors import RunError
from audit.record_shapes import reading
from audit.rendering import part
from audit.runs import DamagedFolder, RepairFolder, Run, list_damaged_runs, list_runs, open_run
from audit.wording import count, moment
from dashboard import address
from dashboard.cli import RUNS_VARIABLE

__all__ = [
    "aliases",
    "choose",
    "command",
    "folder_state",
    "listed_runs",
    "problems_shown",
    "runs_root",
    "selected",
]

LAYER_SHOWN = 20  # letters
_CHOICE = "layermend_choice"


def choose() -> bool:
    """Show the pickers; return whether there is a run to show."""
    root = runs_root()
    runs, damaged = _readable(root)
    with st.sidebar:
        st.html('<p class="lm lm-wordmark">layermend</p>')
        run = _pick_run(runs) if runs else None
        repair = _pick_repair(run.repairs) if run else None
        _show_damaged([*damaged, *(run.damaged_repairs if run else [])])
    st.session_state[_CHOICE] = (run, repair)
    if run is None:
        _show_nothing(root, damaged)
    return run is not None


def runs_root() -> Path:
    """Return the run, or the folder of runs, that the server was started on."""
    return Path(os.environ.get(RUNS_VARIABLE, "runs"))


def listed_runs() -> list[Run]:
    """Return every readable run that the server was started on, newest first."""
    return _readable(runs_root())[0]


def folder_state(*folders: Path) -> tuple[tuple[str, int, int], ...]:
    """Return names, times and sizes of what lies in folders: it differs once a file has changed."""
    found = []
    for folder in folders:
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                with suppress(OSError):  # gone in the meantime
                    stat = entry.stat()
                    found.append((entry.path, stat.st_mtime_ns, stat.st_size))
    return tuple(sorted(found))


def selected() -> tuple[Run, RepairFolder | None]:
    """Return the chosen run, and the chosen repair where there is one."""
    run, repair = st.session_state[_CHOICE]
    return run, repair


@contextmanager
def problems_shown() -> Iterator[None]:
    """Show what cannot be read as one line in its place; the rest of the page goes on."""
    run, _ = st.session_state.get(_CHOICE) or (None, None)
    try:
        with reading(run.path if run else Path()):
            yield
    except RunError as error:
        st.html(part("banner", "open", "This part cannot be shown.", [str(error)]))


def aliases(run: Run) -> dict[str, str]:
    """Return the alias of each layer by its name; empty where they cannot be read."""
    try:
        with reading(run.path):
            return run.aliases
    except RunError:  # the page of the layers says so
        return {}


def command(run: Run, *words: str) -> str:
    """Return a command on this run, as it can be typed."""
    import shlex

    return shlex.join([*words, "--run", str(run.path)])


def _readable(root: Path) -> tuple[list[Run], list[DamagedFolder]]:
    runs = [root] if (root / Run.record).exists() else _folders_in(root)
    repairs = [repair for run in runs for repair in _folders_in(run / "repairs")]
    maps = [folder / "maps" for folder in (*runs, *repairs)]
    return _read(root, folder_state(root, *runs, *repairs, *maps))


def _folders_in(root: Path) -> list[Path]:
    try:
        with os.scandir(root) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir()]
    except OSError:
        return []


@st.cache_resource(max_entries=4, show_spinner=False)
def _read(
    root: Path, state: tuple[tuple[str, int, int], ...]
) -> tuple[list[Run], list[DamagedFolder]]:
    """Return the runs as they are in this state of their folders."""
    if (root / Run.record).exists():
        try:
            return [open_run(root)], []
        except RunError as error:
            return [], [DamagedFolder(path=root, reason=str(error))]
    return list_runs(root), list_damaged_runs(root)


def _pick_run(runs: Sequence[Run]) -> Run:
    by_name = {run.name: run for run in runs}
    labels = _distinct({name: [_run_label(run)] for name, run in by_name.items()})
    address.begin("run", "run", runs[0].name, by_name)
    name = st.selectbox("Run", list(by_name), format_func=lambda name: labels[name], key="run")
    address.write("run", name)
    return by_name.get(name) or runs[0]


def _pick_repair(repairs: Sequence[RepairFolder]) -> RepairFolder | None:
    if not repairs:
        st.caption("No repair in this run yet.")
        st.session_state.pop("repair", None)
        address.write("repair", None)
        return None
    by_name = {repair.name: repair for repair in repairs}
    labels = _distinct({name: _repair_labels(repair) for name, repair in by_name.items()})
    # The newest that came to a decision, as in the report.
    first = next((place for place, repair in enumerate(repairs) if repair.decision), 0)
    address.begin("repair", "repair", repairs[first].name, by_name)
    name = st.selectbox(
        "Repair", list(by_name), format_func=lambda name: labels[name], key="repair"
    )
    address.write("repair", name)
    return by_name.get(name) or repairs[first]


def _run_label(run: Run) -> str:
    name = run.name.partition("-")[2] or run.name
    state = "" if run.status == "complete" else f", {run.status}"
    return f"{name}, {_short(run.created_utc)}{state}"


def _repair_labels(repair: RepairFolder) -> list[str]:
    """Return a short label, and one that holds the time too."""
    layer = _tail(str(repair.info.get("alias") or repair.layer))
    label = f"{layer}, {repair.decision or repair.status}"
    return [label, f"{label}, {_short(repair.created_utc)}"]


def _tail(layer: str) -> str:
    """Return the end of a layer's path, as much as the sidebar holds beside the decision."""
    parts = layer.split(".")
    while len(parts) > 1 and len(".".join(parts)) > LAYER_SHOWN:
        parts = parts[1:]
    return ".".join(parts)


def _distinct(labels: dict[str, list[str]]) -> dict[str, str]:
    """Return for each folder the first of its labels that no other has, else its own name.

    Streamlit picks by label: two equal ones would be one choice.
    """
    seen = Counter(label for candidates in labels.values() for label in candidates)
    return {
        name: next((label for label in candidates if seen[label] == 1), name)
        for name, candidates in labels.items()
    }


def _short(created_utc: str) -> str:
    """Return `23 Nov, 20:49`: the sidebar is narrow, the page has the whole date."""
    day, _, rest = moment(created_utc).partition(" 20")
    return f"{day}{rest[2:]}".removesuffix(" UTC")


def _show_damaged(damaged: Sequence[DamagedFolder]) -> None:
    if damaged:
        with st.expander(
            count(len(damaged), "folders that cannot be read").replace("1 folders", "1 folder")
        ):
            st.html(part("pairs", [(found.path.name, found.reason) for found in damaged]))


def _show_nothing(root: Path, damaged: Sequence[DamagedFolder]) -> None:
    reasons = [found.reason for found in damaged]
    st.html(part("headline", str(root), "No run to show yet.", reasons))
    st.markdown("A scan of a network on labeled images makes one:")
    st.code("audit scan MODEL --data DIR", language=None)
