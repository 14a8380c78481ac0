"""Error groups: against scipy and plain counting; what is planted is named, chance is not."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from audit.chance import added_hypergeometric, holm
from audit.groups import GroupSearch, find_groups

SIDE = 7


def spots(generator: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return maps with a soft spot at each place, y and x in [0, 1], on some noise."""
    down, across = np.mgrid[:SIDE, :SIDE] / (SIDE - 1)
    distance = (down - y[:, None, None]) ** 2 + (across - x[:, None, None]) ** 2
    return np.exp(-distance / 0.05) + 0.3 * generator.random((len(y), SIDE, SIDE))


def unstructured(
    seed: int, *, images: int = 300, classes: int = 3, accuracy: float = 0.7
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, answers and maps; where a class is looked for says nothing about errors."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, images)
    wrong = generator.random(images) > accuracy
    other = (labels + generator.integers(1, classes, images)) % classes
    answers = np.where(wrong, other, labels)
    favorite = generator.random((classes, 2))[answers]
    y, x = (favorite + 0.25 * generator.normal(size=(images, 2))).T
    return labels, answers, spots(generator, y, x)


def search(labels: np.ndarray, answers: np.ndarray, maps: np.ndarray, classes: int) -> GroupSearch:
    return find_groups(labels, answers, np.arange(len(labels)), maps, classes=classes)


# -------------------------------------------------------------------- the tests


def test_one_stratum_is_fishers_exact_test() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        drawn, marked = generator.random((2, 40)) < generator.uniform(0.1, 0.9, (2, 1))
        table = [[(drawn & marked).sum(), (drawn & ~marked).sum()]]
        table += [[(~drawn & marked).sum(), (~drawn & ~marked).sum()]]
        _, p_value = added_hypergeometric(np.zeros(40), drawn, marked)
        assert p_value == pytest.approx(stats.fisher_exact(table, "greater").pvalue)


def test_strata_are_added_as_counting_all_arrangements_says() -> None:
    strata = np.array([0] * 5 + [1] * 4 + [2] * 2)
    drawn = np.array([1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1], dtype=bool)
    marked = np.array([1, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0], dtype=bool)
    observed = int((drawn & marked).sum())
    ways = [
        list(combinations(np.flatnonzero(strata == s), int(drawn[strata == s].sum())))
        for s in (0, 1, 2)
    ]
    counts = [sum(int(marked[list(part)].sum()) for part in chosen) for chosen in product(*ways)]
    expected, p_value = added_hypergeometric(strata, drawn, marked)
    assert expected == pytest.approx(np.mean(counts))
    assert p_value == pytest.approx(np.mean(np.array(counts) >= observed))


def test_holm_is_the_step_down_procedure() -> None:
    generator = np.random.default_rng(1)
    p_values = np.round(generator.random(12) ** 3, 2).tolist()  # with ties
    for alpha in np.linspace(0.005, 0.995, 100):
        rejected: set[int] = set()
        for rank, place in enumerate(np.argsort(p_values)):
            if p_values[place] * (20 - rank) > alpha:
                break
            rejected.add(int(place))
        adjusted = holm(p_values, 20)
        assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected


def test_answers_are_tested_by_the_binomial_test_and_pairs_by_the_hypergeometric() -> None:
    generator = np.random.default_rng(2)
    labels = np.repeat(np.arange(4), [60, 50, 40, 30])
    answers = labels.copy()
    for a, b, count in (
        (0, 3, 20),
        (1, 3, 12),
        (2, 3, 12),
        (0, 1, 4),
        (1, 2, 9),
        (1, 0, 4),
        (3, 0, 5),
    ):
        free = np.flatnonzero((labels == a) & (answers == a))
        answers[free[:count]] = b
    maps = generator.random((len(labels), SIDE, SIDE))
    everything = find_groups(
        labels, answers, np.arange(180), maps, classes=4, alpha=1, minimum=1, at_most=1000
    )
    called, pair = (
        next(g for g in everything.groups if g.kind == "confusion" and g.size == size)
        for size in (44, 20)
    )
    chance = (1 - 30 / 180) / 3
    assert (called.label, called.predicted, called.of) == (None, 3, 66)
    assert called.expected == pytest.approx(66 * chance)
    exact = stats.binomtest(44, 66, chance, "greater").pvalue
    assert called.p_value == pytest.approx(exact)
    # Among errors that are not on 3 and not called 0: on 0 or not, called 3 or not.
    fisher = stats.fisher_exact([[20, 4], [24, 9]], "greater")
    assert (pair.label, pair.predicted) == (0, 3)
    assert pair.p_value == pytest.approx(fisher.pvalue)
    assert pair.expected == pytest.approx(24 * 44 / 57)


# -------------------------------------------------------------------- what is found


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cats that look at the lower right are called dogs; everything else is chance."""
    generator = np.random.default_rng(seed)
    labels = np.repeat([0, 1], 150)
    marked = (np.arange(300) % 3 == 0) & (labels == 0)
    answers = np.where(marked, 1, labels)
    flipped = generator.permutation(300)[:12]
    answers[flipped] = 1 - labels[flipped]
    y = np.where(marked, 0.85, generator.random(300))
    x = np.where(marked, 0.85, generator.random(300))
    return labels, answers, spots(generator, y, x)


def test_a_planted_region_is_named_with_its_confusion() -> None:
    labels, answers, maps = planted()
    found = search(labels, answers, maps, 2).groups
    assert [group.kind for group in found] in (["confusion", "both"], ["both", "confusion"])
    looked = next(group for group in found if group.kind == "both")
    assert looked.region is not None and looked.region.name == "the lower right corner"
    assert (looked.label, looked.predicted) == (0, 1)
    assert 40 <= looked.size <= 60 and looked.size > 2 * looked.expected
    assert set(looked.compared) == set(np.flatnonzero((labels == 1) & (answers == 1)))
    assert looked.compared_share is not None and looked.compared_share < 0.3


def test_groups_that_lie_within_each_other_are_told_once() -> None:
    for seed in range(5):
        found = search(*planted(seed), 2).groups
        assert sum(group.region is not None for group in found) == 1


def test_looking_elsewhere_because_of_the_class_is_no_group() -> None:
    """Every dog is sought in a corner, rightly or wrongly: that is how this network sees dogs."""
    generator = np.random.default_rng(3)
    labels = np.repeat([0, 1, 2], 100)
    answers = labels.copy()
    answers[:40] = 1
    place = np.where(answers == 1, 0.9, 0.5) + 0.1 * generator.normal(size=300)
    found = search(labels, answers, spots(generator, place, place), 3).groups
    assert found and all(group.region is None for group in found)


def test_with_two_classes_a_pair_says_no_more_than_its_answer() -> None:
    labels, answers, maps = planted()
    confusions = [g for g in search(labels, answers, maps, 2).groups if g.kind == "confusion"]
    assert len(confusions) == 1 and confusions[0].test.startswith("exact binomial")


@pytest.mark.parametrize(
    ("classes", "accuracy", "images"), [(2, 0.7, 200), (3, 0.8, 200), (6, 0.5, 250)]
)
def test_chance_alone_gives_groups_in_at_most_one_set_of_twenty(
    classes: int, accuracy: float, images: int
) -> None:
    sets = 60
    alarms = sum(
        bool(
            search(
                *unstructured(seed, images=images, classes=classes, accuracy=accuracy), classes
            ).groups
        )
        for seed in range(sets)
    )
    assert alarms <= 0.05 * sets


def test_a_thousand_classes_of_one_image_each_give_no_group() -> None:
    found = search(*unstructured(0, images=1000, classes=1000, accuracy=0.6), 1000)
    assert found.groups == () and found.tests >= 1000
    assert found.errors == pytest.approx(400, abs=60)


@pytest.mark.parametrize("images", [0, 1, 4])
def test_a_handful_of_images_gives_no_group(images: int) -> None:
    labels = np.zeros(images, dtype=int)
    found = search(labels, 1 - labels, np.ones((images, 3, 3)), 2)
    assert found.groups == () and found.errors == images


def test_without_maps_confusions_are_told_all_the_same() -> None:
    labels, answers, _ = planted()
    found = find_groups(labels, answers, [], np.zeros((0, 1, 1)), classes=2)
    assert [group.kind for group in found.groups] == ["confusion"]
    assert found.errors_with_maps == found.right_with_maps == 0


def test_no_more_groups_than_asked_for_and_none_too_small() -> None:
    found = find_groups(*planted()[:2], np.arange(300), planted()[2], classes=2, at_most=1)
    assert len(found.groups) == 1
    labels, answers, maps = planted()
    many = find_groups(labels, answers, np.arange(300), maps, classes=2, minimum=150)
    assert many.groups == ()


def test_chance_alone_gives_a_group_of_shared_pixels_no_more_often_than_alpha() -> None:
    """Among a thousand classes, as many tests of answers, and one of an artefact."""
    reported = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        labels = generator.integers(0, 1000, 400)
        wrong, carried = generator.random((2, 400)) < 0.4
        answers = np.where(wrong, (labels + generator.integers(1, 1000, 400)) % 1000, labels)
        found = find_groups(
            labels,
            answers,
            np.empty(0, dtype=np.int64),
            np.zeros((0, 1, 1)),
            classes=1000,
            carriers=(np.arange(400), carried),
        )
        reported += len(found.groups)
    assert reported <= stats.binom.ppf(0.999, 200, 0.05)


def test_an_artefact_is_reported_beside_a_thousand_tests_of_answers() -> None:
    generator = np.random.default_rng(5)
    labels = np.arange(400) % 1000
    carried = np.arange(400) % 2 == 0
    wrong = generator.random(400) < np.where(carried, 0.45, 0.25)
    answers = np.where(wrong, (labels + generator.integers(1, 1000, 400)) % 1000, labels)
    seen = generator.permutation(400)
    none = np.empty(0, dtype=np.int64), np.zeros((0, 1, 1))
    found = find_groups(labels, answers, *none, classes=1000, carriers=(seen, carried[seen]))
    (group,) = found.groups
    table = [[(wrong & carried).sum(), (wrong & ~carried).sum()]]
    table += [[(~wrong & carried).sum(), (~wrong & ~carried).sum()]]
    exact = stats.fisher_exact(table, "greater").pvalue
    assert exact * found.tests > 0.05  # counted among the others it would not be
    assert group.p_adjusted == pytest.approx(2 * exact) and group.p_value == pytest.approx(exact)
    assert set(group.members) == set(np.flatnonzero(wrong & carried))
    assert group.expected == pytest.approx(wrong.sum() * carried.mean())
    assert group.compared_share == pytest.approx(carried[~wrong].mean())
    assert not find_groups(labels, answers, *none, classes=1000).groups
