"""A gate passes what meets its limits, trips on the rest, and never passes for want of a number."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from audit.criteria import CRITERIA
from audit.errors import RunError, UsageError
from audit.files import write_json
from audit.gate import GateConfig, Limits, Outcome, gate
from audit.runs import Run, open_run, start_run
from audit.summary import gate_failures
from tests.run_builder import build_run

Command = Callable[..., tuple[int, str, str]]
GROUPS = [
    {"sentence": "Images called 3 share the corner.", "size": 30, "share_of_errors": 0.5},
    {"sentence": "Twos are called fives.", "size": 6, "share_of_errors": 0.1},
]


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished scan of 360 images with rejected and accepted repairs, no cases and no groups."""
    root = tmp_path_factory.mktemp("runs")
    run = build_run(root, repairs=("rejected", "accepted", "rejected"))
    run.write_images({**run.images.to_dict("list"), "case": [None] * 360})
    run.write_info(cases=None)
    (run.path / "groups.json").unlink()
    return open_run(run.path)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished scan with groups and with cases by masks of its first 200 images."""
    run = build_run(tmp_path_factory.mktemp("judged"), verdict="none")
    images = run.images
    # 100 of case 1, 10 of case 2, 60 of case 3, 30 of case 4, 160 without.
    cases = [1] * 100 + [2] * 10 + [3] * 60 + [4] * 30 + [None] * 160
    run.write_images({**images.to_dict("list"), "case": cases})
    write_json(run.path / "groups.json", {"schema_version": 1, "groups": GROUPS})
    run.write_info(cases={"source": "masks"})
    return open_run(run.path)


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Call `audit gate` by its entry point, in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["audit", "gate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module("audit.cli").main()
        written = capfd.readouterr()
        return int(ended.value.code or 0), written.out, written.err

    return call


def _only(run: Run, config: GateConfig) -> Outcome:
    (outcome,) = gate(run, config).outcomes
    return outcome


def _limits(asked: dict[str, Any]) -> Limits:
    return Limits(**asked)


def _finished(root: Path, **info: Any) -> Run:
    """A finished scan that holds nothing but its record."""
    run = start_run(root, "small")
    run.finish(**info)
    return run


def _wilson(successes: int, n: int) -> tuple[float, float]:
    """The roots of (p - share)^2 = z^2 p (1 - p) / n, in which Wilson's interval ends."""
    z, share = 1.959963984540054, successes / n
    a, b, c = 1 + z * z / n, -(2 * share + z * z / n), share * share
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


# -------------------------------------------------------------------- what is measured


def test_accuracy_and_its_interval_are_those_of_the_images(scanned: Run) -> None:
    for split, images in (("all", scanned.images), *scanned.images.groupby("split")):
        right, n = int(images["right"].sum()), len(images)
        found = _only(scanned, GateConfig(limits=Limits(min_accuracy=0.5), split=split)).measured
        assert (found.value, found.n) == (right / n, n)
        assert (found.low, found.high) == pytest.approx(_wilson(right, n), abs=1e-12)


def test_cross_entropy_is_the_mean_over_the_images(scanned: Run) -> None:
    found = _only(scanned, GateConfig(limits=Limits(max_cross_entropy=1.0))).measured
    assert found.value == pytest.approx(scanned.images["ce"].mean(), abs=1e-12)
    assert found.low is not None and found.high is not None
    assert found.low < found.value < found.high


def test_the_worst_class_is_the_one_with_the_least_share_right(scanned: Run) -> None:
    shares = scanned.images.groupby("label_name")["right"].mean()
    found = _only(scanned, GateConfig(limits=Limits(min_worst_class=0.1))).measured
    assert found.value == pytest.approx(shares.min(), abs=1e-12)
    assert found.note == shares.idxmin()


def test_a_confident_gate_takes_the_class_that_vouches_for_least(tmp_path: Path) -> None:
    classes = [
        {"name": "many", "n": 100, "value": 0.9, "low": 0.826, "high": 0.945},
        {"name": "few", "n": 3, "value": 1.0, "low": 0.438, "high": 1.0},
    ]
    run = start_run(tmp_path, "small")
    run.finish(metrics={"all": {"n": 103, "per_class": classes, "worst_class": classes[0]}})
    limits = Limits(min_worst_class=0.8)
    plain = _only(run, GateConfig(limits=limits))
    assert (plain.measured.note, plain.judged, plain.passed) == ("many", 0.9, True)
    sure = _only(run, GateConfig(limits=limits, confident=True))
    assert (sure.measured.note, sure.judged, sure.passed) == ("few", 0.438, False)


@pytest.mark.parametrize(
    ("limit", "count"),
    [("min_case1", 100), ("max_case2", 10), ("max_case3", 60), ("max_case4", 30)],
)
def test_case_shares_are_of_the_images_that_have_a_case(
    judged: Run, limit: str, count: int
) -> None:
    outcome = _only(judged, GateConfig(limits=_limits({limit: 0.3})))
    found = outcome.measured
    assert (found.value, found.n) == (count / 200, 200)
    assert (found.low, found.high) == pytest.approx(_wilson(count, 200), abs=1e-12)
    assert found.note == "maps judged by masks; 160 further images have no case"
    assert outcome.passed  # 50 % is at least 30 %, and 5, 30 and 15 % are at most that


def test_case_shares_follow_the_split(judged: Run) -> None:
    images = judged.images[judged.images["split"] == "val"]
    known = images["case"].dropna()
    found = _only(judged, GateConfig(limits=Limits(max_case3=1.0), split="val")).measured
    assert found.n == len(known) > 0
    assert found.value == sum(case == 3 for case in known) / len(known)


def test_flags_and_groups_are_counted(scanned: Run, judged: Run) -> None:
    flagged = _only(scanned, GateConfig(limits=Limits(max_flagged=0)))
    assert (flagged.measured.value, flagged.passed) == (1, False)
    assert flagged.measured.note == "localized: features.21"
    clear = _only(judged, GateConfig(limits=Limits(max_flagged=0)))
    assert (clear.measured.value, clear.measured.note, clear.passed) == (0, "none", True)
    groups = gate(judged, GateConfig(limits=Limits(max_groups=1, max_group_share=0.5)))
    assert [(one.measured.value, one.passed) for one in groups.outcomes] == [
        (2, False),
        (0.5, True),
    ]
    assert groups.outcomes[1].measured.note == GROUPS[0]["sentence"]


def test_a_repair_is_judged_by_its_held_out_images(scanned: Run) -> None:
    result = gate(scanned, GateConfig(limits=Limits(min_accuracy=0.5), repair=True))
    accepted = next(one for one in scanned.repairs if one.decision == "accepted")
    assert (result.repair, result.split) == (accepted.name, "test")
    found = result.outcomes[0].measured
    assert found.value == pytest.approx(accepted.images["right_after"].mean(), abs=1e-12)
    assert found.n == len(accepted.images)
    assert found.value > scanned.info["metrics"]["test"]["accuracy"]["value"]


# -------------------------------------------------------------------- pass and fail


def test_a_limit_that_is_met_exactly_is_met(scanned: Run) -> None:
    share = scanned.info["metrics"]["all"]["accuracy"]["value"]
    entropy = scanned.info["metrics"]["all"]["cross_entropy"]["value"]
    exact = Limits(min_accuracy=share, max_cross_entropy=entropy)
    assert gate(scanned, GateConfig(limits=exact)).failed == ()
    beyond = Limits(
        min_accuracy=math.nextafter(share, 1), max_cross_entropy=math.nextafter(entropy, 0)
    )
    assert len(gate(scanned, GateConfig(limits=beyond)).failed) == 2


def test_a_confident_gate_compares_the_end_nearer_to_failing(scanned: Run) -> None:
    metrics = scanned.info["metrics"]["all"]
    low, high = metrics["accuracy"]["low"], metrics["cross_entropy"]["high"]
    met = Limits(min_accuracy=low, max_cross_entropy=high)
    missed = Limits(min_accuracy=low + 1e-9, max_cross_entropy=high - 1e-9)
    assert gate(scanned, GateConfig(limits=met, confident=True)).failed == ()
    failed = gate(scanned, GateConfig(limits=missed, confident=True)).failed
    assert [one.judged for one in failed] == [low, high]
    assert gate(scanned, GateConfig(limits=missed)).failed == ()  # the estimates pass


def test_the_failure_names_the_criterion_with_digits_that_tell_the_numbers_apart(
    scanned: Run,
) -> None:
    share = scanned.info["metrics"]["all"]["accuracy"]["value"]
    result = gate(scanned, GateConfig(limits=Limits(min_accuracy=share + 1e-5)))
    measured, required = f"{share:.3%}", f"{share + 1e-5:.3%}"
    assert measured != required
    assert gate_failures(result) == (
        f"the gate tripped: accuracy {measured} is below {required} (--min-accuracy)"
    )


# -------------------------------------------------------------------- no pass for want of a number


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_case3": 0.2}, ["has a case", "--masks DIR"]),
        ({"max_groups": 3}, ["no groups.json", "scan again"]),
        ({"max_group_share": 0.5}, ["no groups.json", "scan again"]),
    ],
)
def test_a_number_that_was_not_measured_is_an_error(
    scanned: Run, limits: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(RunError) as error:
        gate(scanned, GateConfig(limits=_limits(limits)))
    assert all(word in str(error.value) for word in words)


def test_the_runs_own_word_on_missing_cases_is_passed_on(tmp_path: Path) -> None:
    run = _finished(tmp_path, cases={"source": "proxy", "note": "The proxy tells nothing."})
    run.write_images({"path": ["a.png"], "split": ["test"]})
    with pytest.raises(RunError, match="has a case: The proxy tells nothing"):
        gate(run, GateConfig(limits=Limits(max_case3=0.2)))


def test_a_group_without_its_share_is_an_error_and_no_group_is_none(tmp_path: Path) -> None:
    run = _finished(tmp_path)
    config = GateConfig(limits=Limits(max_group_share=0.0))
    write_json(run.path / "groups.json", {"schema_version": 1, "groups": []})
    assert not gate(open_run(run.path), config).failed
    write_json(run.path / "groups.json", {"schema_version": 1, "groups": [{"size": 3}]})
    with pytest.raises(RunError, match="share_of_errors"):
        gate(open_run(run.path), config)


@pytest.mark.parametrize("status", ["running", "failed"])
def test_an_unfinished_scan_is_not_judged(tmp_path: Path, status: str) -> None:
    run = start_run(tmp_path, "small", {"metrics": {"all": {"accuracy": {"value": 1.0}}}})
    if status == "failed":
        run.fail("no space left")
    with pytest.raises(RunError, match=f"is {status}"):
        gate(run, GateConfig(limits=Limits(min_accuracy=0.5)))


def test_an_empty_split_and_a_missing_number_are_errors(tmp_path: Path) -> None:
    run = start_run(tmp_path, "small")
    run.finish(metrics={"all": {"n": 0, "cross_entropy": {"value": None}}})
    with pytest.raises(RunError, match="no images in the split 'test'; splits: all"):
        gate(run, GateConfig(limits=Limits(max_cross_entropy=1), split="test"))
    with pytest.raises(RunError, match="no cross entropy"):
        gate(run, GateConfig(limits=Limits(max_cross_entropy=1)))
    with pytest.raises(RunError, match="no accuracy per class"):
        gate(run, GateConfig(limits=Limits(min_worst_class=1), confident=True))


def test_a_repair_that_was_not_accepted_does_not_pass(tmp_path: Path) -> None:
    run = _finished(tmp_path)
    run.start_repair("conv").finish(decision="rejected")
    with pytest.raises(RunError, match=r"no accepted repair .*the newest was rejected"):
        gate(run, GateConfig(limits=Limits(min_accuracy=0.0), repair=True))


@pytest.mark.parametrize("value", [-0.1, 1.1, 90, math.nan, math.inf])
def test_a_share_outside_0_to_1_is_wrong_usage(value: float) -> None:
    with pytest.raises(UsageError, match="--min-accuracy is .* a share from 0 to 1"):
        Limits(min_accuracy=value)


def test_every_limit_has_a_criterion_and_no_two_share_an_option() -> None:
    assert list(Limits.__dataclass_fields__) == list(CRITERIA)
    assert len({one.option for one in CRITERIA.values()}) == len(CRITERIA)
    for name, one in CRITERIA.items():
        assert name.startswith(one.sense)


# -------------------------------------------------------------------- the command


def test_a_run_that_meets_its_limits_exits_with_0(command: Command, judged: Run) -> None:
    code, out, err = command(
        *(judged.path, "--min-accuracy", ".9", "--max-case3", ".3", "--no-flag"),
        *("--max-groups", "2", "--max-cross-entropy", "1.5"),
    )
    assert (code, err) == (0, "")
    assert "Passed: 5 of 5 criteria met." in out
    assert "30.0% [24.1%, 36.7%]" in out and "at most 30.0%" in out
    assert "FAIL" not in out


def test_a_run_that_misses_a_limit_exits_with_3_and_says_which(
    command: Command, judged: Run
) -> None:
    code, out, err = command(judged.path, "--max-case3", ".2", "--min-case1", ".5")
    assert code == 3
    assert out.count("FAIL") == 1 and "Tripped: 1 of 2 criteria met." in out
    assert err == (
        "error: the gate tripped: right, inaccurate map 30.0% is above 20.0% (--max-case3)\n"
    )


def test_json_is_one_document_whether_it_passes_or_trips(command: Command, judged: Run) -> None:
    images: pd.DataFrame = judged.images
    code, out, _ = command(judged.path, "--min-accuracy", "1", "--max-case2", ".1", "--json")
    document = json.loads(out)
    assert code == 3 and document["passed"] is False
    assert (document["run"], document["repair"], document["split"], document["confident"]) == (
        *(str(judged.path), None, "all", False),
    )
    accuracy, case2 = document["criteria"]
    assert accuracy["passed"] is False and case2["passed"] is True
    assert accuracy["measured"]["value"] == accuracy["judged"] == images["right"].mean()
    assert (case2["option"], case2["required"]) == ("--max-case2", 0.1)
    assert case2["measured"]["n"] == 200
    code, out, _ = command(judged.path, "--max-case2", ".1", "--json")
    assert code == 0 and json.loads(out)["passed"] is True


def test_the_newest_run_is_judged_where_none_is_named(command: Command, tmp_path: Path) -> None:
    _finished(tmp_path / "runs").write_verdict({"verdict": "none", "layers": []})
    newest = _finished(tmp_path / "runs")
    newest.write_verdict({"verdict": "localized", "layers": ["conv"]})
    code, out, err = command("--no-flag")
    assert code == 3 and newest.name in out
    assert err == "error: the gate tripped: flagged layers 1 is above 0 (--no-flag)\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, ["without a criterion", "--min-accuracy", "--max-group-share"]),
        (["--min-accuracy", "90"], 2, ["--min-accuracy"]),
        (["--min-accuracy", "nan"], 2, ["--min-accuracy"]),
        (["--max-groups", "-1"], 2, ["--max-groups"]),
        (["--max-groups", "some"], 2, ["--max-groups"]),
        (["--min-accuracy", ".5", "--split", "dev"], 2, ["--split is 'dev'", "all, train, val"]),
        (["--min-accuracy", ".5", "--repair", "--split", "val"], 2, ["--split val", "--repair"]),
        (["--no-flag", "--repair"], 2, ["--no-flag with --repair", "scan the repaired weights"]),
        (["--nonsense"], 2, ["--nonsense"]),
        (["--max-case3", ".2"], 1, ["has a case", "--masks DIR"]),
        (["--max-groups", "0"], 1, ["no groups.json"]),
    ],
)
def test_a_gate_that_cannot_judge_says_so_in_one_line_and_prints_no_result(
    command: Command, scanned: Run, arguments: list[str], code: int, words: list[str]
) -> None:
    ended, out, err = command(scanned.path, *arguments)
    assert (ended, out) == (code, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_a_gate_without_a_run_says_how_to_make_one(command: Command) -> None:
    code, out, err = command("--no-flag")
    assert (code, out) == (1, "") and "audit scan MODEL" in err
    code, _, err = command("nowhere", "--no-flag")
    assert code == 1 and "nowhere" in err


def test_a_gate_needs_no_torch(scanned: Run) -> None:
    script = (
        "import sys; sys.argv = sys.argv[1:]\n"
        "from audit.cli import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    arguments = ["audit", "gate", str(scanned.path), "--min-accuracy", "0"]
    finished = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
