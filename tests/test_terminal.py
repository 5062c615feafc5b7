"""What is printed holds no escape sequences, fits every encoding, and ends with its reader."""

import logging
import os
import subprocess
import sys

import pytest

from qat.compile_cache import VARIABLE
from qat.terminal import READER_LEFT, PlainRecord, escape, show
from tests.runs import ROOT

NAMES = "é 漢字 \udcff \x1b[2J"
PRINTING = f"""
import logging
from qat.terminal import show, terminal
with terminal():
    show({NAMES!a})
    logging.getLogger("qat").warning("%s", {NAMES!a})
"""


def start(code, **how):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **how.pop("env", {})}
    environment.pop("PYTHONUNBUFFERED", None)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, check=False, timeout=60, **how)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("a\rb\nc\td", r"a\rb\nc\td"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\x9b2J \u2028 \u2066 \u200f", r"\x9b2J \u2028 \u2066 \u200f"),
        ("\udcff \ud800", r"\udcff \ud800"),
        ("é 漢字 \u200d😀", "é 漢字 \u200d😀"),
    ],
)
def test_what_commands_a_terminal_is_written_as_in_python(text, shown):
    assert escape(text) == shown


def test_lines_stay_lines(capsys):
    show("a\tb\nc\x1b[0m")
    record = PlainRecord("qat", logging.INFO, "", 1, "%s\n\x1b", ("\x1b]0;title\x07",), None)
    assert capsys.readouterr().out == "a\tb\nc\\x1b[0m\n"
    assert record.getMessage() == "\\x1b]0;title\\x07\n\\x1b"


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252"},
    ],
    ids=lambda env: next(iter(env.values())),
)
def test_every_encoding_takes_every_name(env):
    done = start(PRINTING, env=env, capture_output=True)
    assert done.returncode == 0
    for stream in (done.stdout, done.stderr):
        assert stream.count(b"\n") == 1
        assert rb"\u6f22\u5b57 \udcff \x1b[2J" in stream


def test_a_reader_that_left_ends_a_command_quietly():
    """With a pipe that nobody reads, and with streams that are closed."""
    read, write = os.pipe()
    os.close(read)
    done = start(PRINTING, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == READER_LEFT
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") == 1
    closing = "import os\nfor number in range(3): os.close(number)\n" + PRINTING
    assert start(closing).returncode == 0


def test_another_broken_pipe_is_an_error():
    code = (
        "from qat.terminal import terminal\nwith terminal():\n    raise BrokenPipeError('worker')"
    )
    done = start(code, capture_output=True)
    assert done.returncode == 1
    assert b"BrokenPipeError: worker" in done.stderr


def test_a_compile_cache_that_cannot_be_written_is_replaced(tmp_path):
    """torch cannot be imported where it cannot make that folder."""
    (tmp_path / "file").write_text("")
    code = f"import os, sys, qat; print(os.environ['{VARIABLE}'], 'torch' in sys.modules)"
    env = {VARIABLE: str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    done = start(code, env=env, capture_output=True)
    folder, has_torch = done.stdout.decode().split()
    assert folder.startswith(str(tmp_path / "qat-compiled-"))
    assert has_torch == "False"
    assert done.stderr.count(b"\n") == 1
    assert b"compiled code is kept in a temporary folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
