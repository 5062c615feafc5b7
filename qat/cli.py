"""The command line: registers recipes and models with Hydra, runs, prints errors as sentences."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import hydra
import torchvision
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.errors import ConfigError, QatError

PACKAGE = Path(__file__).parent
TRACEBACK = "--traceback"


def find_folder(name: str) -> Path:
    """Return ``conf`` or ``recipes``: inside an installed wheel, or beside a source tree's package.

    Raises:
        ConfigError: If it is in neither place.
    """
    for folder in (PACKAGE / f"_{name}", PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise ConfigError(f"expected the folder '{name}' beside the package, got none: reinstall qat.")


def register() -> None:
    """Tell Hydra our recipes, every torchvision model by name, and the run folder's resolver."""
    store = ConfigStore.instance()
    folders = [find_folder("recipes"), Path.cwd() / "recipes"]
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            name = path.relative_to(folder).with_suffix("").as_posix()
            store.store(group="recipe", name=name, node=OmegaConf.load(path), package="_global_")
    known = {path.stem for path in (find_folder("conf") / "model").glob("*.yaml")}
    for name in torchvision.models.list_models(module=torchvision.models):
        if name not in known:
            store.store(group="model", name=name, node={"name": name})
    OmegaConf.register_new_resolver("qat_run_dir", run_dir, replace=True, use_cache=True)


def run_dir(name: str, ckpt_path: str | None) -> str:
    """Return the folder of a run: a new one, or, to resume, the one that holds the checkpoint.

    Args:
        name: The run's name.
        ckpt_path: ``last`` for the newest run of that name, a checkpoint's path, or ``None``.
    """
    home = Path("runs") / name
    if ckpt_path == "last":
        known = sorted(home.glob("*/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
        if known:
            return str(known[-1].parent.parent)
    elif ckpt_path is not None and (Path(ckpt_path).parent.parent / "plan.json").is_file():
        return str(Path(ckpt_path).parent.parent)
    return str(home / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f"))


def main() -> Any:
    """Run the command line; a user's mistake ends in one sentence and exit status 1."""
    sys.argv, show_traceback = [a for a in sys.argv if a != TRACEBACK], TRACEBACK in sys.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to us, unformatted
    try:
        register()
        conf = str(find_folder("conf").resolve())
        return hydra.main(version_base="1.3", config_path=conf, config_name="config")(_job)()
    except (QatError, HydraException, OmegaConfBaseException, OSError) as error:
        if show_traceback:
            raise
        fail(error)


def fail(error: BaseException) -> NoReturn:
    """Print ``error`` as one sentence and leave with status 1."""
    sys.stderr.write(f"qat: {explain(error)}\n")
    sys.exit(1)


def explain(error: BaseException) -> str:
    """Return what a user should read of ``error``."""
    if isinstance(error, QatError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"expected to read and write files, got {type(error).__name__} ({text})."
    return f"expected a configuration that composes, got: {text} (see --help for groups and keys)."


def _job(cfg: DictConfig) -> float | None:
    from qat.run import run  # after Hydra has printed --help or composed: it imports everything

    quieten()
    report = run(cfg, Path(HydraConfig.get().runtime.output_dir))
    if report is None:
        return None
    shown = ", ".join(f"{kind} {value:.2f} %" for kind, value in report.accuracy.items())
    log = logging.getLogger("qat")
    log.info("accuracy: %s", shown)
    log.info("agreement: %s", report.verification.agreement)
    log.info("passed; artifact and report in %s", HydraConfig.get().runtime.output_dir)
    return report.accuracy["onnxruntime"]


def quieten() -> None:
    """Silence notices of libraries that a user can do nothing about."""
    for name in ("pytorch_lightning", "lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning_fabric")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
