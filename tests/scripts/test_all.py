import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("evaluate", "export", "lower", "predict", "verify")


@pytest.mark.parametrize("name", [*SCRIPTS, "print_plan", "zoo"])
def test_help_shows_an_example_without_loading_torch(name):
    command = [sys.executable, "-X", "importtime", ROOT / "scripts" / f"{name}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"python scripts/{name}.py " in done.stdout
    assert "torch" not in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_traceback_on_request_only(name, call, load_script, tmp_path):
    given = [str(tmp_path / "none.ckpt"), *([str(tmp_path)] if name == "predict" else [])]
    status, _, error = call(name, *given)
    assert status == 1
    assert "Traceback" not in error
    with pytest.raises(Exception, match=str(tmp_path)):
        load_script(name).main([*given, "--traceback"])
