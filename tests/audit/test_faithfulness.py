"""The proxy: which pixels are kept, what replaces the others, and what is read off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from audit.cases_section import PROXY_CAUTION
from audit.faithfulness import (
    BASELINE,
    FAITHFULNESS_THRESHOLD,
    faithfulness,
    kept_regions,
    region_evidence,
)

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "proxy.json"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Recorder:
    """A classifier of two classes by the image's mean, which keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([mean, -mean], dim=1)


def test_the_region_is_the_highest_share_of_the_map() -> None:
    maps = noise(3, 10, 10).abs()
    for fraction in (0.01, 0.1, 0.3, 1.0):
        regions = kept_regions(maps, (10, 10), fraction)
        for heat, region in zip(maps.numpy(), regions.numpy(), strict=True):
            order = np.argsort(-heat.ravel())[: round(fraction * 100)]
            assert set(np.flatnonzero(region)) == set(order)


def test_pixels_where_the_map_is_zero_are_never_kept() -> None:
    maps = torch.zeros(2, 8, 8)
    maps[0, 1, 2] = 0.5
    regions = kept_regions(maps, (8, 8), 0.5)
    assert regions[0].nonzero().tolist() == [[1, 2]] and not regions[1].any()


@pytest.mark.parametrize("baseline", ["mean", "blur"])
def test_the_network_is_shown_the_region_alone_and_everything_but_it(baseline: str) -> None:
    images, maps = noise(2, 3, 20, 20), noise(2, 20, 20, seed=1).abs()
    network = Recorder()
    region_evidence(
        network,
        images,
        torch.tensor([0, 1]),
        maps,
        fractions=(0.2,),
        baseline=baseline,  # type: ignore[arg-type]
    )
    alone, without = network.seen
    region = kept_regions(maps, (20, 20), 0.2).unsqueeze(1).expand_as(images)
    if baseline == "mean":
        canvas = images.mean(dim=(2, 3), keepdim=True).expand_as(images).numpy()
    else:  # a twentieth of the side, as scipy blurs
        canvas = gaussian_filter(images.numpy(), (0, 0, 1.0, 1.0), mode="nearest", truncate=3.0)
    np.testing.assert_allclose(alone, np.where(region, images, canvas), atol=1e-9)
    np.testing.assert_allclose(without, np.where(region, canvas, images), atol=1e-9)


def test_faithfulness_is_the_mean_probability_of_the_true_class_by_the_region_alone() -> None:
    images, maps = noise(4, 3, 16, 16), noise(4, 4, 4, seed=1).abs()
    targets = torch.tensor([0, 1, 1, 0])
    network = Recorder()
    found = faithfulness(network, images, targets, maps, fractions=(0.1, 0.4))
    assert len(network.seen) == 2  # one pass a fraction
    logits = [Recorder()(seen) for seen in network.seen]
    expected = [
        np.mean([float(part[i].exp()[target] / part[i].exp().sum()) for part in logits])
        for i, target in enumerate(targets)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_map_on_what_the_network_uses_scores_higher_than_one_beside_it() -> None:
    images = torch.zeros(2, 3, 20, 20, dtype=torch.float64)
    images[:, :, 2:8, 2:8] = 5.0
    images[:, :, 12:18, 12:18] = -5.0
    maps = torch.zeros(2, 20, 20)
    maps[0, 2:8, 2:8] = 1
    maps[1, 12:18, 12:18] = 1
    on, beside = faithfulness(Recorder(), images, torch.tensor([0, 0]), maps).tolist()
    assert on > 0.5 > beside


def test_images_do_not_influence_each_other() -> None:
    images, maps, targets = (
        noise(3, 3, 16, 16),
        noise(3, 4, 4, seed=1).abs(),
        torch.tensor([0, 1, 0]),
    )
    together = faithfulness(Recorder(), images, targets, maps)
    alone = [
        faithfulness(Recorder(), images[i : i + 1], targets[i : i + 1], maps[i : i + 1])
        for i in range(3)
    ]
    np.testing.assert_allclose(together, torch.cat(alone), rtol=1e-12)


def test_what_ships_and_what_is_said_of_it_is_what_the_benchmark_found() -> None:
    results = json.loads(RESULTS.read_text())
    summary, config = results["summary"], results["config"]
    assert config["chosen"] == f"insertion/{BASELINE}"
    assert config["thresholds"][config["chosen"]] == FAITHFULNESS_THRESHOLD
    assert f"on {summary['pictures']} composed pictures" in PROXY_CAUTION
    kappa = [summary[f"gradcam_kappa{end}"] for end in ("", "_low", "_high")]
    assert "kappa {:.2f}, 95 % {:.2f} to {:.2f}".format(*kappa) in PROXY_CAUTION
    assert f"AUROC {summary['gradcam_auroc']:.2f})" in PROXY_CAUTION
    assert f"better (AUROC {summary['gradcam_control_auroc']:.2f})" in PROXY_CAUTION
