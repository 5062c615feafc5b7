"""No input, no device and no stranger's file is ever replaced, however it is called."""

import os
import stat
from pathlib import Path

import pytest

from qat.errors import ConfigError
from qat.predict.begin import begin
from qat.predict.ownership import check_target, describe_mode, find_mode, list_beside, state_path
from qat.predict.state import Place, Request, save

REQUEST = Request("0" * 64, "1" * 64, {"format": "csv"})


@pytest.fixture
def photo(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "1.png").write_text("the only copy")
    return folder / "1.png"


def spellings(photo):
    """Yield names of the same file, without the suffix of an image where one can be chosen."""
    folder = photo.parent
    (folder.parent / "linked").symlink_to(folder)
    (folder / "link").symlink_to(photo)
    os.link(photo, folder / "hard")
    yield from (photo, folder / ".." / "photos" / "1.png", folder.parent / "linked" / "1.png")
    yield from (folder / "link", folder / "hard", Path(os.path.relpath(photo)))
    for name in ("a.state.json", "b.unreadable.csv", ".c.state.json.part"):
        os.link(photo, folder / name)
        yield folder / name.lstrip(".").partition(".")[0]


def test_an_input_is_no_output_however_it_is_called(photo):
    for path in spellings(photo):
        with pytest.raises(ConfigError, match="an output that is no input"):
            check_target(path, [photo], is_folder=False)
    check_target(photo.with_name("new.csv"), [photo], is_folder=False)
    assert photo.read_text() == "the only copy"


def test_a_folder_of_parts_holds_no_input(photo, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (photo.parent, tmp_path, tmp_path / "link"):
        with pytest.raises(ConfigError, match="an output that is no input"):
            check_target(path, [photo], is_folder=True)
    check_target(photo.parent / "parts", [photo], is_folder=True)
    (photo.parent / "parts").mkdir()
    os.link(photo, photo.parent / "parts" / "part-000000.parquet")
    with pytest.raises(ConfigError, match="an output that is no input"):
        check_target(photo.parent / "parts", [photo], is_folder=True)


@pytest.mark.parametrize("name", ["new.PNG", "new.npy", "x.npz", "-", "..", "no/such.csv"])
def test_names_that_are_no_tables(name, photo, tmp_path):
    with pytest.raises(ConfigError, match=r"expected an? (output|folder)"):
        check_target(tmp_path / name, [photo], is_folder=False)


def test_only_files_are_written(photo, tmp_path):
    """What would wait, act or lead elsewhere is looked at, never opened."""
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(state_path(tmp_path / "beside"))
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    kinds = {
        "pipe": "a pipe",
        "beside": "a pipe",
        "link": "a link to nothing",
        "loop": "a link to nothing",
        "folder": "a folder",
    }
    for name, kind in kinds.items():
        with pytest.raises(ConfigError, match=f"got {kind}"):
            check_target(tmp_path / name, [photo], is_folder=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="got a file"):
        check_target(tmp_path / "file", [photo], is_folder=True)
    assert describe_mode(stat.S_IFCHR | 0o666) == describe_mode(stat.S_IFBLK) == "a device"
    assert find_mode(tmp_path / "none") is None
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("how", ["resume", "force", "neither"])
@pytest.mark.parametrize("number", range(4))
def test_files_of_strangers_stay(number, how, tmp_path):
    """Without a state of ours beside, nothing by these names is ours."""
    path = tmp_path / "out"
    file = [path, *list_beside(path)][number]
    file.write_text("the only copy")
    with pytest.raises(ConfigError, match=r"delete it yourself|exists: "):
        begin(path, REQUEST, resume=how == "resume", force=how == "force")
    assert file.read_text() == "the only copy"
    assert list(tmp_path.iterdir()) == [file]


def test_our_own_files_go_and_others_beside_them_stay(tmp_path):
    path = tmp_path / "out"
    save(path, REQUEST, Place())
    other = tmp_path / "out.unreadable.csv.bak"
    for file in (path, *list_beside(path)[::2], other):
        file.write_text("x")
    assert begin(path, REQUEST, resume=False, force=True) == Place()
    assert list(tmp_path.iterdir()) == [other]


def test_a_deleted_output_is_not_begun_again_unasked(tmp_path):
    path = tmp_path / "out"
    save(path, REQUEST, Place(size=10, batches=1, predicted=1))
    with pytest.raises(ConfigError, match=r"state.json' exists"):
        begin(path, REQUEST, resume=False, force=False)


def test_parts_that_cannot_be_ours_stay(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    save(path, REQUEST, Place(size=2))
    for number in (0, 1, 2):
        (path / f"part-{number:06}.parquet").write_text("ours")
    foreign = path / "part-000900.parquet"
    foreign.write_text("the only copy")
    with pytest.raises(ConfigError, match="part-000900"):
        begin(path, REQUEST, resume=False, force=True)
    foreign.rename(path / "mine.parquet")
    begin(path, REQUEST, resume=False, force=True)
    assert [file.name for file in path.iterdir()] == ["mine.parquet"]
