"""Which model output does a class folder belong to? Answered by name, never by position.

A folder may be called like the class in the model's card; upper case, underscores, spaces and
hyphens do not matter unless only they tell two classes apart. For a model with the ImageNet classes
it may also be a synset id ("n02012849", also "n02012849-crane") or any of the class's names. A
folder that matches nothing, or two outputs at once, is an error, because a guess here would
silently mislabel every image in it.
"""

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from audit.errors import ClassMismatchError
from audit.images.records import one_line

__all__ = ["match_classes"]

_SYNSET = re.compile(r"(n\d{8})(?:[-_ ].*)?", re.IGNORECASE)
_REMEDY = "rename the folders, or give the model's class names in output order with --classes FILE"

_Tier = tuple[Callable[[str], str], Mapping[str, set[int]]]


def match_classes(folders: Sequence[str], classes: Sequence[str]) -> dict[str, int]:
    """Return the model output of each class folder, by folder name.

    Raises:
        ClassMismatchError: If a folder matches no output or several; the message lists both sides.
    """
    if not classes:
        raise ClassMismatchError(
            "the model's classes have no names, so folders cannot be matched to them; "
            "give the names in output order with --classes FILE"
        )
    synsets = _imagenet_synsets(classes)
    tiers = _tiers(classes, synsets)
    matched: dict[str, int] = {}
    unmatched: list[str] = []
    for folder in folders:
        outputs = _first_hit(folder, tiers)
        if len(outputs) > 1:
            raise ClassMismatchError(_ambiguous(folder, sorted(outputs), classes, synsets))
        if outputs:
            matched[folder] = next(iter(outputs))
        else:
            unmatched.append(folder)
    if unmatched:
        raise ClassMismatchError(_mismatch(unmatched, len(folders), classes))
    return matched


def _plain(name: str) -> str:
    """Return the name without what does not matter: case, separators, Unicode variants."""
    return re.sub(r"[\s_\-]+", "", unicodedata.normalize("NFKC", name).casefold())


def _synset_part(name: str) -> str:
    found = _SYNSET.fullmatch(name)
    return found[1].lower() if found else ""


def _tiers(classes: Sequence[str], synsets: Mapping[int, int]) -> list[_Tier]:
    """Return the ways to match, the surest first; the first that knows a folder decides."""
    tiers: list[_Tier] = [(str, _index(enumerate(classes)))]
    if synsets:
        from audit.networks import imagenet

        ids, names, lemmas = imagenet.synset_ids(), imagenet.names(), imagenet.lemmas()
        tiers.append((_synset_part, _index((o, ids[k]) for o, k in synsets.items())))
        tiers.append((_plain, _index((o, _plain(classes[o])) for o in range(len(classes)))))
        tiers.append((_plain, _index((o, _plain(names[k])) for o, k in synsets.items())))
        tiers.append(
            (_plain, _index((o, _plain(n)) for o, k in synsets.items() for n in lemmas[k]))
        )
    else:
        tiers.append((_plain, _index((o, _plain(name)) for o, name in enumerate(classes))))
    return tiers


def _index(pairs: Iterable[tuple[int, str]]) -> dict[str, set[int]]:
    index: dict[str, set[int]] = defaultdict(set)
    for output, key in pairs:
        if key:
            index[key].add(output)
    return dict(index)


def _first_hit(folder: str, tiers: Sequence[_Tier]) -> set[int]:
    for key, index in tiers:
        hits = index.get(key(folder))
        if hits:
            return hits
    return set()


def _imagenet_synsets(classes: Sequence[str]) -> dict[int, int]:
    """Return the ImageNet class of each output, or nothing if these are other classes.

    Outputs in ImageNet's own order are recognized even if a few names are spelled in another way;
    in any other order, or if only some classes are there, every class must be a known synset id or
    (1000 classes) a unique name.
    """
    if len(classes) != 1000 and not all(_SYNSET.fullmatch(name) for name in classes):
        return {}
    from audit.networks import imagenet

    known = _index(
        (k, _plain(name))
        for k, names in enumerate(zip(imagenet.names(), imagenet.lemmas(), strict=True))
        for name in (names[0], *names[1])
    )
    known |= {synset: {k} for k, synset in enumerate(imagenet.synset_ids())}
    candidates = [
        known.get(_synset_part(name))
        or set().union(*(known.get(_plain(n), set()) for n in name.split(",")))
        for name in classes
    ]
    if len(classes) == 1000 and sum(o in found for o, found in enumerate(candidates)) >= 900:
        return {o: o for o in range(1000)}
    if all(len(found) == 1 for found in candidates):
        synsets = {o: next(iter(found)) for o, found in enumerate(candidates)}
        if len(set(synsets.values())) == len(synsets):
            return synsets
    return {}


def _mismatch(unmatched: Sequence[str], folders: int, classes: Sequence[str]) -> str:
    first = unmatched[0]
    close = difflib.get_close_matches(_plain(first), {_plain(name): None for name in classes}, n=3)
    closest = [name for key in close for name in classes if _plain(name) == key][:3]
    hint = f" (closest to {_quoted([first])}: {_quoted(closest)})" if closest else ""
    return (
        f"{len(unmatched)} of {folders} class folders match no output of the model: "
        f"{_quoted(unmatched)}; "
        f"the model's {len(classes)} classes: {_quoted(classes)}{hint}; {_REMEDY}"
    )


def _ambiguous(
    folder: str, outputs: Sequence[int], classes: Sequence[str], synsets: Mapping[int, int]
) -> str:
    shown = " and ".join(f"output {o} ({_quoted([classes[o]])})" for o in outputs[:5])
    problem = f"class folder {_quoted([folder])} matches more than one output of the model: {shown}"
    if not synsets:
        return f"{problem}; {_REMEDY}"
    from audit.networks import imagenet

    ids = " or ".join(imagenet.synset_ids()[synsets[o]] for o in outputs[:5])
    return f"{problem}; rename the folder to the synset id it means, {ids}"


def _quoted(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(f"'{one_line(name, 60)}'" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names) - limit} more)"
