"""Several processes that train one run: when one dies, the others end too, with a sentence."""

from __future__ import annotations

import os
import subprocess
import threading
import time

import pytorch_lightning as pl

from qat import signals

FIRST = "QAT_FIRST_PROCESS"
"""Environment variable with the process id of the first process, for those that it starts."""
RANK = "LOCAL_RANK"
"""Set by whoever starts the others: Lightning, torchrun or a cluster."""
PERIOD = 0.3
GRACE = 1.5


class WatchRanks(pl.Callback):
    """Watch the processes that Lightning started, or the one that started this.

    Lightning's own observer kills this process without a word; collectives may wait for ever.
    """

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()
        self.trains = False
        """Whether training has begun: what failed before then lay in the checkpoint."""
        if RANK not in os.environ:
            os.environ[FIRST] = str(os.getpid())
        elif os.environ[RANK] != "0" and FIRST in os.environ:
            self._start()  # now: the first process may die before all have found each other

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start to watch the processes that this one started."""
        del pl_module, stage
        started = getattr(trainer.strategy.launcher, "procs", [])
        if started:
            self._children = list(started)
            started.clear()  # an empty list ends Lightning's observer
            self._start()

    def _start(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take signals back: Lightning's handler talks to other processes inside of one."""
        del pl_module
        self.trains = True
        signals.listen(speaks=trainer.is_global_zero)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching: nobody waits for anybody from here."""
        del trainer, pl_module, stage
        self._over.set()

    def end(self) -> None:
        """End the processes that this one started, for it is about to end itself."""
        self._over.set()
        self._kill()

    def _kill(self) -> None:
        for child in self._children:
            child.kill()

    def await_news(self) -> None:
        """Give the watch time to find out whether a process died, after a collective failed."""
        if not self._over.is_set():
            time.sleep(2 * GRACE)

    def _watch(self) -> None:
        while not self._over.wait(PERIOD):
            found = self._dead()
            if found is None:
                continue
            if self._over.wait(GRACE) or signals.stopping():
                return
            self._kill()
            signals.leave(f"expected all processes of the run to live, got {found}", 1)

    def _dead(self) -> str | None:
        """Return how another process ended, if one did."""
        if not self._children:
            return None if os.getppid() == int(os.environ[FIRST]) else "the end of the first"
        codes = [child.poll() for child in self._children]
        return next((f"one that ended with status {code}" for code in codes if code), None)
