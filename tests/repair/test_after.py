"""Cases before and after, calibration and insertion: against the scan's parts and slow loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.calibration import calibration_curve

from audit.after_section import CASE_COLUMNS, after_sentences, case_moves
from audit.faithfulness import faithfulness
from audit.images import ImageFolder, load_pixels
from audit.networks import Network
from audit.runs import RepairFolder, Run
from audit.saliency import layer_maps, normalize_maps
from audit.statistics import calibration_interval
from repair.after import MapComparison, compare_maps

from .conftest import DAMAGED, SIDE, whole_network_predictions

LAST = "block3_conv2"


def compared(
    run: Run, network: Network, folder: ImageFolder, parameters: dict[str, torch.Tensor]
) -> MapComparison:
    test = folder.positions("test")
    found = compare_maps(
        run,
        network,
        parameters,
        folder,
        test,
        whole_network_predictions(network, folder, test),
        whole_network_predictions(network.with_state(parameters), folder, test),
        layer=DAMAGED,
        seed=0,
        batch_size=7,
    )
    assert found is not None
    return found


def changed(network: Network) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    split = network.program.split(DAMAGED)
    return {name: value + 0.3 * torch.randn_like(value) for name, value in split.parameters.items()}


def test_insertion_is_the_scans_own_before_and_after(
    make_run: Callable[..., Run], network: Network, folder: ImageFolder
) -> None:
    parameters = changed(network)
    found = compared(make_run(), network, folder, parameters)
    test = folder.positions("test")
    assert found.source == "proxy" and found.layer == DAMAGED
    assert found.rows.tolist() == list(range(len(test)))
    pixels = load_pixels(folder, test, network.card.preprocessing).pixels
    images = network.normalize(pixels)
    targets = torch.tensor([folder.records[i].label for i in test])
    for column, one in enumerate((network, network.with_state(parameters))):
        maps = layer_maps(one.program, images, targets, layers=[DAMAGED])[DAMAGED]
        expected = faithfulness(one.program.logits, images, targets, normalize_maps(maps))
        np.testing.assert_allclose(found.insertion[:, column], expected, rtol=1e-4, atol=1e-5)
        right = whole_network_predictions(one, folder, test).right
        for row in range(len(test)):
            accurate = expected[row] >= 0.99
            case = {(True, True): 1, (False, True): 2, (True, False): 3, (False, False): 4}
            if abs(float(expected[row]) - 0.99) > 1e-4 and found.cases[row, column]:
                assert found.cases[row, column] == case[bool(right[row]), bool(accurate)]
    assert not np.array_equal(found.insertion[:, 0], found.insertion[:, 1])


def test_masks_of_the_scan_judge_at_its_layer_and_threshold(
    make_run: Callable[..., Run], network: Network, folder: ImageFolder, tmp_path: Path
) -> None:
    root = tmp_path / "masks"
    half = np.zeros((SIDE, SIDE), dtype=np.uint8)
    half[: SIDE // 2] = 255
    for record in folder.records:
        (root / record.path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(half).save(root / record.path)
    run = make_run()
    run.write_info(
        cases={"layer": LAST, "masks": {"path": str(root)}}, config={"map_threshold": 0.4}
    )
    found = compared(run, network, folder, changed(network))
    assert found.source == "masks" and found.layer == LAST
    test = folder.positions("test")
    images = network.normalize(load_pixels(folder, test, network.card.preprocessing).pixels)
    targets = torch.tensor([folder.records[i].label for i in test])
    maps = layer_maps(network.program, images, targets, layers=[LAST])[LAST]
    large = torch.nn.functional.interpolate(
        maps.double().unsqueeze(1), size=(SIDE, SIDE), mode="bilinear"
    ).squeeze(1)
    inside = large[:, : SIDE // 2].sum((1, 2)) / large.sum((1, 2)).clamp_min(1e-12)
    right = whole_network_predictions(network, folder, test).right
    for row, share in enumerate(inside.tolist()):
        if abs(share - 0.4) > 1e-3:
            expected = (1 if share > 0.4 else 3) + (0 if right[row] else 1)
            assert found.cases[row, 0] == expected
    record = found.as_dict(seed=0)
    assert record["pointing"]["images"] == len(test)


def test_the_table_counts_every_pair_of_cases_once() -> None:
    generator = np.random.default_rng(0)
    cases = generator.integers(0, 5, size=(200, 2))
    comparison = MapComparison(
        layer="x",
        source="masks",
        rule="",
        note="",
        rows=np.arange(200) * 2,
        cases=cases,
        insertion=generator.random((200, 2)),
        hits=np.full((200, 2), np.nan),
    )
    record = comparison.as_dict(seed=0)
    for before in range(4):
        for after in range(4):
            expected = sum(tuple(pair) == (before + 1, after + 1) for pair in cases)
            assert record["table"][before][after] == expected
    known = [(b, a) for b, a in cases if b and a]
    assert record["images"] == len(known) and record["without"] == 200 - len(known)
    assert record["accurate"]["before"]["value"] == pytest.approx(
        np.mean([b in (1, 2) for b, _ in known])
    )
    assert record["accurate"]["mcnemar"]["fixed"] == sum(
        b not in (1, 2) and a in (1, 2) for b, a in known
    )
    assert record["pointing"] is None
    columns = comparison.columns(400)
    assert columns["case_after"][2 * 17] == (int(cases[17, 1]) or None)
    assert columns["case_before"][1] is None


def test_calibration_is_what_scikit_learns_curve_adds_up_to() -> None:
    generator = np.random.default_rng(1)
    sure = generator.uniform(0.3, 1.0, size=900)
    right = generator.random(900) < sure**2
    found = calibration_interval(sure, right, seed=0)
    edges = np.linspace(0, 1, 16)
    share, mean = calibration_curve(right, sure, n_bins=15, strategy="uniform")
    counts = np.histogram(sure, edges)[0]
    weights = counts[counts > 0] / counts.sum()
    assert found.value == pytest.approx(float((weights * np.abs(share - mean)).sum()), rel=1e-9)
    assert found.low < found.value < found.high


def test_the_interval_of_a_calibrated_network_holds_its_own_error() -> None:
    generator = np.random.default_rng(2)
    for _ in range(20):
        sure = generator.uniform(0.5, 1.0, size=300)
        found = calibration_interval(sure, generator.random(300) < sure, seed=0)
        assert 0 <= found.low <= found.value <= found.high


def test_a_finished_repair_tells_all_of_it(finished: tuple[Run, RepairFolder]) -> None:
    _, repaired = finished
    info = repaired.info
    images = repaired.images
    table = info["cases"]["table"]
    for before in range(4):
        for after in range(4):
            both = (images["case_before"] == before + 1) & (images["case_after"] == after + 1)
            assert table[before][after] == int(both.sum())
    known = images.dropna(subset=["case_before"])
    assert (known["case_before"].isin([1, 3]) == known["right_before"]).all()
    assert set(info["calibration"]) == {"before", "after", "control"}
    told = " ".join(after_sentences(info))
    value = info["cases"]["insertion"]["difference"]["value"]
    assert f"difference {value:+.3f} [" in told and "Calibration error (ECE): before" in told
    for row, counts in zip(case_moves(info), table, strict=False):
        assert [int(row[column]) for column in CASE_COLUMNS] == counts


def test_an_older_repair_has_nothing_to_tell() -> None:
    assert after_sentences({}) == [] and case_moves({}) == []
