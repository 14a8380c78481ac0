"""Evidence equals slow references: autograd on the module, loops over images, scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.transform import resize
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from audit.evidence import LayerEvidence, gather_evidence
from audit.map_scores import Objects
from audit.networks.program import Program
from audit.saliency import layer_maps, normalize_maps
from tests.audit.example_networks import NETWORKS, SIZE, images, labels, network

IMAGES = 7
SPLITS = {"together": [7], "uneven": [3, 3, 1], "alone": [1] * 7}


@pytest.fixture(scope="module", params=list(NETWORKS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Program]:
    module = network(request.param, torch.float64)
    return module, Program.capture(module, SIZE)


def gathered(program: Program, sizes: Sequence[int]) -> dict[str, LayerEvidence]:
    given, targets = images(sum(sizes), program.dtype), labels(sum(sizes))
    batches = list(zip(given.split(list(sizes)), targets.split(list(sizes)), strict=True))
    found = gather_evidence(program, batches, list(program.layers), seed=0)
    assert [scores.layer for scores in found] == list(program.layers)
    return {scores.layer.name: scores for scores in found}


def module_gradients(module: nn.Module, given: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Gradient of the mean cross entropy of the images, by parameter name, by backward()."""
    module.zero_grad()
    F.cross_entropy(module(given), targets).backward()
    return {
        name: value.grad.clone()
        for name, value in module.named_parameters()
        if value.grad is not None
    }


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_gradient_norms_are_those_of_all_images_at_once_whatever_the_batches(
    case: tuple[nn.Module, Program], sizes: list[int]
) -> None:
    module, program = case
    found = gathered(program, sizes)
    expected = module_gradients(module, images(IMAGES, torch.float64), labels(IMAGES))
    parameters = dict(module.named_parameters())
    for name, scores in found.items():
        own = scores.layer.parameter_names
        norm = math.sqrt(sum(float((expected[entry] ** 2).sum()) for entry in own))
        weights = math.sqrt(sum(float((parameters[entry].detach() ** 2).sum()) for entry in own))
        assert norm > 0
        assert scores.gradient_norm == pytest.approx(norm, rel=1e-9), name
        assert scores.relative_gradient_norm == pytest.approx(norm / weights, rel=1e-9), name


def half_right(module: nn.Module, given: Tensor) -> tuple[Tensor, np.ndarray]:
    """Labels of which about half are what the network says, and which of them are, bool (N,)."""
    with torch.no_grad():
        said = module(given).argmax(dim=1)
    targets = torch.where(torch.arange(len(given)) % 2 == 0, said, labels(len(given)))
    right = (said == targets).numpy()
    assert 2 <= right.sum() <= len(given) - 2
    return targets, right


def image_rows(
    module: nn.Module, given: Tensor, targets: Tensor, entries: Sequence[str]
) -> np.ndarray:
    """Each image's gradient by all values of these parameters, (N, P), one backward() an image."""
    pairs = zip(given.split(1), targets.split(1), strict=True)
    alone = [module_gradients(module, *pair) for pair in pairs]
    return np.stack(
        [np.concatenate([of[entry].numpy().ravel() for entry in entries]) for of in alone]
    )


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_gradient_scores_are_those_of_single_images_whatever_the_batches(
    case: tuple[nn.Module, Program], sizes: list[int]
) -> None:
    module, program = case
    given = images(IMAGES, torch.float64)
    targets, right = half_right(module, given)
    parts = list(zip(given.split(sizes), targets.split(sizes), strict=True))
    for scores in gather_evidence(program, parts, list(program.layers), seed=0):
        rows = image_rows(module, given, targets, scores.layer.parameter_names)
        signal = (rows.mean(axis=0) ** 2).sum()
        noise = rows.var(axis=0, ddof=1).sum()
        assert scores.gradient_snr == pytest.approx(signal / noise, rel=1e-9)
        wrong = rows[~right]
        cosines = [cosine(a, b) for i, a in enumerate(wrong) for b in wrong[:i]]
        assert scores.gradient_agreement == pytest.approx(np.mean(cosines), rel=1e-9)
        between = cosine(wrong.mean(axis=0), rows[right].mean(axis=0))
        assert scores.gradient_conflict == pytest.approx(-between, rel=1e-9)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_what_one_image_cannot_say_is_unknown() -> None:
    module = network("plain")
    program = Program.capture(module, SIZE)
    said = program.logits(images(1)).argmax(dim=1)
    for targets in (said, (said + 1) % program.classes):
        for scores in gather_evidence(
            program, [(images(1), targets)], list(program.layers), seed=0
        ):
            assert scores.gradient_norm > 0
            unknown = (scores.gradient_snr, scores.gradient_agreement, scores.gradient_conflict)
            assert all(map(math.isnan, unknown))


def test_wrong_images_without_a_gradient_neither_agree_nor_disagree() -> None:
    module = network("plain", torch.float64)
    with torch.no_grad():
        module.conv2.bias.fill_(-0.5)  # type: ignore[operator, union-attr]
    program = Program.capture(module, SIZE)
    given = images(IMAGES, torch.float64)
    given[1:4] *= 0  # conv2 gives nothing on a black image: its rectifier is shut
    targets = (program.logits(given).argmax(dim=1) + 1) % program.classes
    found = gather_evidence(program, [(given, targets)], [program.layer("conv2")], seed=0)
    rows = image_rows(module, given, targets, ["conv2.weight", "conv2.bias"])
    lengths = np.linalg.norm(rows, axis=1)
    assert (lengths > 0).tolist() == [True, False, False, False, True, True, True]
    lit = rows[lengths > 0]
    cosines = [cosine(a, b) for i, a in enumerate(lit) for b in lit[:i]]
    assert found[0].gradient_agreement == pytest.approx(np.mean(cosines), rel=1e-9)


def test_the_weight_of_a_weight_norm_is_the_one_that_the_operation_takes() -> None:
    module = network("plain", torch.float64)
    nn.utils.parametrizations.weight_norm(module.conv2)  # type: ignore[arg-type]
    program = Program.capture(module, SIZE)
    given, targets = images(IMAGES, torch.float64), labels(IMAGES)
    (layer,) = (layer for layer in program.layers if layer.name.startswith("conv2"))
    (scores,) = gather_evidence(program, [(given, targets)], [layer], seed=0)
    plain = network("plain", torch.float64)  # has the same weight: weight norm starts from it
    (gradient,) = [module_gradients(plain, given, targets)]
    own = ["conv2.weight", "conv2.bias"]
    norm = math.sqrt(sum(float((gradient[entry] ** 2).sum()) for entry in own))
    weights = math.sqrt(sum(float((plain.state_dict()[e] ** 2).sum()) for e in own))
    assert scores.gradient_norm == pytest.approx(norm, rel=1e-9)
    assert scores.relative_gradient_norm == pytest.approx(norm / weights, rel=1e-9)


def test_map_scores_equal_loops_over_the_maps_that_people_look_at(
    case: tuple[nn.Module, Program],
) -> None:
    module, program = case
    given = images(20, torch.float64)
    with torch.no_grad():
        logits = module(given)
    targets, right = half_right(module, given)
    parts = list(zip(given.split(6), targets.split(6), strict=True))
    found = gather_evidence(program, parts, list(program.layers), seed=0)
    by_layer = layer_maps(program, given, targets)
    for scores in found:
        if not scores.layer.has_maps:
            numbers = (scores.map_mean_right, scores.map_mean_wrong, scores.penalty)
            assert all(map(math.isnan, (*numbers, scores.map_auroc.value)))
            continue
        maps = normalize_maps(by_layer[scores.layer.name])
        lit = [sum(map(float, one.flatten())) / one.numel() for one in maps]
        of_right = [s for s, is_right in zip(lit, right, strict=True) if is_right]
        of_wrong = [s for s, is_right in zip(lit, right, strict=True) if not is_right]
        assert scores.map_mean_right == pytest.approx(sum(of_right) / len(of_right), rel=1e-9)
        assert scores.map_mean_wrong == pytest.approx(sum(of_wrong) / len(of_wrong), rel=1e-9)
        expected = roc_auc_score(~right, [-s for s in lit])
        assert scores.map_auroc.value == pytest.approx(expected, abs=1e-12)
        assert 0 <= scores.map_auroc.low <= scores.map_auroc.value <= scores.map_auroc.high <= 1
        penalty = 0.0
        for image, s in enumerate(lit):
            error = 1 - float(torch.softmax(logits[image], dim=0)[targets[image]])
            penalty += error * (1 - s) + s * (1 - error)  # Eq. 5 and 6, 1 - p_true for CE
        assert scores.penalty == pytest.approx(penalty / 20, rel=1e-9)


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_scores_against_masks_equal_loops_over_the_enlarged_maps(
    case: tuple[nn.Module, Program], sizes: list[int]
) -> None:
    _, program = case
    given, targets = images(IMAGES, torch.float64), labels(IMAGES)
    masks = np.zeros((IMAGES, *SIZE), dtype=np.float32)
    for image in range(IMAGES):
        masks[image, image : 9 + image, 4 : 10 + 2 * image] = 1
    known = [0, 1, 3, 5, 6]  # the others have no mask
    waiting: list[Objects | None] = []
    start = 0
    for size in sizes:
        rows = [i for i in known if start <= i < start + size]
        of_batch = Objects(rows=[i - start for i in rows], masks=torch.from_numpy(masks[rows]))
        waiting.append(of_batch if rows else None)
        start += size
    parts = list(zip(given.split(sizes), targets.split(sizes), strict=True))
    backwards = list(program.layers)[::-1]  # what comes before is not a matter of the list's order
    found = gather_evidence(program, parts, backwards, seed=0, objects=iter(waiting).__next__)[::-1]
    by_layer = layer_maps(program, given, targets)
    before = math.nan
    for scores in found:
        if not scores.layer.has_maps:
            numbers = (scores.energy_inside, scores.pointing_game, scores.energy_drop)
            assert all(map(math.isnan, numbers))
            continue
        energies, hits = [], []
        for image in known:
            raw = by_layer[scores.layer.name][image].numpy()
            heat = resize(raw, SIZE, order=1, mode="edge", anti_aliasing=False)
            energies.append((heat * masks[image]).sum() / heat.sum() if heat.sum() else 0.0)
            hits.append(heat.sum() > 0 and masks[image].flat[heat.argmax()] > 0)
        assert scores.energy_inside == pytest.approx(np.mean(energies), rel=1e-9)
        assert scores.pointing_game == pytest.approx(np.mean(hits), rel=1e-12)
        drop = before - float(np.mean(energies))
        assert scores.energy_drop == pytest.approx(drop, abs=1e-9, nan_ok=True)
        before = float(np.mean(energies))


def test_without_masks_nothing_is_known_of_the_object() -> None:
    program = Program.capture(network("plain"), SIZE)
    for objects in (None, lambda: None):
        found = gather_evidence(
            program, [(images(3), labels(3))], list(program.layers), seed=0, objects=objects
        )
        for one in found:
            numbers = (one.energy_inside, one.pointing_game, one.energy_drop)
            assert all(map(math.isnan, numbers))


@pytest.mark.parametrize("right", [True, False])
def test_without_wrong_or_without_right_images_their_scores_are_unknown(right: bool) -> None:
    program = Program.capture(network("plain"), SIZE)
    said = program.logits(images(4)).argmax(dim=1)
    targets = said if right else (said + 1) % program.classes
    scores = gather_evidence(program, [(images(4), targets)], list(program.layers), seed=0)[0]
    assert math.isnan(scores.map_auroc.value)
    assert math.isnan(scores.map_mean_wrong) == right
    assert math.isnan(scores.map_mean_right) != right
    assert not math.isnan(scores.penalty)


def test_each_batch_is_handed_on_with_its_logits_and_normalized_maps() -> None:
    program = Program.capture(network("residual"), SIZE)
    given, targets = images(5), labels(5)
    seen: list[tuple[Tensor, Mapping[str, Tensor]]] = []
    gather_evidence(
        program,
        [(given[:3], targets[:3]), (given[3:], targets[3:])],
        list(program.layers),
        seed=0,
        on_batch=lambda logits, maps: seen.append((logits, maps)),
    )
    assert [len(logits) for logits, _ in seen] == [3, 2]
    torch.testing.assert_close(torch.cat([logits for logits, _ in seen]), program.logits(given))
    assert not any(logits.requires_grad for logits, _ in seen)
    for name, expected in layer_maps(program, given, targets).items():
        joined = torch.cat([maps[name] for _, maps in seen])
        torch.testing.assert_close(joined, normalize_maps(expected))


def test_the_program_keeps_its_state_and_asks_for_no_gradients_afterwards() -> None:
    program = Program.capture(network("residual"), SIZE)
    before = {name: value.clone() for name, value in program.state.items()}
    gather_evidence(program, [(images(), labels())], list(program.layers), seed=0)
    assert all(torch.equal(program.state[name], value) for name, value in before.items())
    assert not any(value.requires_grad for value in program.state.values())
