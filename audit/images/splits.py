"""Which images are for training, which for choosing, which for judging?

A seeded draw, stratified by class. Inside a class the images stand in the order of a hash of seed
and content, and each split takes a stretch of that order; so a draw depends on nothing but seed and
contents, and a new image moves only images beside a border. Shares that do not divide a class
evenly (one image per class, say) are rounded over all classes of the same remainder by systematic
sampling (Madow 1949), so that the whole is divided as asked too.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from fractions import Fraction
from itertools import accumulate, pairwise
from math import ceil

from audit.images.records import SPLITS, Split

__all__ = ["choose_subset", "complete_split", "seeded_split"]

SHARES: dict[Split, Fraction] = {
    "train": Fraction(3, 5),
    "val": Fraction(1, 5),
    "test": Fraction(1, 5),
}
SMALL_VAL = 40  # a smaller validation split is not halved to make a test split


def seeded_split(
    labels: Mapping[str, int], *, seed: int, shares: Mapping[Split, Fraction] = SHARES
) -> dict[str, Split]:
    """Return the split of each image, 60/20/20 within each class to within one image, and overall.

    Args:
        labels: Class of each image, by content hash.
    """
    classes = _by_class(labels)
    quotas = _quotas({label: len(contents) for label, contents in classes.items()}, shares, seed)
    splits: dict[str, Split] = {}
    for label, contents in classes.items():
        ordered = iter(sorted(contents, key=lambda content: _mix(seed, content)))
        for split, quota in quotas[label].items():
            splits |= {next(ordered): split for _ in range(quota)}
    return splits


def complete_split(
    given: Mapping[str, Split], labels: Mapping[str, int], *, seed: int
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Return the split of each image, missing ones carved from those given, and what was done.

    A missing validation split is a fifth of training, a missing test split half of validation if
    that has at least 40 images and otherwise a fifth of training, a missing training split three
    quarters of validation. A single split is divided 60/20/20. Arguments and result are by content
    hash.
    """
    splits = dict(given)
    present = [split for split in SPLITS if split in given.values()]
    if len(present) == 1:
        note = f"only a {present[0]} folder: its images were divided 60/20/20 (seed {seed})"
        return seeded_split(labels, seed=seed), (note,)

    notes = []
    for missing, source, share in _carvings(Counter(given.values())):
        chosen = {content: labels[content] for content, split in given.items() if split == source}
        splits |= seeded_split(chosen, seed=seed, shares={source: 1 - share, missing: share})
        notes.append(
            f"no {missing} folder: {share} of {source}, by class, became {missing} (seed {seed})"
        )
    return splits, tuple(notes)


def choose_subset(
    splits: Mapping[str, Split], labels: Mapping[str, int], *, limit: int, seed: int
) -> set[str]:
    """Return the contents of a subset of `limit` images with the same shares of splits and classes.

    A larger limit keeps what a smaller one chose.
    """
    strata: dict[tuple[Split, int], list[str]] = defaultdict(list)
    for content, split in splits.items():
        strata[split, labels[content]].append(content)
    # Strata of one split and size are staggered evenly: shares below one image still add up.
    alike: dict[tuple[Split, int], list[int]] = defaultdict(list)
    for (split, label), contents in strata.items():
        alike[split, len(contents)].append(label)
    ranked: list[tuple[Fraction, str, str]] = []
    for (split, size), members in alike.items():
        for place, label in enumerate(sorted(members, key=lambda label: _mix(seed, label))):
            start = Fraction(2 * place + 1, 2 * len(members))
            ordered = sorted(_mix(seed, content) + content for content in strata[split, label])
            ranked += [
                ((rank + start) / size, mixed[:64], mixed[64:])
                for rank, mixed in enumerate(ordered)
            ]
    return {content for _, _, content in sorted(ranked)[:limit]}


def _carvings(counts: Mapping[Split, int]) -> Iterable[tuple[Split, Split, Fraction]]:
    """Yield what is missing beside two given splits, what to take it from, and how much."""
    if not counts.get("train"):
        yield "train", "val", Fraction(3, 4)
    if not counts.get("val"):
        yield "val", "train", Fraction(1, 5)
    if not counts.get("test"):
        if counts["val"] >= SMALL_VAL:
            yield "test", "val", Fraction(1, 2)
        else:
            yield "test", "train", Fraction(1, 5)


def _quotas(
    sizes: Mapping[int, int], shares: Mapping[Split, Fraction], seed: int
) -> dict[int, dict[Split, int]]:
    """Return how many images of each class each split gets: the exact share, rounded down or up."""
    alike: dict[tuple[Fraction, ...], list[int]] = defaultdict(list)
    for label, size in sizes.items():
        alike[tuple(size * share % 1 for share in shares.values())].append(label)
    quotas: dict[int, dict[Split, int]] = {}
    for remainders, members in alike.items():
        borders = [Fraction(0), *accumulate(remainders)]
        for place, label in enumerate(sorted(members, key=lambda label: _mix(seed, label))):
            # A split gains one image where start + an integer falls into its stretch.
            start = Fraction(2 * place + 1, 2 * len(members))
            gains = [ceil(high - start) - ceil(low - start) for low, high in pairwise(borders)]
            quotas[label] = {
                split: int(sizes[label] * share) + gain
                for (split, share), gain in zip(shares.items(), gains, strict=True)
            }
    return quotas


def _by_class(labels: Mapping[str, int]) -> dict[int, list[str]]:
    classes: dict[int, list[str]] = defaultdict(list)
    for content, label in labels.items():
        classes[label].append(content)
    return classes


def _mix(seed: int, text: str | int) -> str:
    return hashlib.sha256(f"{seed}\0{text}".encode()).hexdigest()
