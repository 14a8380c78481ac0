"""The test that all seeds decide by, held against every exchange of signs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from repair.outcome import paired_p


@pytest.mark.parametrize("differing", [1, 2, 5, 8])
def test_few_differing_images_give_the_exact_share_of_exchanges(differing: int) -> None:
    generator = np.random.default_rng(differing)
    theirs = generator.integers(0, 3, 40) / 3
    ours = theirs.copy()
    ours[:differing] += generator.choice([-1 / 3, 1 / 3, 2 / 3], differing)
    differences = (ours - theirs)[:differing]
    sums = [abs(float(np.dot(signs, differences))) for signs in product((-1, 1), repeat=differing)]
    as_large = np.mean([one >= abs(differences.sum()) - 1e-12 for one in sums])
    assert paired_p(ours, theirs, seed=0) == pytest.approx(as_large)


def test_no_difference_is_no_evidence() -> None:
    assert paired_p(np.ones(5), np.ones(5), seed=0) == 1.0
