"""Class folders find their model output by name, or the scan does not start."""

import pytest

from audit.errors import ClassMismatchError
from audit.images.classes import match_classes
from audit.networks import imagenet


def test_folders_match_by_name_whatever_the_order_of_classes() -> None:
    assert match_classes(["cat", "dog"], ["dog", "cat"]) == {"cat": 1, "dog": 0}


@pytest.mark.parametrize("folder", ["Hot_Dog", "hot-dog", "HOT DOG", "hotdog", "hot  dog"])
def test_case_and_separators_do_not_matter(folder: str) -> None:
    assert match_classes([folder], ["pizza", "hot dog"]) == {folder: 1}


def test_composed_and_decomposed_letters_are_the_same_name() -> None:
    assert match_classes(["cafe\u0301"], ["tea", "caf\u00e9"]) == {"cafe\u0301": 1}


def test_a_folder_may_lack_classes_of_the_model() -> None:
    assert match_classes(["b"], ["a", "b", "c"]) == {"b": 1}


def test_an_exact_name_decides_where_only_case_tells_classes_apart() -> None:
    assert match_classes(["Polish", "polish"], ["polish", "Polish"]) == {"Polish": 1, "polish": 0}


def test_two_folders_of_one_class_are_merged() -> None:
    assert match_classes(["Cat", "cat"], ["dog", "cat"]) == {"Cat": 1, "cat": 1}


def test_a_folder_that_fits_two_outputs_names_both() -> None:
    with pytest.raises(ClassMismatchError) as raised:
        match_classes(["POLISH"], ["polish", "tea", "Polish"])
    assert "output 0 ('polish') and output 2 ('Polish')" in str(raised.value)


def test_an_unknown_folder_lists_both_sides_the_closest_and_the_remedy() -> None:
    with pytest.raises(ClassMismatchError) as raised:
        match_classes(["cats", "dog", "bird"], ["cat", "dog"])
    text = str(raised.value)
    assert "2 of 3 class folders match no output of the model: 'cats', 'bird'" in text
    assert "the model's 2 classes: 'cat', 'dog'" in text
    assert "closest to 'cats': 'cat'" in text
    assert "--classes FILE" in text
    assert "\n" not in text


def test_long_lists_are_cut() -> None:
    with pytest.raises(ClassMismatchError) as raised:
        match_classes([f"x{i}" for i in range(500)], [f"class {i}" for i in range(700)])
    assert "(492 more)" in str(raised.value)
    assert "(692 more)" in str(raised.value)
    assert len(str(raised.value)) < 600


def test_hostile_folder_names_stay_on_one_line() -> None:
    with pytest.raises(ClassMismatchError) as raised:
        match_classes(["a\nb\x1b[31m", "caf\udce9"], ["cat"])
    assert str(raised.value).isprintable()
    str(raised.value).encode()


def test_a_model_without_class_names_says_so() -> None:
    with pytest.raises(ClassMismatchError, match="--classes FILE"):
        match_classes(["cat"], [])


@pytest.mark.parametrize(
    "classes",
    [
        pytest.param(imagenet.names(), id="names"),
        pytest.param(imagenet.synset_ids(), id="synset ids"),
        pytest.param([", ".join(names) for names in imagenet.lemmas()], id="all names"),
        pytest.param([names[0] for names in imagenet.lemmas()], id="first names, some twice"),
    ],
)
def test_imagenet_folders_may_be_synset_ids_or_any_name(classes: tuple[str, ...]) -> None:
    ids = imagenet.synset_ids()
    assert match_classes(ids, classes) == {synset: i for i, synset in enumerate(ids)}
    named = match_classes(["tench", "Carassius_auratus", "n02085620-Chihuahua"], classes)
    assert [ids[output] for output in named.values()] == ["n01440764", "n01443537", "n02085620"]


def test_imagenet_names_that_two_classes_share_ask_for_the_synset_id() -> None:
    with pytest.raises(ClassMismatchError) as raised:
        match_classes(["crane"], imagenet.names())
    text = str(raised.value)
    assert "output 134" in text and "output 517" in text
    assert "n02012849 or n03126707" in text


def test_imagenet_classes_in_another_order_keep_their_own_order() -> None:
    shuffled = tuple(sorted(imagenet.synset_ids(), reverse=True))
    assert match_classes(["n01440764", "goldfish"], shuffled) == {"n01440764": 999, "goldfish": 998}


def test_synset_ids_mean_nothing_to_other_models() -> None:
    with pytest.raises(ClassMismatchError):
        match_classes(["n01440764"], ["tench", "goldfish"])
