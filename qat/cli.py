"""The command line: runs, and prints errors as sentences."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qat import signals
from qat.errors import ConfigError, QatError
from qat.explain import check_words, explain, is_override
from qat.folders import find_folder
from qat.terminal import escape, reader_left, terminal

TRACEBACK = "--traceback"
MISTAKES = (QatError, HydraException, OmegaConfBaseException, OSError)


@terminal()
def main() -> Any:
    """Run the command line; a user's mistake ends in one sentence and exit status 1."""
    signals.listen(speaks=_is_first())
    from qat.compose import register  # takes seconds, in which signals may come

    show_traceback = TRACEBACK in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != TRACEBACK]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to us, unformatted
    job = _job if show_traceback else _explained(_job)
    try:
        register()
        check_words([word for word in sys.argv[1:] if is_override(word)])
        return _run_with_hydra(job)
    except MISTAKES as error:
        if show_traceback or _is_end_of_reader(error):
            raise
        fail(error)


def _run_with_hydra(job: Callable[[DictConfig], float | None]) -> Any:
    """Let Hydra compose and run; what it raises over its own settings is a user's mistake."""
    running: list[DictConfig] = []

    @wraps(job)
    def noted(cfg: DictConfig) -> float | None:
        running.append(cfg)
        result = job(cfg)
        running.clear()
        return result

    conf = str(find_folder("conf").resolve())
    try:
        return hydra.main(version_base="1.3", config_path=conf, config_name="config")(noted)()
    except MISTAKES:
        raise
    except Exception as error:
        if running:
            raise
        text = " ".join(str(error).split())
        raise ConfigError(
            f"expected settings that Hydra takes, got {type(error).__name__} ({text}): correct the "
            "overrides of hydra."
        ) from error


def _explained(job: Callable[[DictConfig], float | None]) -> Callable[[DictConfig], float | None]:
    """Catch mistakes inside the job, before Hydra adds lines of its own."""

    @wraps(job)
    def wrapped(cfg: DictConfig) -> float | None:
        try:
            return job(cfg)
        except MISTAKES as error:
            if _is_end_of_reader(error):
                raise
            fail(error)

    return wrapped


def _is_end_of_reader(error: BaseException) -> bool:
    return isinstance(error, BrokenPipeError) and reader_left()


def guard(job: Callable[[], int], *, show_traceback: bool) -> int:
    """Return the exit status of a script's ``job``; a user's mistake ends as in ``main``."""
    signals.listen()
    quieten()
    try:
        return job()
    except MISTAKES as error:
        if show_traceback or _is_end_of_reader(error):
            raise
        if isinstance(error, OSError):
            fail(ConfigError(f"expected paths to read and write, got {error}: correct the path."))
        fail(error)


def fail(error: BaseException) -> NoReturn:
    """Print ``error`` as one sentence and leave with status 1."""
    sys.stderr.write(f"qat: {escape(explain(error))}\n")
    sys.exit(1)


def _is_first() -> bool:
    """Whether this is the process that the user started, not one that it started for the run."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _how_to_go_on(cfg: DictConfig) -> str:
    """Return the command that goes on with a run that was stopped."""
    words = sys.argv[1:] if _is_first() else sys.argv[1:-3]  # Lightning adds three of its own
    command = [*_program(), *(word for word in words if not word.startswith("ckpt_path="))]
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        overrides = (o for o in HydraConfig.get().overrides.task if not o.startswith("ckpt_path="))
        command = [*_program(), *overrides, f"hydra.run.dir={cfg.output_dir}"]
    if (Path(cfg.output_dir) / "checkpoints" / "last.ckpt").is_file():
        return f"go on with: {shlex.join([*command, 'ckpt_path=last'])}"
    return f"there is no checkpoint yet; start again with: {shlex.join(command)}"


def _program() -> list[str]:
    return ["python", sys.argv[0]] if sys.argv[0].endswith(".py") else [Path(sys.argv[0]).name]


def _job(cfg: DictConfig) -> float | None:
    signals.advise(lambda: _how_to_go_on(cfg))
    from qat.run import run  # after Hydra has printed --help or composed: it imports everything

    quieten()
    report = run(cfg)
    if report is None:
        return None
    log = logging.getLogger("qat")
    log.info("accuracy: %s", report.accuracies)
    for warning in report.warnings:
        log.warning("warning: %s", warning)
    if report.is_study:
        log.info("%s; report in %s", report.verdict, cfg.output_dir)
        return report.accuracy["fake_quant"]
    agreement = report.verification.agreement.items()
    log.info("agreement: %s", ", ".join(f"{kind} {share:.4%}" for kind, share in agreement))
    log.info("%s; artifact and report in %s", report.verdict, cfg.output_dir)
    return report.accuracy["onnxruntime"]


def quieten() -> None:
    """Silence notices of libraries that a user can do nothing about."""
    for name in ("pytorch_lightning", "lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning_fabric")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
