"""A file is whole or as it was, whatever happens while it is written."""

import os
import stat

import pytest

from qat.files import replacing, write_bytes, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_is_whole_and_alone(tmp_path):
    write_bytes(tmp_path / "a", b"12")
    assert (tmp_path / "a").read_bytes() == b"12"
    assert names(tmp_path) == ["a"]


def test_text_is_utf_8_in_any_locale(tmp_path):
    write_text(tmp_path / "a", "ü \udcff")
    assert (tmp_path / "a").read_bytes() == "ü ".encode() + rb"\udcff"


@pytest.mark.parametrize("error", [OSError(28, "no space"), KeyboardInterrupt()])
def test_an_error_in_the_middle_leaves_what_was_there(tmp_path, error):
    (tmp_path / "a").write_text("old")

    def write():
        with replacing(tmp_path / "a") as stream:
            stream.write(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_what_a_killed_process_left_is_replaced(tmp_path):
    (tmp_path / ".a.part").write_text("half of an older one, and longer")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_a_link_in_the_place_of_the_hidden_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".a.part").symlink_to(tmp_path / "precious")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "precious").read_text() == "mine"


def test_readers_see_the_old_file_or_the_new_one(tmp_path):
    (tmp_path / "a").write_text("old")
    with replacing(tmp_path / "a") as stream:
        stream.write(b"new and longer")
        stream.flush()
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new and longer"


def test_a_link_stays_one_and_rights_stay(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640


def test_what_is_no_regular_file_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
