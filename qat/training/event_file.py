"""TensorBoard's event file, written by the thread that logs: errors come where they are caused.

TensorBoard's own writer hands records to a thread of its own, which prints a traceback when the
disk is full. It also begins a new file at every start; this one goes on in the file that is there.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from qat.files import write_all, write_bytes

HEAD, FOOT = 12, 4
"""Bytes around a record: its length and the length's checksum; its own checksum."""


def event_files(folder: Path) -> list[Path]:
    """Return the event files of a folder, the one to go on in at last."""
    return sorted(folder.glob("events.out.tfevents.*"))


class _Stream:
    """An unbuffered file, so that what failed to be written is not written later."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self.closed = False

    def write(self, content: bytes) -> None:
        write_all(self._handle, content)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        if not self.closed:
            os.close(self._handle)
        self.closed = True


class EventFile:
    """What ``torch.utils.tensorboard`` writes events to.

    Args:
        folder: Where the file is, or will be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.0"
        path = next(reversed(event_files(folder)), folder / name)
        self._records = RecordWriter(_Stream(path))
        if path.stat().st_size == 0:
            self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def get_logdir(self) -> str:
        """Return the folder."""
        return str(self.folder)

    def add_event(self, event: Any) -> None:
        """Write one event.

        Raises:
            OSError: If it cannot be written.
        """
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Nothing waits to be written."""

    def reopen(self) -> None:
        """Nothing to do: a new one is made instead."""

    def close(self) -> None:
        """Close the file."""
        self._records.close()


def cut(path: Path, size: int, step: int) -> None:
    """Drop what was logged after a checkpoint, but for the values of its own last step.

    Args:
        path: The event file.
        size: Its bytes when the checkpoint was saved.
        step: Optimizer steps until then.

    Raises:
        OSError: If the file cannot be read or written.
    """
    content = path.read_bytes()
    kept = [record for record, event in _records(content, size) if event.step == step - 1]
    if size < len(content):
        write_bytes(path, content[:size] + b"".join(kept))


def _records(content: bytes, start: int) -> Iterator[tuple[bytes, Any]]:
    """Yield the whole records from byte ``start``, with their events."""
    while start + HEAD <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        end = start + HEAD + length + FOOT
        if end > len(content):
            return  # the process died here
        record = content[start:end]
        yield record, Event.FromString(record[HEAD:-FOOT])
        start = end
