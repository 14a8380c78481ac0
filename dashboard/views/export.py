"""The repaired network to take along: exported by a click, the proof that it is the same, files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import streamlit as st

from audit.rendering import part
from audit.report import export_summary, write_report
from audit.runs import RepairFolder, Run
from audit.wording import byte_size
from dashboard.job_view import may_start, show_job, start
from dashboard.selection import command, problems_shown, selected

BINARY = "application/octet-stream"


def main() -> None:
    run, repair = selected()
    st.html(part("section", "Export"))
    show_job(run, "export")
    if repair is None:
        sentence = "Nothing to export: this run has no repair yet."
        st.html(part("banner", "open", sentence))
    else:
        with problems_shown():
            _show_proof(run, repair)
        _show_files(repair)
    st.html(part("section", "Report", "The whole run as one HTML file, to mail or to print."))
    _download("Report, HTML", f"{run.name}.html", "text/html", lambda: _report(run))


def _show_proof(run: Run, repair: RepairFolder) -> None:
    export = export_summary(repair)
    st.html(part("banner", export["tone"], export["headline"], export["reasons"]))
    if repair.decision == "rejected":
        sentence = "The repair itself was rejected; its files are here to look at, not to ship."
        st.html(part("banner", "bad", sentence))
    if repair.decision == "accepted" and may_start(run):
        again = bool(export["rows"])
        label = "Export to ONNX again" if again else "Export to ONNX"
        if st.button(label, type="secondary" if again else "primary", key="export-start"):
            start("export", run, [f"--repair={repair.name}"])
    if export["rows"]:
        st.html(part("section", "Proof", "The file beside the network, on held-out images."))
        st.html(part("pairs", export["rows"]))
    elif repair.decision == "accepted":
        st.markdown("The same from a terminal, with the check on held-out images:")
        st.code(command(run, "repair", "export"), language=None)


def _show_files(repair: RepairFolder) -> None:
    files = [
        ("ONNX model", repair.onnx_model),
        ("Model card, Markdown", repair.onnx_card),
        ("Proof, JSON", repair.path / "onnx.json"),
        ("Weights, safetensors", repair.weights),
        ("Weights' card, TOML", repair.card),
    ]
    there = [(title, path) for title, path in files if path.is_file()]
    if not there:
        return
    st.html(part("section", "Files"))
    with st.container(horizontal=True):
        for title, path in there:
            label = f"{title}, {byte_size(path.stat().st_size)}"
            name = f"{repair.path.name}-{path.name}"
            _download(label, name, BINARY, path.read_bytes)


def _download(label: str, name: str, kind: str, read: Callable[[], bytes]) -> None:
    # Read when clicked: a VGG's weights are half a gigabyte.
    st.download_button(label, read, file_name=name, mime=kind, on_click="ignore", key=name)


def _report(run: Run) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_report(run, Path(folder) / "report.html").read_bytes()


main()
