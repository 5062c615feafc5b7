"""A disk that is full at any write of a run: one sentence, and what was saved before goes on.

Runs in a small file system of its own, of many sizes; each run is resumed once there is room. Needs
the right to mount one in a private namespace.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, train
from tests.same_run import apart

SIZES = [int(kB) for kB in os.environ.get("QAT_DISKS", "4 8 16 24 32 40 56 72 96 128").split()]
MOUNT = ["unshare", "--mount", "sh", "-c"]
COMMAND = [
    "recipe=tabular_w8a8",
    "schedule.float_epochs=1",
    "schedule.epochs=2",
    "name=full",
    "hydra.run.dir=run",
]
pytestmark = pytest.mark.slow


def may_mount() -> bool:
    try:
        done = subprocess.run(
            [*MOUNT, "mount -t tmpfs -o size=4k none /mnt"], check=False, capture_output=True
        )
    except OSError:
        return False
    return done.returncode == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = train(folder, *COMMAND)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.skipif(not may_mount(), reason="no right to mount a file system")
@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_is_a_sentence_and_nothing_saved_is_lost(size, whole, tmp_path):
    """The run folder lies on a disk of ``size`` kB; afterwards it is copied to one with room."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    command = subprocess.list2cmdline([sys.executable, str(ROOT / "train.py"), *COMMAND])
    script = (
        f"mount -t tmpfs -o size={size}k none {disk} && cd {disk} && {command}; "
        f"status=$?; cp -a {disk} {kept}; exit $status"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*MOUNT, script], check=False, capture_output=True, text=True, env=environment, timeout=200
    )
    if done.returncode == 0:  # it had room
        assert apart(whole, kept / "run") == []
        return
    sentences = re.findall("^qat: .*", done.stderr, re.MULTILINE)
    assert done.returncode == 1, done.stderr
    assert len(sentences) == 1, done.stderr
    assert "space" in sentences[0]
    assert "Traceback" not in done.stderr + done.stdout
    has_checkpoint = (kept / "run/checkpoints/last.ckpt").is_file()
    again = train(kept, *COMMAND, *(["ckpt_path=last"] if has_checkpoint else []))
    assert again.returncode == 0, again.stderr
    assert apart(whole, kept / "run") == []
    shutil.rmtree(kept)
