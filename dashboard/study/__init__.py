"""People judge the maps of a repair: what they are asked, where it is kept, what it adds up to.

    design.py     who is asked what, in which order, with which map on which side
    material.py   the items and pictures of a repair, and what its cases are by the votes
    store.py      studies, raters and votes in a database
    agreement.py  do raters agree, and does their background matter?
    results.py    the votes added up
    tables.py     the same as text for pages

Source: Halliwell and Lecue 2020, section 4.2.1. Nothing here needs Streamlit or torch.
"""

VOTES_VARIABLE = "LAYERMEND_VOTES"
"""Environment variable: the database of votes, where they are not kept in the runs."""
STUDY_ONLY_VARIABLE = "LAYERMEND_STUDY_ONLY"
"""Environment variable: set where a server shows studies to raters and nothing else."""
