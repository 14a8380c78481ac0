"""A command under way, as a page shows it: what it does, how far it is, and a way to stop it."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from audit.errors import UsageError
from audit.rendering import part
from audit.runs import Run
from dashboard.cli import read_only
from dashboard.jobs import Job, Kind, cancel, forget, job_of, start_job
from dashboard.selection import listed_runs

__all__ = ["may_start", "show_job", "start"]

EVERY_S = 1.0
TITLES: dict[Kind, str] = {"repair": "Repair", "export": "Export"}


def may_start(run: Run) -> bool:
    """Return whether a command may be started on a run: the server allows it and none runs."""
    job = job_of(run.path)
    return not read_only() and (job is None or job.state != "running")


def start(kind: Kind, run: Run, arguments: Sequence[str]) -> None:
    """Start a command on a run, and the page again; a refusal is shown instead."""
    try:
        start_job(kind, run.path, arguments, served=[one.path for one in listed_runs()])
    except (UsageError, OSError) as error:
        st.html(part("banner", "bad", "It was not started.", [str(error)]))
        return
    st.rerun()


def show_job(run: Run, kind: Kind) -> None:
    """Show the last command of a kind on a run, if there was one, and follow it while it runs."""
    job = job_of(run.path)
    if job is None or (job.kind != kind and job.state != "running"):
        return
    if job.state == "running":
        _follow(run)
    else:
        _show_end(run, job)


@st.fragment(run_every=EVERY_S)
def _follow(run: Run) -> None:
    job = job_of(run.path)
    if job is None or job.state != "running":
        st.rerun()  # the whole page: its folder has changed
    what, share = job.progress
    st.html(part("banner", "open", f"{TITLES[job.kind]} under way, {job.seconds:.0f} s.", [what]))
    st.progress(share if share is not None else 0.0)
    if st.button("Cancel", key="job-cancel", disabled=job.cancelled):
        cancel(job)
    _show_lines(job)


def _show_end(run: Run, job: Job) -> None:
    title = TITLES[job.kind]
    match job.state:
        case "done":
            st.html(part("banner", "good", f"{title} finished after {job.seconds:.0f} s."))
        case "cancelled":
            goes_on = "`repair layer --resume` goes on." if job.kind == "repair" else ""
            st.html(part("banner", "open", f"{title} cancelled.", [goes_on] if goes_on else []))
        case _:
            st.html(part("banner", "bad", f"{title} failed.", [job.failure]))
    _show_lines(job)
    if st.button("Dismiss", key="job-dismiss"):
        forget(run.path)
        st.rerun()


def _show_lines(job: Job) -> None:
    with st.expander("What it says"):
        st.code(f"{job.command}\n" + "\n".join(job.lines), language=None)
