"""Batches are ranges of inputs: the same for any number of workers and from any beginning."""

import os
import signal
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from qat.errors import ConfigError, DataError
from qat.predict.batches import (
    FEW_IMAGES,
    MOST_WORKERS,
    Batches,
    check_batch,
    choose_workers,
    read_batches,
)
from qat.predict.inputs import Inputs, fingerprint, list_files, show_name
from qat.predict.reader import Reader

pytestmark = pytest.mark.filterwarnings(  # of torch, where cores are fewer
    "ignore:This DataLoader will create"
)
READER = Reader((3, 4, 4), [0.5], [0.25])


@pytest.fixture
def files(tmp_path):
    """Images, one of them broken, and arrays of all kinds: 25 inputs, four of them unreadable."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
    floats = draw.random((7, 3, 4, 4), dtype=np.float32)
    floats[2, 0, 0, 0] = np.nan
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_text("no image")
    np.save(tmp_path / "floats.npy", floats)
    np.savez_compressed(tmp_path / "pixels.npz", pixels)
    np.savez(tmp_path / "floats.npz", x=floats[3:], y=floats)
    np.save(tmp_path / "none.npy", pixels[:0])
    np.save(tmp_path / "wrong.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no array")
    arrays = ("floats.npy", "none.npy", "wrong.npy", "pixels.npz", "floats.npz", "text.npz")
    return list_files([tmp_path, *(tmp_path / name for name in arrays)])


def everything(batches, *given):
    """Return names, samples and what was left out of all batches, in order."""
    found = list(read_batches(batches, *given))
    samples = [sample for batch in found for sample in batch.samples]
    left_out = [pair for batch in found for pair in batch.left_out]
    return [name for batch in found for name in batch.names], samples, left_out


def test_every_input_is_read_once_and_in_order(files, tmp_path):
    inputs = Inputs(files, READER)
    names, samples, left_out = everything(Batches(inputs, 4), 0)
    numbered = [inputs.name(i) for i in range(len(inputs))]
    images = [str(tmp_path / f"{i}.png") for i in range(6)]
    rows = [f"{tmp_path / 'floats.npy'}[{i}]" for i in range(7)]
    wrong = str(tmp_path / "wrong.npy")
    rows += [wrong, *(f"{tmp_path / 'pixels.npz'}[{i}]" for i in range(6))]
    rows += [f"{tmp_path / 'floats.npz'}[{i}]" for i in range(4)]
    assert numbered == [*images, *rows, str(tmp_path / "text.npz")]
    lost = [images[3], f"{tmp_path / 'floats.npy'}[2]", wrong, str(tmp_path / "text.npz")]
    assert [name for name, _ in left_out] == lost
    assert names == [name for name in numbered if name not in lost]
    assert inputs.images == 6 + 6
    for name, sample in zip(names, samples, strict=True):
        if "pixels.npz" in name:  # the image of the same number has the same pixels
            number = int(name[-2])
            assert number == 3 or torch.equal(sample, READER.image(tmp_path / f"{number}.png"))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("size", [1, 4])
def test_workers_change_nothing(workers, size, files):
    batches = Batches(Inputs(files, READER), size)
    names, samples, left_out = everything(batches, 0)
    got = everything(batches, workers)
    assert (got[0], got[2]) == (names, left_out)
    assert torch.equal(torch.stack(got[1]), torch.stack(samples))


def test_batches_need_no_shared_memory(files, monkeypatch, caplog):
    """Containers have little of it: samples are pickled, and without locks nothing is started."""
    batches = Batches(Inputs(files, READER), 4)
    batch = batches[2]
    assert len(ForkingPickler.dumps(batch)) > batch.samples.nbytes
    found = everything(batches, 2)

    def refuse():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multiprocessing.Lock", refuse)
    alone = everything(batches, 2)
    assert (alone[0], alone[2]) == (found[0], found[2])
    assert torch.equal(torch.stack(alone[1]), torch.stack(found[1]))
    (record,) = caplog.records
    assert "without worker processes, which need /dev/shm" in record.getMessage()


def test_too_much_at_once_is_a_sentence(files):
    inputs = Inputs(files, Reader((3, 9000, 9000), None, None))
    with pytest.raises(ConfigError, match=r"at most 4 GiB, got --batch 1000,.* lower it"):
        check_batch(1000, None, inputs)
    with pytest.raises(ConfigError, match="--workers from 0 to 256, got 257"):
        check_batch(1, 257, inputs)
    check_batch(2, 256, inputs)


def test_what_is_no_file_is_never_opened(tmp_path):
    """A pipe would wait for ever; a link to itself and one to nothing are listed as unreadable."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "around").symlink_to(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "whole.png")
    with pytest.raises(DataError, match="neither file nor folder"):
        list_files([tmp_path / "pipe.png"])
    found = list_files([tmp_path])
    assert [file.name for file in found] == ["gone.png", "loop.png", "pipe.png", "whole.png"]
    names, _, left_out = everything(Batches(Inputs(found, READER), 4), 0)
    assert names == [str(tmp_path / "whole.png")]
    assert len(left_out) == 3
    assert fingerprint(found) == fingerprint(found)


def test_a_folder_that_cannot_be_read_whole_is_a_sentence(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match="can be read whole"):
        list_files([tmp_path])


def test_any_beginning_gives_the_rest(files):
    batches = Batches(Inputs(files, READER), 4)
    names = [batch.names for batch in read_batches(batches, 0)]
    for start in range(len(batches) + 1):
        assert [batch.names for batch in read_batches(batches, 0, start)] == names[start:]


def test_only_what_is_asked_for_is_read(tmp_path):
    shape = (100_000, 3, 4, 4)
    array = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=shape)
    del array
    inputs = Inputs([tmp_path / "x.npy"], READER)
    stream = read_batches(Batches(inputs, 5), 0)
    assert [len(next(stream)), len(next(stream))] == [5, 5]
    with (tmp_path / "x.npy").open("r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(np.nan).tobytes())
    assert not next(stream).left_out
    assert Batches(inputs, 5)[len(Batches(inputs, 5)) - 1].left_out


class Deadly(Inputs):
    """Kills the process that reads its tenth input, as a system short of memory does."""

    def read(self, number):
        if number == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(number)


def test_a_worker_that_dies_is_a_sentence(files):
    stream = read_batches(Batches(Deadly(files, READER), 4), 2)
    with pytest.raises(DataError, match=r"expected 2 worker processes .*worker.* --workers"):
        list(stream)


def test_a_dying_worker_interrupts_nobody_who_is_not_waiting(files, monkeypatch):
    """torch's own handler would raise in the middle of whatever the main thread does."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        for mine in (lambda *_: None, signal.SIG_DFL):
            signal.signal(signal.SIGCHLD, mine)
            stream = read_batches(Batches(Inputs(files, READER), 4), 2)
            next(stream)
            assert signal.getsignal(signal.SIGCHLD) is mine
            del stream  # ends its workers
        monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
        next(iter(DataLoader([0], num_workers=1)))
        assert "torch" in signal.getsignal(signal.SIGCHLD).__module__
        next(read_batches(Batches(Inputs(files, READER), 4), 2))
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_few_images_need_no_workers(monkeypatch):
    for cores, most in [(None, 0), (1, 0), (4, 3), (64, MOST_WORKERS)]:
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert choose_workers(FEW_IMAGES - 1) == 0
        assert choose_workers(FEW_IMAGES) == most


def test_fingerprint_sees_names_sizes_and_times(files, tmp_path):
    seen = {fingerprint(files), fingerprint(files[::-1]), fingerprint(files[1:])}
    files[0].touch()
    seen.add(fingerprint(files))
    files[0].write_text("another")
    seen.add(fingerprint(files))
    assert len(seen) == 5
    assert fingerprint(files) in seen


def test_a_name_in_no_encoding_is_shown():
    assert show_name(Path("a\udcff.png")) == "a\\udcff.png"
