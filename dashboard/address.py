"""What is looked at, in the page's address: a link shows another person the same selection.

A widget takes its first value from the address and writes back what is chosen. Links between the
pages are made here too, so that they all name run and repair alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlencode

import streamlit as st

__all__ = ["begin", "begin_many", "begin_range", "link", "write"]


def begin(key: str, name: str, default: str, choices: Collection[str] | None = None) -> None:
    """Give a widget the address's value before it is drawn, the default where that is none."""
    held = st.session_state.get(key)
    if held is None or (choices is not None and held not in choices):
        given = st.query_params.get(name, default)
        st.session_state[key] = given if choices is None or given in choices else default


def begin_many(key: str, name: str, choices: Collection[str]) -> None:
    """The same for a widget of several choices, none of them at first."""
    if key not in st.session_state:
        st.session_state[key] = st.query_params.get_all(name)
    st.session_state[key] = [one for one in st.session_state[key] if one in choices]


def begin_range(key: str, name: str, whole: tuple[float, float]) -> None:
    """The same for a widget of a range, `0.2~0.5` in the address."""
    if key in st.session_state:
        return
    st.session_state[key] = whole
    low, separator, high = st.query_params.get(name, "").partition("~")
    try:
        ends = (float(low), float(high)) if separator else whole
    except ValueError:
        return
    if whole[0] <= ends[0] <= ends[1] <= whole[1]:
        st.session_state[key] = ends


def write(name: str, value: Any, default: Any = None) -> None:
    """Write one value into the address; the default is left out of it."""
    text = _written(value)
    if value == default or text in ("", []):
        st.query_params.pop(name, None)
    elif st.query_params.get_all(name) != ([text] if isinstance(text, str) else text):
        st.query_params[name] = text


def link(page: str, **values: Any) -> str:
    """Return the address of a page that shows the chosen run and repair, and what is given."""
    known: Mapping[str, Any] = {
        name: st.session_state.get(name) for name in ("run", "repair") if st.session_state.get(name)
    }
    pairs = {name: _written(value) for name, value in {**known, **values}.items() if value}
    return f"{page}?{urlencode(pairs, doseq=True)}"


def _written(value: Any) -> str | list[str]:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "~".join(f"{end:g}" for end in value)
    return [str(one) for one in value] if isinstance(value, list) else str(value)
