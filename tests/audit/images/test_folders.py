"""Opening a folder: what is found, what is left out and why, and that nothing ends the scan."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from audit.errors import ClassMismatchError, ImageError, UsageError
from audit.images import ImageFolder, open_image_folder
from audit.networks import imagenet

Photo = Callable[..., Image.Image]
WritePhotos = Callable[..., list[Path]]
CLASSES = ("cat", "dog")


@pytest.fixture
def pets(tmp_path: Path, write_photos: WritePhotos) -> Path:
    """Ten different cats and ten different dogs."""
    write_photos(tmp_path / "pets" / "cat", 10)
    write_photos(tmp_path / "pets" / "dog", 10, first=100)
    return tmp_path / "pets"


def reasons(folder: ImageFolder) -> dict[str, str]:
    return {skip.path: skip.reason for skip in folder.skipped}


def test_a_plain_folder_is_labeled_by_name_and_split_by_seed(pets: Path) -> None:
    folder = open_image_folder(pets, ["dog", "bird", "cat"])
    assert [record.path for record in folder.records] == sorted(
        path.relative_to(pets).as_posix() for path in pets.rglob("*.png")
    )
    assert {(r.class_name, r.label) for r in folder.records} == {("cat", 2), ("dog", 0)}
    assert Counter((r.class_name, r.split) for r in folder.records) == {
        (name, split): count
        for name in CLASSES
        for split, count in (("train", 6), ("val", 2), ("test", 2))
    }
    assert folder.split_source == "seeded"
    assert folder.skipped == ()
    assert folder.duplicates == 0
    assert len(folder.positions("train")) == 12


def test_split_folders_are_taken_as_they_are(tmp_path: Path, write_photos: WritePhotos) -> None:
    for number, split in enumerate(("train", "Validation", "test")):
        write_photos(tmp_path / split / "cat", 3, first=10 * number)
    folder = open_image_folder(tmp_path, CLASSES)
    assert {(r.path.split("/")[0], r.split) for r in folder.records} == {
        ("train", "train"),
        ("Validation", "val"),
        ("test", "test"),
    }
    assert folder.split_source == "folders"
    assert folder.split_notes == ()


def test_a_missing_split_folder_is_carved_and_noted(
    tmp_path: Path, write_photos: WritePhotos
) -> None:
    write_photos(tmp_path / "train" / "cat", 20)
    write_photos(tmp_path / "test" / "cat", 5, first=50)
    folder = open_image_folder(tmp_path, CLASSES)
    assert Counter(r.split for r in folder.records) == {"train": 16, "val": 4, "test": 5}
    assert folder.split_source == "folders"
    assert "no val folder" in folder.split_notes[0]


def test_a_class_may_be_called_train(tmp_path: Path, write_photos: WritePhotos) -> None:
    write_photos(tmp_path / "train", 5)
    write_photos(tmp_path / "bus", 5, first=50)
    folder = open_image_folder(tmp_path, ["bus", "train"])
    assert Counter(r.class_name for r in folder.records) == {"train": 5, "bus": 5}


def test_split_and_class_folders_side_by_side_are_refused(pets: Path) -> None:
    shutil.copytree(pets / "cat", pets / "train" / "cat")
    with pytest.raises(ImageError, match="side by side"):
        open_image_folder(pets, CLASSES)


def test_the_result_does_not_depend_on_how_the_disk_lists_files(
    pets: Path, tmp_path: Path, write_photos: WritePhotos, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path / "elsewhere", 2, first=60)
    for link in ("one", "two"):  # only the first is read
        (pets / "cat" / link).symlink_to(tmp_path / "elsewhere")
    expected = open_image_folder(pets, CLASSES)
    listed = os.scandir

    class Backwards:
        def __init__(self, path: Path) -> None:
            with listed(path) as entries:
                self.entries = list(entries)[::-1]

        def __enter__(self) -> list["os.DirEntry[str]"]:
            return self.entries

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert open_image_folder(pets, CLASSES) == expected


def test_an_image_counts_once_and_its_copies_are_listed(pets: Path) -> None:
    shutil.copy(pets / "cat" / "00000.png", pets / "cat" / "copy.png")
    folder = open_image_folder(pets, CLASSES)
    assert len(folder.records) == 20
    assert folder.duplicates == 1
    assert reasons(folder) == {"cat/copy.png": "duplicate of cat/00000.png"}


def test_of_copies_over_splits_the_one_that_judges_is_kept(
    tmp_path: Path, write_photos: WritePhotos
) -> None:
    for split, first in (("train", 0), ("val", 3), ("test", 5)):
        write_photos(tmp_path / split / "cat", 6, first=first)
    folder = open_image_folder(tmp_path, CLASSES)
    kept = {r.path.split("/")[-1][:5]: r.split for r in folder.records}
    assert [kept[f"{i:05}"] for i in range(11)] == ["train"] * 3 + ["val"] * 2 + ["test"] * 6
    assert len(folder.records) == len({r.sha256 for r in folder.records}) == 11
    assert folder.duplicates == 7
    assert reasons(folder)["train/cat/00005.png"] == "duplicate of test/cat/00005.png"
    assert reasons(folder)["train/cat/00003.png"] == "duplicate of val/cat/00003.png"


def test_content_under_two_classes_has_no_label_and_is_left_out(pets: Path) -> None:
    shutil.copy(pets / "cat" / "00000.png", pets / "dog" / "same.png")
    folder = open_image_folder(pets, CLASSES)
    assert len(folder.records) == 19
    assert folder.duplicates == 2
    assert reasons(folder) == {
        "cat/00000.png": "same content under another class: dog/same.png",
        "dog/same.png": "same content under another class: cat/00000.png",
    }


def test_every_bad_file_is_a_skip_with_a_reason_in_one_line(pets: Path) -> None:
    cat = pets / "cat"
    (cat / "empty.jpg").touch()
    (cat / "notes.txt").write_text("not an image")
    (cat / ".hidden.jpg").write_text("not looked at")
    (cat / "Thumbs.db").write_text("not looked at")
    (cat / "self").symlink_to("self")
    (cat / "broken.png").symlink_to("nowhere.png")
    os.mkfifo(cat / "pipe.jpg")
    (pets / "labels.csv").write_text("beside the class folders")
    seen: list[int] = []
    folder = open_image_folder(pets, CLASSES, progress=seen.append)
    assert len(folder.records) == 20
    found = reasons(folder)
    assert set(found) == {
        "cat/empty.jpg",
        "cat/notes.txt",
        "cat/self",
        "cat/broken.png",
        "cat/pipe.jpg",
        "labels.csv",
    }
    assert found["cat/self"] == "symbolic link that leads to itself"
    assert found["labels.csv"] == "file outside the class folders"
    assert all(reason.isprintable() for reason in found.values())
    assert sum(seen) == 25


def test_nested_folders_and_links_are_followed_but_loops_end(
    pets: Path, tmp_path: Path, write_photos: WritePhotos
) -> None:
    write_photos(pets / "cat" / "tabby" / "young", 2, first=50)
    write_photos(tmp_path / "elsewhere", 2, first=60)
    (pets / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (pets / "cat" / "tabby" / "up").symlink_to("..")
    (pets / "cat" / "top").symlink_to(pets)
    folder = open_image_folder(pets, CLASSES)
    assert sum(r.class_name == "cat" for r in folder.records) == 14
    assert "cat/more/00060.png" in {r.path for r in folder.records}
    loop = "link to a folder that was already read"
    assert reasons(folder) == {"cat/tabby/up": loop, "cat/top": loop}


def test_a_class_folder_that_links_to_its_own_root_is_not_read(pets: Path) -> None:
    (pets / "Dog").symlink_to(".")
    folder = open_image_folder(pets, CLASSES)
    assert len(folder.records) == 20
    assert reasons(folder) == {"Dog": "link to a folder that holds it"}


@pytest.mark.parametrize(
    "name",
    ["two\nlines.png", "<script>alert(1)</script>".replace("/", "_"), "ü漢🐈.png", "x" * 250],
)
def test_odd_names_survive_json(pets: Path, photo: Photo, name: str) -> None:
    photo(seed=77).save(pets / "cat" / name, format="PNG")
    folder = open_image_folder(pets, CLASSES)
    paths = [record.path for record in folder.records]
    assert f"cat/{name}" in paths
    assert json.loads(json.dumps(paths)) == paths


def test_names_that_are_not_unicode_are_skipped_with_a_name_that_can_be_written(
    pets: Path, photo: Photo
) -> None:
    raw = os.fsencode(pets / "cat") + b"/caf\xe9.png"
    shutil.copy(pets / "cat" / "00000.png", os.fsdecode(raw))
    folder = open_image_folder(pets, CLASSES)
    assert len(folder.records) == 20
    assert reasons(folder) == {r"cat/caf\udce9.png": "file name is not valid UTF-8"}


def test_a_folder_that_cannot_be_listed_is_a_skip(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.scandir

    def denied(path: Path) -> object:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", denied)
    folder = open_image_folder(pets, CLASSES)
    assert len(folder.records) == 10
    assert reasons(folder) == {"dog": "folder cannot be listed: Permission denied"}


def test_folders_that_cannot_be_used_say_what_to_do(
    tmp_path: Path, write_photos: WritePhotos
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    write_photos(tmp_path / "flat", 2)
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    (tmp_path / "bad" / "cat").mkdir(parents=True)
    (tmp_path / "bad" / "cat" / "a.jpg").write_text("no")
    expected = {
        "missing": "no folder",
        "file": "is a file; give the folder",
        "empty": "is empty; images must lie in one sub-folder per class",
        "flat": "holds 2 files but no sub-folders; images must lie in one sub-folder per class",
        "hollow": "they are empty; put images into them",
        "bad": "1 skipped, such as cat/a.jpg: not an image",
    }
    for name, text in expected.items():
        with pytest.raises(ImageError) as raised:
            open_image_folder(tmp_path / name, CLASSES)
        assert text in str(raised.value)
        assert str(tmp_path / name) in str(raised.value)
        assert str(raised.value).isprintable()


def test_unknown_classes_end_the_scan_before_any_file_is_read(pets: Path) -> None:
    read: list[int] = []
    with pytest.raises(ClassMismatchError):
        open_image_folder(pets, ["cat", "wolf"], progress=read.append)
    assert read == []


def test_a_limit_takes_a_stratified_subset_of_the_same_splits(pets: Path) -> None:
    whole = open_image_folder(pets, CLASSES, seed=3)
    part = open_image_folder(pets, CLASSES, seed=3, limit=10)
    assert len(part.records) == 10
    assert set(part.records) < set(whole.records)
    assert Counter(r.class_name for r in part.records) == {"cat": 5, "dog": 5}
    assert open_image_folder(pets, CLASSES, limit=99) == open_image_folder(pets, CLASSES)
    with pytest.raises(UsageError, match="at least 1, not 0"):
        open_image_folder(pets, CLASSES, limit=0)


def test_the_fingerprint_changes_with_names_contents_and_labels_only(
    pets: Path, photo: Photo
) -> None:
    first = open_image_folder(pets, CLASSES).fingerprint
    assert open_image_folder(pets, CLASSES, seed=5).fingerprint == first
    os.utime(pets / "cat" / "00000.png", (0, 0))
    assert open_image_folder(pets, CLASSES).fingerprint == first
    assert open_image_folder(pets, CLASSES[::-1]).fingerprint != first
    photo(seed=500).save(pets / "cat" / "00000.png")
    second = open_image_folder(pets, CLASSES).fingerprint
    assert second != first
    (pets / "cat" / "00000.png").rename(pets / "cat" / "renamed.png")
    assert open_image_folder(pets, CLASSES).fingerprint not in (first, second)


@pytest.mark.data
def test_cats_and_dogs_open_whole(data_root: Path) -> None:
    folder = open_image_folder(data_root / "cats-dogs", CLASSES)
    assert Counter(r.split for r in folder.records) == {"train": 4000, "val": 1000, "test": 1000}
    assert folder.skipped == ()
    assert folder.split_source == "folders"


@pytest.mark.data
@pytest.mark.parametrize("classes", [imagenet.names(), imagenet.synset_ids()])
def test_imagenet_photos_are_labeled_by_synset(data_root: Path, classes: tuple[str, ...]) -> None:
    folder = open_image_folder(data_root / "imagenet-sample", classes)
    assert len(folder.records) == 1000
    ids = imagenet.synset_ids()
    assert all(ids[r.label] == r.path.split("/")[0] for r in folder.records)
    assert Counter(r.split for r in folder.records) == {"train": 600, "val": 200, "test": 200}
