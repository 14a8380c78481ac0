"""The 1,000 ImageNet-1k classes in the order of every ImageNet network's outputs.

`imagenet_classes.tsv` holds one line per class: WordNet synset id, lemmas. Both come from the data
files of timm (`imagenet_synsets.txt` and `imagenet_synset_to_lemma.txt`), Copyright Ross Wightman,
Apache License 2.0.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from importlib.resources import files


def synset_ids() -> tuple[str, ...]:
    """Return the WordNet synset id of each output, such as 'n01440764'."""
    return tuple(synset for synset, _ in _table())


def lemmas() -> tuple[tuple[str, ...], ...]:
    """Return every name of each output: ('tench', 'Tinca tinca')."""
    return tuple(names for _, names in _table())


def names() -> tuple[str, ...]:
    """Return one readable and unique name per output.

    It is the first lemma; where two classes share it (cranes that fly and cranes that lift), the
    synset id follows: 'crane (n02012849)'. Case does not tell two names apart, as folders on some
    systems would not either.
    """
    first = [(synset, names[0]) for synset, names in _table()]
    shared = Counter(name.casefold() for _, name in first)
    return tuple(
        f"{name} ({synset})" if shared[name.casefold()] > 1 else name for synset, name in first
    )


@cache
def _table() -> tuple[tuple[str, tuple[str, ...]], ...]:
    text = files("audit.networks").joinpath("imagenet_classes.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines())
    return tuple((synset, tuple(names.split(", "))) for synset, names in rows)
