"""A run goes on in its own folder only, alone, and with its own settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qat.errors import CheckpointError, ConfigError, QatError, TrainingError
from qat.resume import differences, find_start
from qat.run_folder import LAST, check_free, is_finished, newest, occupied, run_dir

OLD, NEW = "2026-01-01_00-00-00-000000", "2026-01-02_00-00-00-000000"
SETTINGS = {
    "seed": 0,
    "name": "mine",
    "output_dir": "somewhere",
    "scheme": {"rules": {"ends": {"weight": {"bits": 8}}}},
    "optimizer": {"rates": {"lr": 0.1}},
    "schedule": {"epochs": 1, "calibrate": 0.0},
    "data": {"batch_size": 64, "num_workers": 0},
    "callbacks": {"monitor": {"num_samples": 64}, "anneal": {"_target_": "a"}, "ema": None},
    "export": {"threshold": 1.0},
    "target": "onnxruntime_cpu",
    "ckpt_path": None,
    "resume_changes": "refuse",
}


def changed(key, value, base=SETTINGS):
    first, _, rest = key.partition(".")
    return {**base, first: changed(rest, value, base[first]) if rest else value}


def save_run(folder, settings=SETTINGS):
    """A folder as a run leaves it in mid-training."""
    (folder / LAST.parent).mkdir(parents=True)
    for name in ("config.yaml", "plan.json"):
        (folder / name).write_text("{}")
    torch.save({"hyper_parameters": {"config": settings}}, folder / LAST)
    return folder


def finish(folder, passed=True):
    for name in ("model.onnx", "model.safetensors"):
        (folder / name).write_text("model")
    (folder / "report.json").write_text(json.dumps({"passed": passed}))


def everything(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_last_is_the_newest_run_even_without_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = Path("runs/mine")
    save_run(home / NEW)
    save_run(home / OLD)  # its checkpoint is the newer file
    assert run_dir("mine", "last") == str(home / NEW)
    (home / NEW / LAST).unlink()
    assert run_dir("mine", "last") == str(home / NEW)
    with pytest.raises(CheckpointError, match=r"none yet in .* the newest run: start it again"):
        find_start({**SETTINGS, "ckpt_path": "last"}, home / NEW)
    (home / NEW / "config.yaml").unlink()  # this one had not even started
    assert newest(home) == home / OLD
    assert run_dir("mine", str(home / OLD / LAST)) == str(home / OLD)
    assert Path(run_dir("mine", None)).parent == home


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 7),
        ("name", "other"),
        ("scheme.rules.ends.weight.bits", 2),
        ("optimizer.rates.lr", 0.2),
        ("optimizer.rates.lr", float("nan")),
        ("schedule.epochs", 2),
        ("schedule.calibrate", 0),  # a step, not a fraction
        ("data.batch_size", 32),
        ("callbacks.anneal", None),
        ("callbacks.ema", {"decay": 0.9}),
    ],
)
def test_other_settings_are_refused_unless_allowed(key, value, tmp_path):
    folder = save_run(tmp_path / "run")
    before = everything(tmp_path)
    command = changed(key, value, {**SETTINGS, "ckpt_path": "last"})
    with pytest.raises(
        CheckpointError, match=rf"other settings \({key}.* -> .*resume_changes=allo"
    ):
        find_start(command, folder)
    assert find_start({**command, "resume_changes": "allow"}, folder) == folder / LAST
    finish(folder)
    for word in ("refuse", "allow"):
        with pytest.raises(CheckpointError, match="has finished: its files stay"):
            find_start({**command, "resume_changes": word}, folder)
    assert everything(tmp_path).items() >= before.items()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output_dir", "elsewhere"),
        ("data.num_workers", 4),
        ("callbacks.monitor", None),
        ("export.threshold", 0.9),
        ("target", "tensorrt"),
    ],
)
def test_settings_that_change_no_bit_of_training_may_differ(key, value, tmp_path):
    command = changed(key, value, {**SETTINGS, "ckpt_path": "last"})
    assert find_start(command, folder := save_run(tmp_path)) == folder / LAST


def test_files_of_a_finished_run_are_made_with_other_settings_by_export_alone(tmp_path):
    finish(save_run(tmp_path))
    command = changed("export.threshold", 0.9, {**SETTINGS, "ckpt_path": "last"})
    with pytest.raises(CheckpointError, match=r"export\.threshold: 1\.0 -> 0\.9.*scripts/export"):
        find_start(command, tmp_path)


def test_an_older_checkpoint_of_a_finished_run_goes_on_elsewhere(tmp_path):
    finish(folder := save_run(tmp_path / "run"))
    best = folder / "checkpoints/best.ckpt"
    best.write_bytes((folder / LAST).read_bytes())
    command = {**SETTINGS, "ckpt_path": str(best)}
    with pytest.raises(CheckpointError, match="has finished"):
        find_start(command, folder)
    assert find_start(command, tmp_path / "new") == best
    with pytest.raises(TrainingError, match="a folder for a new run"):
        find_start(command, save_run(tmp_path / "other"))


@pytest.mark.parametrize("content", [b"", b"PK\3\4 half", b"text", None])
def test_a_checkpoint_that_cannot_be_read_is_a_sentence(content, tmp_path):
    folder = save_run(tmp_path)
    whole = (folder / LAST).read_bytes()
    (folder / LAST).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(CheckpointError, match=r"cannot be read .*another \.ckpt") as caught:
        find_start({**SETTINGS, "ckpt_path": "last"}, folder)
    assert "weights_only" not in str(caught.value)  # no advice of torch to load unsafely
    torch.save({"state_dict": {}}, folder / LAST)
    with pytest.raises(CheckpointError, match=r"other content .*use ckpt=\.\.\."):
        find_start({**SETTINGS, "ckpt_path": "last"}, folder)


@pytest.mark.parametrize(("key", "value"), [("ckpt_path", 5), ("resume_changes", "maybe")])
def test_words_that_are_none(key, value, tmp_path):
    with pytest.raises(ConfigError, match=f"{key}=.*got {value!r}"):
        find_start({**SETTINGS, key: value}, tmp_path)


@pytest.mark.parametrize(
    "name", ["checkpoints/last.ckpt", "checkpoints/mine.ckpt", "model.onnx", "report.json"]
)
def test_a_new_run_overwrites_no_other(name, tmp_path):
    check_free(tmp_path)
    check_free(tmp_path / "none")
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("{}")
    check_free(tmp_path)  # of a run that died before it saved anything
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(TrainingError, match=rf"with {name}: .*ckpt_path=last.*hydra\.run\.dir"):
        check_free(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "plan.txt", "report.md"])
def test_files_of_somebody_else_are_not_overwritten(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(TrainingError, match=name):
        find_start(SETTINGS, tmp_path)


@pytest.mark.parametrize("report", ["", "[]", "{}", '{"passed": false}', "nan", '"passed"'])
def test_a_run_without_a_report_that_passed_has_not_finished(report, tmp_path):
    finish(tmp_path)
    assert is_finished(tmp_path)
    (tmp_path / "report.json").write_text(report)
    assert not is_finished(tmp_path)


def test_a_study_finishes_without_models_and_a_killed_run_does_not(tmp_path):
    (tmp_path / "report.json").write_text('{"passed": null}')
    assert is_finished(tmp_path)
    (tmp_path / ".lock").write_text("4711")  # its process died behind the report
    assert not is_finished(tmp_path)
    finish(tmp_path)
    (tmp_path / ".lock").write_text("")
    (tmp_path / "model.onnx").unlink()
    assert not is_finished(tmp_path)


HOLD = """
import os, sys
from pathlib import Path
from qat.run_folder import occupied
with occupied(Path(sys.argv[1])):
    if os.fork() == 0:  # as a worker that outlives its parent for a while
        import time; time.sleep(3); os._exit(0)
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_used_by_one_process_at_a_time_and_free_when_it_dies(tmp_path):
    folder = save_run(tmp_path)
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, cwd=Path(__file__).parents[1]) as holder:
        assert holder.stdout is not None
        pid = holder.stdout.readline().decode().strip()
        before = everything(tmp_path)
        for given in (None, "last"):
            with pytest.raises(TrainingError, match=f"process {pid} trains in: wait"):
                find_start({**SETTINGS, "ckpt_path": given}, folder)
        with pytest.raises(TrainingError, match=pid), occupied(folder):
            pass
        again = {**SETTINGS, "ckpt_path": "last"}  # the other processes of a run share its folder
        assert find_start(again, folder, is_first=False) == folder / LAST
        assert find_start({**SETTINGS, "ckpt_path": None}, folder, is_first=False) is None
        assert everything(tmp_path) == before
        holder.kill()
    assert find_start({**SETTINGS, "ckpt_path": "last"}, folder) == folder / LAST
    with occupied(folder):
        assert (folder / ".lock").read_text() == str(os.getpid())
    assert (folder / ".lock").read_text() == ""


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(QatError, match=r"file/run.*hydra\.run\.dir"),
        occupied(tmp_path / "file/run"),
    ):
        pass


def test_differences_name_both_values_and_what_is_nowhere():
    new = changed("seed", 1, {k: v for k, v in SETTINGS.items() if k != "name"})
    assert differences(SETTINGS, new) == {"name": ("'mine'", "nothing"), "seed": ("0", "1")}
    assert differences(SETTINGS, SETTINGS) == {}
    later = {**SETTINGS, "off": False, "none": None, "on": True}
    assert differences(SETTINGS, later) == {"on": ("nothing", "True")}
    assert differences(later, SETTINGS) == {"on": ("True", "nothing")}
