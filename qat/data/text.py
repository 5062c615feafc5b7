"""Text as bytes: windows of it, each labelled with the bytes that come next.

Without a folder of one's own the text is the source of Python's standard library, which is wherever
Python is. A sample owns a stretch of the text, and every epoch reads another window of that; so
what is held out for validation is never trained on.
"""

import copy
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from qat.data.base import DataModule, Loaded, Loading
from qat.data.source import Batch, Pair, Source, generator
from qat.errors import ConfigError, DataError

BYTES = 256
TEST_EVERY = 10
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class TextSource(Source):
    """Windows of a text, one in each of ``num_samples`` stretches of the same length.

    Args:
        text: Bytes, uint8, shape (L,).
        context: Bytes of one input; a window has one more, which is the last label.
        num_samples: Stretches; fewer where they would be shorter than a window.
        seed: Seed of the windows' places.
        where: What the text is, for messages.

    Raises:
        DataError: If the text is shorter than a window.
    """

    def __init__(
        self, text: Tensor, context: int, num_samples: int, seed: int, where: str = "the text"
    ) -> None:
        if len(text) <= context:
            raise DataError(
                f"expected more than {context} bytes in {where}, got {len(text)}: add files, or "
                f"lower data.context."
            )
        self.text, self.context, self.seed = text, context, seed
        self.num_samples = min(num_samples, len(text) // (context + 1))
        self.stretch = len(text) // self.num_samples
        self.moves = True
        self._epoch: int | None = None
        self._table = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.num_samples

    def table(self, epoch: int) -> Tensor:
        """Return where in its stretch each window starts, int64, shape (num_samples,)."""
        if not self.moves:
            return torch.zeros(self.num_samples, dtype=torch.int64)
        if self._epoch != epoch:
            places, random = self.stretch - self.context, generator("text", self.seed, epoch)
            self._epoch = epoch
            self._table = torch.randint(places, (self.num_samples,), generator=random)
        return self._table

    def __getitems__(self, pairs: Sequence[Pair]) -> Batch:
        """Read one batch, all of one epoch: bytes and next bytes, int64, shape (B, context)."""
        epoch = pairs[0][0]
        assert all(pair[0] == epoch for pair in pairs), "a batch never mixes epochs"
        index = torch.tensor([i for _, i in pairs])
        starts = index * self.stretch + self.table(epoch)[index]
        windows = self.text[starts[:, None] + torch.arange(self.context + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def plain(self) -> "TextSource":
        """Return the first window of every stretch, sharing memory."""
        other = copy.copy(self)
        other.moves = False
        return other

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch."""
        return (self.context,)

    @property
    def is_random(self) -> bool:
        """Whether windows move from epoch to epoch; none can in a stretch of its own length."""
        return self.moves and self.stretch > self.context + 1


class TextData(DataModule):
    """Text files as bytes; every tenth file, in the order of their names, is for the test.

    Args:
        root: A folder of text files; None for the source of Python's standard library.
        pattern: Which files below it, as a glob.
        context: Bytes of one sample.
        num_train: Most training samples an epoch.
        num_test: Most test samples.
        **loading: Arguments of :class:`~qat.data.base.DataModule`.

    Raises:
        ConfigError: If a number is too small.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        pattern: str = "**/*.py",
        context: int = 64,
        num_train: int = 10_000,
        num_test: int = 1000,
        **loading: Unpack[Loading],
    ) -> None:
        super().__init__(**loading)
        if min(context, num_train - 1, num_test) < 1:
            raise ConfigError(
                f"expected data.context and data.num_test to be at least 1 and data.num_train at "
                f"least 2, got {context}, {num_test} and {num_train}: raise them."
            )
        self.root, self.pattern = root, pattern
        self.context, self.num_train, self.num_test = context, num_train, num_test

    def load(self) -> Loaded:
        """Read the files.

        Raises:
            DataError: If there are fewer than two, or too little text in them.
        """
        files = find_files(self.root, self.pattern)
        tested = files[::TEST_EVERY]
        trained = sorted(set(files) - set(tested))
        return Loaded(
            self._source(trained, self.num_train, "the training text"),
            self._source(tested, self.num_test, "the test text").plain(),
            [byte_name(byte) for byte in range(BYTES)],
        )

    def _source(self, files: Sequence[Path], num_samples: int, where: str) -> TextSource:
        return TextSource(_read(files), self.context, num_samples, self.seed, where)


def find_files(root: str | Path | None, pattern: str) -> list[Path]:
    """Return the files of a text in the order of their names.

    Args:
        root: A folder; None for Python's standard library without its tests and installed packages.
        pattern: Which files below it, as a glob.

    Raises:
        DataError: If there are fewer than two.
    """
    folder = Path(sysconfig.get_path("stdlib") if root is None else root)
    left_out = LEFT_OUT if root is None else set[str]()
    files = sorted(
        path
        for path in folder.glob(pattern)
        if path.is_file() and not left_out & set(path.relative_to(folder).parts)
    )
    if len(files) < 2:
        raise DataError(
            f"expected two files or more like '{pattern}' in '{folder}', one of them for the test, "
            f"got {len(files)}: correct data.root or data.pattern."
        )
    return files


def _read(files: Sequence[Path]) -> Tensor:
    content = b"".join(path.read_bytes() for path in files)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0)


def byte_name(byte: int) -> str:
    r"""Return a byte as a class name: the character if it is a printable one, else ``\x0a``."""
    return chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}"
