"""The frame around every page: styles, the choice of run and repair, navigation."""

from __future__ import annotations

import streamlit as st

from audit.rendering import stylesheet
from dashboard.rater_links import for_raters
from dashboard.selection import choose, problems_shown

# Room for the content on a phone, and a calmer frame than the default.
FRAME = """
[data-testid="stMainBlockContainer"] { max-width: 76rem;
                                       padding: 4.6rem clamp(1rem, 4vw, 3rem) 4rem; }
[data-testid="stSidebarUserContent"] { padding-top: 1rem; }
.lm-wordmark { font-size: 1.15rem; font-weight: 680; letter-spacing: -.02em; margin: 0; }
"""


def main() -> None:
    st.set_page_config(page_title="layermend", layout="wide")
    st.html(f"<style>{stylesheet()}{FRAME}</style>")
    if for_raters():  # and for nobody else: no other page is there to go to
        st.navigation([st.Page("views/study.py", title="Study")], position="hidden").run()
        return
    pages = [
        st.Page("views/overview.py", title="Overview", default=True),
        st.Page("views/layers.py", title="Layers"),
        st.Page("views/cases.py", title="Cases"),
        st.Page("views/images.py", title="Images"),
        st.Page("views/groups.py", title="Error groups"),
        st.Page("views/repair.py", title="Repair"),
        st.Page("views/export.py", title="Export"),
        st.Page("views/study_setup.py", title="Study"),
        st.Page("views/study_results.py", title="Votes"),
    ]
    page = st.navigation(pages, position="top")
    if choose():
        with problems_shown():
            page.run()


main()
