"""Error groups ready for a template: what they share, their mean maps, example images.

Mean maps of the failing images stand beside those of the right images that they were compared with;
the region that was tested is outlined on both. The pixels that the failing images share, where
there are some, stand beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audit.errors import RunError
from audit.gallery import Card, Picture, data_uri, heat_picture, overlay, read_pixels
from audit.runs import Run
from audit.wording import count, group_sentence, method_title, number, percent, span

__all__ = ["GroupCard", "group_cards", "groups_note"]

SIDE = 224  # pixels of a drawn mean map
GROUND = 58  # gray that a mean map is drawn on


@dataclass(frozen=True, kw_only=True)
class GroupCard:
    """One error group: a sentence, mean maps, facts, and images that are in it.

    `href` is where all of its images can be seen.
    """

    id: str
    title: str
    sentence: str
    maps: tuple[Picture, ...]
    facts: tuple[tuple[str, str], ...]
    examples: tuple[Card, ...]
    href: str = ""


def group_cards(run: Run) -> list[GroupCard]:
    """Return the error groups of a run, the surest first.

    Raises:
        RunError: The groups, their maps or their pictures are damaged.
    """
    groups = run.groups["groups"]
    if not groups:
        return []
    wrong, right, examples = (run.group_maps(kind) for kind in ("wrong", "right", "examples"))
    if min(len(wrong), len(right)) < len(groups):
        raise RunError(f"{len(groups)} error groups and only {len(wrong)} mean maps; scan again")
    return [
        GroupCard(
            id=str(group["id"]),
            title=_title(group),
            sentence=group_sentence(group),
            maps=(*_mean_maps(group, wrong[place], right[place]), *_artefact(run, group, place)),
            facts=tuple(_facts(group)),
            examples=tuple(_example(run, entry, examples) for entry in group["examples"]),
        )
        for place, group in enumerate(groups)
    ]


def groups_note(document: Mapping[str, Any]) -> str:
    """Return how the groups were sought, empty where they were not."""
    if "tests" not in document:
        return ""
    looked = (
        f"{method_title(str(document['method']))} maps of the predicted class at "
        f"{document['layer']}, of {count(document['errors_looked_at'], 'errors')} and "
        f"{count(document['right_looked_at'])} right images"
        if document.get("layer")
        else "The network has no layer with maps, so confusions alone were tested"
    )
    found = "" if document["groups"] else " No group of errors beats chance."
    return (
        f"{looked}; none of the test split. {count(document['tests'])} tests, corrected after "
        f"{document['correction']}: the chance of a single false group is at most "
        f"{percent(document['alpha'], 0)}.{found}"
    )


def _title(group: Mapping[str, Any]) -> str:
    label, answer = group.get("label_name"), group.get("predicted_name")
    said = f"{label or 'Anything'} called {answer}" if answer else str(label or "Any class")
    if group["kind"] == "artefact":
        return f"{said}, in images that look alike in one place"
    return f"{said}, looking at {group['region']}" if group.get("region") else said


def _artefact(run: Run, group: Mapping[str, Any], place: int) -> Iterable[Picture]:
    if group.get("artefact"):
        mask, picture = run.group_artefact(place)
        shown = np.where(mask[..., None], picture, np.uint8(GROUND))
        yield Picture(title="What these errors share", uri=data_uri(shown))


def _facts(group: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "Errors in it", f"{count(group['size'])} of {count(group['of'])}"
    yield "Share of the errors", f"{percent(group['share']['value'])}, 95 %: {span(group['share'])}"
    yield "Expected by chance", number(group["expected"], 1)
    p_value, adjusted = (_exact(group[name]) for name in ("p_value", "p_adjusted"))
    yield "p-value", f"{p_value}, corrected {adjusted}"
    yield "Test", str(group["test"])
    if group.get("compared_share") is not None:
        share = percent(group["compared_share"], 0)
        what = "look alike there" if group["kind"] == "artefact" else "look there"
        yield f"Right images that {what}", f"{share} of {count(group['compared'])}"


def _exact(p_value: float) -> str:
    return "below 1e-300" if p_value < 1e-300 else f"{p_value:.2g}"


def _mean_maps(group: Mapping[str, Any], wrong: np.ndarray, right: np.ndarray) -> Iterable[Picture]:
    cells = group.get("cells") or []
    titles = {"These errors, mean map": wrong, "Right images, mean map": right}
    known = {title: heat for title, heat in titles.items() if np.isfinite(heat).all()}
    # One scale for both, or the paler of the two would look as sure as the other.
    brightest = max((float(heat.max()) for heat in known.values()), default=1.0) or 1.0
    for title, heat in known.items():
        # The pointer finds the mean itself, not what it was scaled to.
        values = heat_picture(title, "", heat).values
        yield Picture(title=title, uri=_drawn(heat / brightest, cells), values=values)


def _drawn(heat: np.ndarray, cells: Sequence[Sequence[float]]) -> str:
    """Return a mean map with the region's cells outlined, as a data URI."""
    from PIL import Image, ImageDraw

    ground = np.full((SIDE, SIDE, 3), GROUND, dtype=np.uint8)
    picture = Image.fromarray(overlay(ground, heat))
    draw = ImageDraw.Draw(picture)
    for left, top, right, bottom in cells:
        corners = (SIDE * left + 1, SIDE * top + 1, SIDE * right - 2, SIDE * bottom - 2)
        draw.rectangle(corners, outline=(255, 255, 255), width=2)
    return data_uri(np.asarray(picture))


def _example(run: Run, entry: Mapping[str, Any], maps: np.ndarray) -> Card:
    place = int(entry["id"])
    if place >= len(maps):
        raise RunError(f"error groups name an example {place} of {len(maps)}; scan again")
    uri = data_uri(read_pixels(run.group_image(str(entry["id"]))))
    return Card(
        name=str(entry["path"]),
        outcome="wrong",
        pictures=(
            Picture(title="Image", uri=uri),
            heat_picture("Map", uri, maps[place]),
        ),
        facts=(
            ("Label", str(entry["label_name"])),
            ("Said", str(entry["predicted_name"])),
            ("Sure of it", percent(entry["p_predicted"])),
        ),
    )
