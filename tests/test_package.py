"""The installed package finds its configs and recipes from any directory."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_brings_its_configs(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, *build, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("qat-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("py.typed", "_conf/config.yaml", "_recipes/resnet_w4a8.yaml"):
        assert f"qat/{name}" in names
    home, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", str(home), str(wheel)], check=True)
    run = ["recipe=tabular_w8a8", "schedule.float_epochs=1", "schedule.epochs=1"]
    done = subprocess.run(
        [sys.executable, str(home / "bin" / "qat-train"), *run],
        check=False,
        capture_output=True,
        text=True,
        cwd=work,
        env={"PYTHONPATH": str(home), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert list(work.glob("runs/tabular_w8a8/*/model.onnx"))
