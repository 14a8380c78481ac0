"""Fifty raters vote at once, a hundred votes each: are all kept, none twice, none lost to a kill?

Two processes serve votes through the study's store, as two dashboards on one database would: an
answer is acknowledged once `VoteStore.record` has come back. Fifty clients vote over the loopback,
send one vote in ten twice, as a double click does, and send again whatever was not acknowledged.
Each database sees this twice: in peace, and with `kill -9` of both servers one after the other. In
PostgreSQL's case every process of the database is killed too, and it has to recover. What is then
in the database is held against what the clients were told.

    python benchmarks/study_load.py [--only sqlite|postgresql] [--work local/study_load]

PostgreSQL is Debian's package, installed where it is missing and run in a temporary folder, on the
loopback, as the user `postgres`; so it takes root. A pass that is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import socketserver
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from audit.errors import VotesError
from audit.files import read_json, write_json
from dashboard.study.design import ANSWERS, Item, StudyDesign, answer_meaning, questions
from dashboard.study.results import side_balance
from dashboard.study.store import Study, VoteStore

RATERS, ITEMS, CHECKS, SEED = 50, 49, 2, 20261125
SERVERS = 2
SENT_TWICE = 0.1
LIMIT_S = 420.0
DATABASES, PASSES = ("sqlite", "postgresql"), ("calm", "killed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=DATABASES)
    parser.add_argument("--work", type=Path, default=Path("local/study_load"))
    parser.add_argument("--serve", type=json.loads, metavar="[URL, STUDY, PORT]", help="(internal)")
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    for database in DATABASES if options.only is None else (options.only,):
        for kind in PASSES:
            done = options.work / f"{database}-{kind}.json"
            if not done.is_file():
                write_json(done, measure(database, kill=kind == "killed"))
            print(f"{database}, {kind}: {read_json(done)}", flush=True)
    rows = [options.work / f"{database}-{kind}.json" for database in DATABASES for kind in PASSES]
    if all(path.is_file() for path in rows):
        report([read_json(path) for path in rows])


def report(rows: list[dict[str, Any]]) -> None:
    from results_file import configuration, print_table, write_results

    summary: dict[str, float] = {}
    for row in rows:
        end = row["database"] if row["pass"] == "calm" else f"killed_{row['database']}"
        for name in ("votes_sent", "votes_kept", "votes_doubled", "acknowledged_lost"):
            summary[f"{name}_{end}"] = row[name]
        summary[f"after_left_share_{end}"] = row["after_left_share"]
        summary[f"largest_side_excess_{end}"] = row["largest_side_excess"]
        if row["pass"] == "calm":
            summary[f"votes_per_s_{end}"] = row["votes_per_s"]
            summary[f"answer_p95_s_{end}"] = row["answer_p95_s"]
    for database in DATABASES:
        own = [row for row in rows if row["database"] == database]
        summary[f"acknowledged_lost_{database}"] = sum(row["acknowledged_lost"] for row in own)
    shown = ("database", "pass", "votes_sent", "votes_kept", "votes_doubled", "acknowledged_lost")
    more = ("largest_side_excess", "kills", "sends", "votes_per_s", "answer_p95_s")
    print_table(
        "Votes of 50 raters at once", [{name: row[name] for name in shown + more} for row in rows]
    )
    config = configuration(
        "cpu",
        "sqlalchemy",
        "psycopg",
        raters=RATERS,
        votes_each=2 * ITEMS + CHECKS,
        servers=SERVERS,
        sent_twice=SENT_TWICE,
        seed=SEED,
        load_average=[round(load, 1) for load in os.getloadavg()],
    )
    print(write_results("study_load", summary=summary, config=config, rows=rows))


def measure(database: str, *, kill: bool) -> dict[str, Any]:
    """Return what came of one pass."""
    with tempfile.TemporaryDirectory(prefix="study-load-") as folder:
        opened = sqlite_database(Path(folder)) if database == "sqlite" else postgresql_database()
        with opened as (url, kill_database, version):
            store = VoteStore(url)
            study, _ = store.create_study(
                run="load", repair="load", title="", design=load_design(), raters=RATERS
            )
            with Servers(url, study.id) as servers:
                clients = Clients(study, servers.ports)
                started_s = time.monotonic()
                clients.start()
                kills = 0
                if kill:
                    kills = disturb(clients, servers, kill_database)
                clients.join()
                elapsed_s = time.monotonic() - started_s
            row = {"database": database, "pass": "killed" if kill else "calm", "version": version}
            found = compare(store, study, clients)
            store.close()
    return {
        **row,
        **found,
        "kills": kills,
        "sends": clients.sends,
        "votes_per_s": round(len(clients.acknowledged) / elapsed_s, 1),
        "answer_median_s": round(statistics.median(clients.seconds), 4),
        "answer_p95_s": round(statistics.quantiles(clients.seconds, n=20)[-1], 4),
        "elapsed_s": round(elapsed_s, 1),
    }


def compare(store: VoteStore, study: Study, clients: Clients) -> dict[str, Any]:
    """Return how the database differs from what the clients sent and were told."""
    votes = store.votes(study.id)
    kept = {(vote.rater, vote.item, vote.task): vote.answer for vote in votes}
    lost = [key for key, answer in clients.acknowledged.items() if kept.get(key) != answer]
    balance = side_balance(study.design, votes)
    return {
        "votes_sent": len(clients.sent),
        "votes_acknowledged": len(clients.acknowledged),
        "votes_kept": len(kept.keys() & clients.sent),
        "votes_doubled": len(votes) - len(kept),
        "votes_never_sent": len(kept.keys() - clients.sent),
        "acknowledged_lost": len(lost),
        "after_left_share": balance["value"],
        "largest_side_excess": balance["largest"],
    }


def load_design() -> StudyDesign:
    """Return a study of a hundred questions: 49 images in two tasks, and two checks."""
    items = tuple(
        Item(
            number=number,
            image=number,
            path=f"{number}.png",
            label_name="cat",
            predicted_before="dog",
            predicted_after="cat",
            right_before=False,
            right_after=True,
            check=None if number < ITEMS else "blank",
        )
        for number in range(ITEMS + CHECKS)
    )
    return StudyDesign(seed=SEED, tasks=("trust", "prefer"), items=items, per_rater=ITEMS)


# --- the raters -----------------------------------------------------------------------------------


class Clients:
    """Fifty raters, a thread each, and what they were told."""

    def __init__(self, study: Study, ports: list[int]) -> None:
        self.sent: set[tuple[int, int, str]] = set()
        self.acknowledged: dict[tuple[int, int, str], str] = {}
        self.seconds: list[float] = []
        self.sends = 0
        self._study, self._ports = study, ports
        self._lock = threading.Lock()
        self._deadline_s = time.monotonic() + LIMIT_S
        self._threads = [
            threading.Thread(target=self._vote, args=(rater,), daemon=True)
            for rater in range(RATERS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(max(0.0, self._deadline_s - time.monotonic()) + 30)

    def wait_for(self, votes: int) -> bool:
        """Return whether so many votes were acknowledged within the limit."""
        while time.monotonic() < self._deadline_s:
            if len(self.acknowledged) >= votes:
                return True
            time.sleep(0.02)
        return False

    def _vote(self, rater: int) -> None:
        choose = random.Random(SEED + rater)
        connection: Connection | None = None
        for place, question in enumerate(questions(self._study.design, rater)):
            answer = choose.choice(list(ANSWERS[question.task]))
            times = 2 if choose.random() < SENT_TWICE else 1
            key = (rater, question.item.number, question.task)
            with self._lock:
                self.sent.add(key)
            while times and time.monotonic() < self._deadline_s:
                try:
                    started_s = time.monotonic()
                    connection = connection or Connection(self._ports[rater % SERVERS])
                    with self._lock:
                        self.sends += 1
                    told = connection.ask({"rater": rater, "place": place, "answer": answer})
                except (OSError, ValueError):  # the server is gone; send again, to the next one
                    connection = None
                    time.sleep(0.1)
                    continue
                if "error" in told:  # the database is gone for now
                    time.sleep(0.1)
                    continue
                with self._lock:
                    self.acknowledged[key] = answer_meaning(question, answer)
                    self.seconds.append(time.monotonic() - started_s)
                times -= 1


class Connection:
    """Lines of JSON to a server and back."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=90)
        self._answers = self._socket.makefile("r")

    def ask(self, document: dict[str, Any]) -> dict[str, Any]:
        self._socket.sendall((json.dumps(document) + "\n").encode())
        answer: dict[str, Any] = json.loads(self._answers.readline())
        return answer


# --- the servers ----------------------------------------------------------------------------------


class Servers:
    """Processes that keep votes, each on a port of its own; started again after a kill."""

    def __init__(self, url: str, study_id: str) -> None:
        self._url, self._study_id = url, study_id
        self.ports = [free_port() for _ in range(SERVERS)]
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Servers:
        self._processes = [self._start(port) for port in self.ports]
        for port in self.ports:
            await_port(port)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def kill(self, place: int) -> None:
        """Kill one with SIGKILL and start it again."""
        self._processes[place].send_signal(signal.SIGKILL)
        self._processes[place].wait()
        self._processes[place] = self._start(self.ports[place])

    def _start(self, port: int) -> subprocess.Popen[bytes]:
        told = json.dumps([self._url, self._study_id, port])  # an ID may begin with a dash
        command = [sys.executable, __file__, "--serve", told]
        return subprocess.Popen(command)


def serve(url: str, study_id: str, port: int) -> None:
    """Keep votes that come in as lines of JSON; answer each once it is committed."""
    store = VoteStore(url)
    study = store.study(study_id)
    if study is None:
        sys.exit(f"error: no study {study_id}")
    raters = store.raters(study_id)
    asked = [questions(study.design, rater.number) for rater in raters]

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                vote = json.loads(line)
                rater = raters[vote["rater"]]
                question = asked[rater.number][vote["place"]]
                try:
                    new = store.record(rater, question, vote["answer"], seconds=1.0)
                    told: dict[str, Any] = {"new": new}
                except VotesError as error:
                    told = {"error": str(error)}
                self.wfile.write((json.dumps(told) + "\n").encode())

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address, daemon_threads, request_queue_size = True, True, RATERS

    with Server(("127.0.0.1", port), Handler) as server:
        server.serve_forever()


def disturb(clients: Clients, servers: Servers, kill_database: Any) -> int:
    """Kill one server after a fifth of the votes, the other after two, the database after three."""
    total, kills = RATERS * (2 * ITEMS + CHECKS), 0
    for place in range(SERVERS):
        if clients.wait_for((place + 1) * total // 5):
            servers.kill(place)
            kills += 1
    if kill_database is not None and clients.wait_for(3 * total // 5):
        kill_database()
        kills += 1
    return kills


# --- the databases --------------------------------------------------------------------------------


@contextmanager
def sqlite_database(folder: Path) -> Iterator[tuple[str, None, str]]:
    import sqlite3

    yield f"sqlite:///{folder / 'votes.sqlite'}", None, sqlite3.sqlite_version


@contextmanager
def postgresql_database() -> Iterator[tuple[str, Any, str]]:
    """Yield a PostgreSQL of our own, and what kills all its processes and starts it again."""
    if os.geteuid() != 0:
        sys.exit("error: PostgreSQL is run as the user postgres, which takes root; --only sqlite")
    programs = postgresql_programs()
    folder = Path(tempfile.mkdtemp(prefix="study-load-pg-"))
    owner = pwd.getpwnam("postgres")
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    data, port, password = folder / "data", free_port(), secrets.token_urlsafe(16)
    (folder / "password").write_text(password + "\n")
    os.chown(folder / "password", owner.pw_uid, owner.pw_gid)

    environment = {"PATH": os.defpath, "LC_ALL": "C.UTF-8"}
    owned: dict[str, Any] = {
        "user": "postgres",
        "group": "postgres",
        "cwd": folder,
        "env": environment,
    }

    def start() -> subprocess.Popen[bytes]:
        command = [programs / "postgres", "-D", data, "-p", str(port), "-k", folder]
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [*command, "-c", "listen_addresses=127.0.0.1"], stdout=log, stderr=log, **owned
            )
        ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        for _ in range(300):  # recovery included
            if process.poll() is not None:
                break
            if subprocess.run(ready).returncode == 0:
                return process
            time.sleep(0.2)
        raise RuntimeError(f"PostgreSQL does not start: {(folder / 'log').read_text()[-800:]}")

    def start_again() -> subprocess.Popen[bytes]:
        for _ in range(20):  # a child that was born as it was killed still holds the memory
            try:
                return start()
            except RuntimeError:
                time.sleep(0.5)
        return start()

    def kill() -> None:
        nonlocal server
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(server.pid)], capture_output=True, text=True
        )
        children = [int(word) for word in listed.stdout.split()]
        for process in (server.pid, *children):
            end(process)
        server.wait()
        await_end(children)  # they hold the shared memory, and PostgreSQL will not start beside it
        server = start_again()

    subprocess.run(
        [
            *(programs / "initdb", "-D", data, "-U", "study", "--auth=scram-sha-256"),
            f"--pwfile={folder / 'password'}",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        **owned,
    )
    server = start()
    try:
        told = subprocess.run(
            [programs / "postgres", "--version"], capture_output=True, text=True, check=True
        )
        url = f"postgresql://study:{password}@127.0.0.1:{port}/postgres"
        yield url, kill, told.stdout.strip()
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def end(process: int) -> None:
    """Kill one process that this script's database started; it may have ended by itself."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def runs(process: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def await_end(processes: list[int]) -> None:
    """Return once none of them runs any more."""
    for _ in range(300):
        if not any(map(runs, processes)):
            return
        time.sleep(0.1)
    raise RuntimeError("killed processes of PostgreSQL are still there after half a minute")


def postgresql_programs() -> Path:
    """Return where Debian keeps PostgreSQL's programs; install it where there are none."""
    for attempt in range(2):
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if found:
            return found[-1].parent
        if attempt == 0:
            subprocess.run(["apt-get", "install", "-y", "-q", "postgresql"], check=True)
    sys.exit("error: no PostgreSQL under /usr/lib/postgresql; apt-get install postgresql")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_port(port: int) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"no server on port {port} after a minute")


if __name__ == "__main__":
    main()
