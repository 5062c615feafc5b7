"""A worker that dies or fails, and too little shared memory: one sentence each, and no waiting."""

import faulthandler
import multiprocessing
import os
import pickle
import resource
import signal
import time
from typing import cast

import pytest
import torch

from qat.data.loader import SourceLoader
from qat.data.sampler import EpochBatchSampler
from qat.data.source import Batch
from qat.data.tensors import TensorSource
from qat.data.workers import ReadAhead, check_shared, death, own_child_signals
from qat.errors import DataError, TrainingError
from qat.memory import free_shared


class Failing(TensorSource):
    """Twelve samples; the batch that begins with the eighth goes wrong."""

    def __init__(self, fail):
        super().__init__(torch.arange(24.0).reshape(12, 2), torch.zeros(12))
        self.fail = fail

    def __getitems__(self, pairs):
        if pairs[0][1] == 8:
            self.fail()
        return super().__getitems__(pairs)


def loader(fail):
    return SourceLoader(Failing(fail), EpochBatchSampler(12, 4, shuffle=False), 1)


def stop(loader):
    """Stop the workers now; garbage collection would wait for five seconds."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()


def unknown_error():
    class LocalError(Exception):  # cannot be pickled
        pass

    raise LocalError("a decoder\nof its own")


def our_error():
    raise TrainingError("expected ours, got ours: as it is.")


def no_memory():
    raise MemoryError


def full_shared_memory():
    if multiprocessing.parent_process() is None:
        return
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))


def test_a_batch_without_room_in_shared_memory_is_read_by_the_main_process(caplog):
    reading = loader(full_shared_memory)
    batches = list(reading)
    stop(reading)
    assert torch.equal(torch.cat([x for x, _ in batches]), torch.arange(24.0).reshape(12, 2))
    assert [x.is_shared() for x, _ in batches] == [True, True, False]
    assert "--shm-size" in caplog.text
    assert "data.num_workers=0" in caplog.text


@pytest.mark.parametrize(
    ("fail", "kind", "words"),
    [
        (unknown_error, DataError, ["LocalError", r"a decoder\nof its own", "--traceback"]),
        (our_error, TrainingError, ["expected ours, got ours: as it is."]),
        (no_memory, DataError, ["memory", "data.num_workers", "data.batch_size"]),
    ],
)
def test_an_error_in_a_worker_is_a_sentence_after_the_batches_before_it(fail, kind, words):
    reading = loader(fail)
    seen = []
    with pytest.raises(kind) as caught:
        seen.extend(x for x, _ in reading)
    stop(reading)
    assert len(seen) == 2
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "Traceback" not in message
    assert "\n" not in message
    if fail is unknown_error:  # --traceback shows where
        assert "in unknown_error" in "".join(caught.value.__notes__)


def test_a_killed_worker_is_noticed_without_a_handler_that_raises_anywhere():
    before = signal.getsignal(signal.SIGCHLD)
    source = Failing(lambda: os.kill(os.getpid(), signal.SIGKILL))
    reading = SourceLoader(source, EpochBatchSampler(12, 4, shuffle=False), 2)
    with own_child_signals():
        started = time.monotonic()
        with pytest.raises(DataError, match=r"num_workers=2 .* SIGKILL.*memory runs out"):
            list(reading)
    assert time.monotonic() - started < 20
    assert signal.getsignal(signal.SIGCHLD) == before
    assert multiprocessing.active_children() == []
    source.fail = lambda: None
    assert len(list(reading)) == 3  # new workers
    stop(reading)


def bus_error():
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGBUS)


def test_how_a_worker_died():
    ends = (lambda: None, bus_error, lambda: os._exit(3))
    workers = [multiprocessing.get_context("fork").Process(target=end) for end in ends]
    for worker in workers:
        worker.start()
        worker.join()
    fine, full, failed = workers
    assert death([fine]) is None
    assert "SIGBUS" in str(death([fine, full]))
    assert "--shm-size" in str(death([fine, full]))
    assert "exit status 3): set data.num_workers=0" in str(death([failed]))


def close_everything_then_die():
    os.closerange(3, 256)
    time.sleep(0.3)
    os._exit(3)


def test_a_worker_that_is_dying_counts_as_dead():
    """Its connections close first, and the main process meets that before the exit status."""
    worker = multiprocessing.get_context("fork").Process(target=close_everything_then_die)
    worker.start()
    assert worker.exitcode is None
    assert "exit status 3" in str(death([worker]))


def test_shared_memory_is_compared_with_what_is_read_ahead():
    free = free_shared()
    if free is None:
        pytest.skip("no /dev/shm")
    side = int((free / 4 / 4) ** 0.5)  # a quarter of it a sample
    source = TensorSource(torch.zeros(1).expand(8, 1, side, side), torch.zeros(8))
    with pytest.raises(DataError, match=r"num_workers=2 \(7 batches of 1 samples\), got .* --shm"):
        check_shared(source, 1, 8, num_workers=2)
    check_shared(source, 1, 3, num_workers=2)  # no more than an epoch has
    check_shared(source, 1, 8, num_workers=0)


def test_batches_and_errors_travel():
    read = ReadAhead(Failing(unknown_error))
    x, y = cast(Batch, read.__getitems__([(0, 0), (0, 1)]))
    assert x.is_shared()
    assert y.is_shared()
    error = pickle.loads(pickle.dumps(read.__getitems__([(0, 8)])))
    assert isinstance(error, DataError)
    assert error.__notes__
