"""The database of a search: what cannot be used is one line, and no password is written down."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from audit.errors import RunError, UsageError
from repair.grid_storage import failures_told, open_storage, without_password

SECRET = "s3cret"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "--storage cannot be read; expected postgresql://USER@HOST/NAME or sqlite"),
        ("redis://localhost", "--storage cannot be read; expected postgresql://USER@HOST/NAME"),
        ("oracle://me@localhost/x", "no driver for --storage oracle is installed"),
    ],
)
def test_a_url_that_means_no_database_is_wrong_usage(url: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        open_storage(url, heartbeat_s=10)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_a_database_that_does_not_answer_is_one_line_without_the_password(scheme: str) -> None:
    url = f"{scheme}://me:{SECRET}@127.0.0.1:1/grid?connect_timeout=2"
    with pytest.raises(RunError) as raised:
        open_storage(url, heartbeat_s=10)
    told = str(raised.value)
    assert "database postgresql+psycopg://me:***@127.0.0.1:1/grid?connect_timeout=2 cannot" in told
    assert "onnection" in told and SECRET not in told and "\n" not in told


def test_a_file_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="unable to open database file; .* does the rest"):
        open_storage(f"sqlite:///{tmp_path / 'nowhere' / 'study.db'}", heartbeat_s=10)


def test_a_database_that_is_lost_on_the_way_is_one_line() -> None:
    lost = OperationalError("SELECT 1", {}, Exception("server closed the connection\nmore"))
    message = "cannot be used: server closed the connection; what was"
    with (
        pytest.raises(RunError, match=message),
        failures_told("postgresql://me@host/grid"),
    ):
        raise lost


def test_the_password_is_not_recorded() -> None:
    url = f"postgresql://me:{SECRET}@host/grid"
    for command in (["repair", "grid", "--storage", url], ["repair", "grid", f"--storage={url}"]):
        recorded = without_password(command, url)
        assert SECRET not in " ".join(recorded)
        assert recorded[-1].endswith("://me:***@host/grid")
    assert without_password(["repair", "grid"], None) == ["repair", "grid"]
    assert sa.make_url(url).password == SECRET
