"""The links that raters open, and how a page knows that it was opened by one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import urlencode, urlsplit

import streamlit as st

from dashboard.study import STUDY_ONLY_VARIABLE

__all__ = ["for_raters", "rater_link", "rater_of_link", "this_address"]

_STUDY, _RATER = "study", "rater"


def for_raters() -> bool:
    """Return whether the page was opened by a rater's link, or shows studies only."""
    return _RATER in st.query_params or bool(os.environ.get(STUDY_ONLY_VARIABLE))


def rater_of_link() -> tuple[str, str] | None:
    """Return the study and the token of the link that opened the page, None without."""
    parameters: Mapping[str, str] = st.query_params
    study, token = parameters.get(_STUDY), parameters.get(_RATER)
    return (study, token) if study and token else None


def rater_link(address: str, study_id: str, token: str) -> str:
    return f"{address}/?{urlencode({_STUDY: study_id, _RATER: token})}"


def this_address() -> str:
    """Return the address of this server as the browser knows it."""
    parts = urlsplit(st.context.url or "")
    if not parts.netloc:
        return "http://localhost:8501"
    return f"{parts.scheme}://{parts.netloc}"
