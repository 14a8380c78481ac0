"""Splits are exact, stratified, seeded, stable and blind to order."""

from collections import Counter
from fractions import Fraction

import pytest

from audit.images.records import Split
from audit.images.splits import choose_subset, complete_split, seeded_split

SHARES: dict[Split, Fraction] = {
    "train": Fraction(3, 5),
    "val": Fraction(1, 5),
    "test": Fraction(1, 5),
}


def images(*sizes: int) -> dict[str, int]:
    """Contents and labels of classes of the given sizes."""
    return {f"{label}-{i}": label for label, size in enumerate(sizes) for i in range(size)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "sizes", [(100, 100), (1,) * 1000, (3, 7, 11, 50, 1), tuple(range(1, 60)), (2,) * 99]
)
def test_shares_hold_per_class_and_overall(sizes: tuple[int, ...], seed: int) -> None:
    labels = images(*sizes)
    splits = seeded_split(labels, seed=seed)
    assert splits.keys() == labels.keys()
    per_class = Counter((labels[content], split) for content, split in splits.items())
    for label, size in enumerate(sizes):
        for split, share in SHARES.items():
            assert abs(per_class[label, split] - size * share) < 1
    # Each of the five remainders modulo 5 is rounded for itself, by less than one image a border.
    overall = Counter(splits.values())
    for split, share in SHARES.items():
        assert abs(overall[split] - sum(sizes) * share) <= 4


def test_one_image_per_class_is_still_divided_exactly() -> None:
    splits = seeded_split(images(*[1] * 1000), seed=3)
    assert Counter(splits.values()) == {"train": 600, "val": 200, "test": 200}


def test_a_split_depends_on_the_seed_and_not_on_the_order() -> None:
    labels = images(40, 60)
    backwards = dict(reversed(labels.items()))
    assert seeded_split(labels, seed=1) == seeded_split(backwards, seed=1)
    assert seeded_split(labels, seed=1) != seeded_split(labels, seed=2)


def test_the_split_of_a_seed_never_changes_between_versions() -> None:
    splits = seeded_split(images(5, 5), seed=7)
    train = sorted(content for content, split in splits.items() if split == "train")
    assert train == ["0-1", "0-3", "0-4", "1-0", "1-1", "1-3"]


def test_a_new_image_moves_few_others() -> None:
    labels = images(200, 300, *[1] * 100)
    before = seeded_split(labels, seed=0)
    after = seeded_split(labels | {"new": 0, "another": 7}, seed=0)
    moved = [content for content in labels if before[content] != after[content]]
    assert len(moved) <= 6


def test_missing_validation_is_carved_from_training_alone() -> None:
    labels = images(100, 50)
    given: dict[str, Split] = {c: "test" if c.endswith("5") else "train" for c in labels}
    splits, notes = complete_split(given, labels, seed=0)
    assert all(splits[c] == "test" for c, split in given.items() if split == "test")
    assert Counter(splits.values()) == {"test": 15, "train": 108, "val": 27}
    assert notes == ("no val folder: 1/5 of train, by class, became val (seed 0)",)


@pytest.mark.parametrize(("val", "source", "share"), [(40, "val", 20), (38, "train", 20)])
def test_missing_test_comes_from_validation_only_if_that_is_large(
    val: int, source: str, share: int
) -> None:
    labels = images(50 + val // 2, 50 + val // 2)
    given: dict[str, Split] = {c: "val" if int(c[2:]) < val // 2 else "train" for c in labels}
    splits, notes = complete_split(given, labels, seed=0)
    test = [content for content, split in splits.items() if split == "test"]
    assert {given[content] for content in test} == {source}
    assert len(test) == share
    assert len(notes) == 1


def test_a_single_split_folder_is_divided_like_a_plain_folder() -> None:
    labels = images(50, 50)
    splits, notes = complete_split(dict.fromkeys(labels, "train"), labels, seed=4)
    assert splits == seeded_split(labels, seed=4)
    assert "only a train folder" in notes[0]


def test_missing_training_is_carved_from_validation() -> None:
    labels = images(40)
    given: dict[str, Split] = {c: "val" if int(c[2:]) < 20 else "test" for c in labels}
    splits, _ = complete_split(given, labels, seed=0)
    assert Counter(splits.values()) == {"train": 15, "val": 5, "test": 20}


@pytest.mark.parametrize("limit", [1, 7, 50, 99])
def test_a_subset_keeps_the_shares_of_splits_and_classes(limit: int) -> None:
    labels = images(60, 40)
    splits = seeded_split(labels, seed=0)
    kept = choose_subset(splits, labels, limit=limit, seed=0)
    assert len(kept) == limit
    strata = Counter((splits[c], labels[c]) for c in labels)
    chosen = Counter((splits[c], labels[c]) for c in kept)
    for stratum, size in strata.items():
        assert abs(chosen[stratum] - size * limit / 100) <= 1


def test_a_subset_of_singletons_keeps_the_shares_of_splits() -> None:
    labels = images(*[1] * 1000)
    splits = seeded_split(labels, seed=0)
    kept = choose_subset(splits, labels, limit=100, seed=0)
    assert Counter(splits[c] for c in kept) == {"train": 60, "val": 20, "test": 20}


def test_a_larger_subset_holds_the_smaller() -> None:
    labels = images(60, 40)
    splits = seeded_split(labels, seed=0)
    small = choose_subset(splits, labels, limit=20, seed=0)
    assert small < choose_subset(splits, labels, limit=33, seed=0)
