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

from qat.data.arguments import check_text, check_whole
from qat.data.base import DataModule, Loaded, Loading
from qat.data.source import Batch, Pair, Source, generator
from qat.errors import ConfigError, DataError, printable
from qat.files import kind
from qat.memory import check_fits

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
        ConfigError: If a number is too small, or a text is none.
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
        check_whole("context", context, 1)
        check_whole("num_train", num_train, 2)
        check_whole("num_test", num_test, 1)
        check_text("pattern", pattern)
        if root is not None:
            check_text("root", root)
        self.root, self.pattern = root, pattern
        self.context, self.num_train, self.num_test = context, num_train, num_test

    def load(self) -> Loaded:
        """Read the files.

        Raises:
            ConfigError: If the pattern is no glob below the folder.
            DataError: If there are fewer than two, one cannot be read, or too little text is in
                them.
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
        ConfigError: If the pattern is no glob below the folder.
        DataError: If there are fewer than two, or one is a pipe, a socket or a device.
    """
    folder = Path(sysconfig.get_path("stdlib") if root is None else root)
    left_out = LEFT_OUT if root is None else set[str]()
    files = sorted(
        path
        for path in _glob(folder, pattern)
        if is_text_file(path) and not left_out & set(path.relative_to(folder).parts)
    )
    if len(files) < 2:
        raise DataError(
            f"expected two files or more like '{pattern}' in '{printable(folder)}', one of them "
            f"for the test, got {len(files)}: correct data.root or data.pattern."
        )
    return files


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return list(folder.glob(pattern))
    except (ValueError, NotImplementedError, OSError) as error:
        raise ConfigError(
            f"expected data.pattern to be a glob below data.root such as '**/*.txt', got "
            f"'{printable(pattern)}' ({printable(error)}): correct it."
        ) from error


def is_text_file(path: Path) -> bool:
    """Whether a path is to be read: folders are passed over, and links that lead nowhere.

    Raises:
        DataError: If it is a pipe, a socket or a device, or cannot be looked up.
    """
    if (what := kind(path)) in ("a folder", "nothing"):
        return False
    if what != "a file":
        raise DataError(
            f"expected a file at '{printable(path)}', got: {what}; remove it, or narrow "
            "data.pattern so that it is left out."
        )
    return True


def _read(files: Sequence[Path]) -> Tensor:
    try:
        size = sum(path.stat().st_size for path in files)
        check_fits(2 * size, "the text", "narrow data.pattern", DataError)  # parts and whole
        content = b"".join(path.read_bytes() for path in files)
    except OSError as error:
        raise DataError(
            f"expected a text file that can be read, got {error.strerror} at "
            f"'{printable(error.filename)}': correct its rights, remove it, or narrow data.pattern."
        ) from error
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0)


def byte_name(byte: int) -> str:
    r"""Return a byte as a class name: the character if it is a printable one, else ``\x0a``."""
    return chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}"
