"""Tests that can fail: of faults put into core files one at a time, they notice nine in ten.

``QAT_MUTANTS`` (5) faults a file, drawn by ``QAT_MUTANT_SEED`` (0), in the files that contain
``QAT_MUTANT_FILES``, one of several words. With ``-n 0 -s``, each verdict is printed as it comes. A
survivor is explained in ``EQUIVALENT``, or wants a test near the code. A run takes about an hour.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaigns.mutants import Mutant, mutants
from tests.campaigns.warm_tests import WarmTests
from tests.runs import ROOT

NUMBER = int(os.environ.get("QAT_MUTANTS", "5"))
SEED = int(os.environ.get("QAT_MUTANT_SEED", "0"))
WORDS = os.environ.get("QAT_MUTANT_FILES", "qat/").split()
SECONDS = 300  # a fault that never ends is noticed, too
CALLBACKS = "qat/training/callbacks"
TESTS = {  # the tests near each file, the nearest and the quickest first
    "qat/gate.py": ["test_gate.py", "export/test_report.py", "test_several_inputs.py"],
    "qat/forms.py": ["test_forms.py"],
    "qat/export/agreement.py": ["export/test_agreement.py", "export/test_verify.py"],
    "qat/export/dynamic.py": [
        "export/test_dynamic.py::test_every_product_runs_on_integers",
        "export/test_dynamic.py::test_codes_and_predictions_are_those_of_the_fold_stage",
    ],
    "qat/export/form.py": ["test_calls.py", "export/test_trees.py"],
    "qat/export/onnx.py": [
        "export/test_onnx.py::test_a_file_that_no_runtime_could_read_is_not_written",
        "export/test_onnx.py::test_averages_over_images_have_an_integer_kernel_and_nothing_is_merged",
        "export/test_onnx.py::test_other_formats_and_layers_load_and_agree",
        "export/test_onnx.py::test_export_keeps_the_model_and_warns_of_nothing",
        "export/test_onnx.py::test_softmax_of_codes_and_layers_with_two_scales_are_exact",
        "export/test_onnx.py::test_interface_of_the_file",
        "export/test_onnx.py::test_nothing_of_the_exporting_machine_is_in_the_file",
        "export/test_onnx_file.py",
    ],
    "qat/export/outcome.py": ["export/test_outcome.py"],
    "qat/export/packed.py": [
        "export/test_packed.py",
        "runtimes/test_packed_model.py::test_what_it_tells",
        "runtimes/test_packed_model.py::test_every_layer",
        "runtimes/test_packed_model.py::test_damaged_and_hostile_files",
    ],
    "qat/export/report.py": ["export/test_report.py", "export/test_outcome.py"],
    "qat/export/runtime.py": ["export/test_runtime.py"],
    "qat/export/sites.py": ["export/test_verify.py"],
    "qat/export/storage.py": [
        "export/test_storage.py::test_groups_are_those_of_the_converted_model_bit_for_bit",
        "export/test_storage.py::test_blocks_of_a_power_of_two_from_16_become_one_operator",
        "export/test_storage.py::test_other_matrices_do_not",
        "export/test_storage.py::test_wide_weights_stay_in_eight_bits",
        "export/test_storage.py::test_unknown_storage_is_refused",
    ],
    "qat/export/verify.py": ["export/test_verify.py", "export/test_runtime.py"],
    "qat/export/workarounds.py": ["export/test_workarounds.py"],
    "qat/batch_norm.py": ["test_batch_norm.py", "graph/test_insert.py"],
    "qat/layers.py": ["graph/test_insert.py", "test_held.py", "graph/test_convert.py"],
    "qat/integer_layers.py": ["test_integer_layers.py", "graph/test_convert.py"],
    "qat/graph/convert.py": ["graph/test_convert.py", "graph/test_residual.py"],
    "qat/graph/insert.py": ["graph/test_insert.py", "graph/test_residual.py"],
    "qat/graph/planner.py": ["graph/test_plan.py", "graph/test_residual.py"],
    "qat/graph/rules.py": ["graph/test_plan.py"],
    "qat/graph/sites.py": ["graph/test_plan.py", "graph/test_residual.py"],
    "qat/training/ending.py": ["training/test_ending.py"],
    "qat/training/schedule.py": ["training/test_schedule.py", "training/test_phases.py"],
    f"{CALLBACKS}/anneal.py": ["training/test_anneal.py"],
    f"{CALLBACKS}/average.py": ["training/test_average.py"],
    f"{CALLBACKS}/calibrate.py": ["training/test_calibrate.py", "training/test_defaults.py"],
    f"{CALLBACKS}/checkpoint.py": ["training/test_checkpoint.py"],
    f"{CALLBACKS}/clock.py": ["training/test_clock.py"],
    f"{CALLBACKS}/distill.py": ["training/test_distill.py", "training/test_teacher_cache.py"],
    f"{CALLBACKS}/freeze.py": ["training/test_phases.py", "training/test_oscillations.py"],
    f"{CALLBACKS}/guard.py": ["training/test_guard.py"],
    f"{CALLBACKS}/lower_bits.py": ["training/test_lower_bits.py", "training/test_defaults.py"],
    f"{CALLBACKS}/milestone.py": ["training/test_milestone.py", "training/test_phases.py"],
    f"{CALLBACKS}/miniature.py": ["training/test_miniature.py", "training/test_probe.py"],
    f"{CALLBACKS}/monitor.py": ["training/test_defaults.py", "training/test_monitor.py"],
    f"{CALLBACKS}/oscillations.py": ["training/test_oscillations.py", "training/test_defaults.py"],
    f"{CALLBACKS}/probe.py": [
        "training/test_probe_batches.py",
        "training/test_probe.py",
        "training/test_defaults.py",
    ],
    f"{CALLBACKS}/prune.py": ["training/test_prune.py"],
    f"{CALLBACKS}/reestimate.py": ["training/test_reestimate.py"],
    f"{CALLBACKS}/size_penalty.py": ["training/test_size_penalty.py"],
}
PARTS = ("qat", "tests", "conf", "recipes", "scripts", "train.py", "pyproject.toml")
EQUIVALENT = {  # file, change and, from the left, the line -> why no test should notice it
    "qat/export/dynamic.py: 0 -> 1 in dequantizes =": "its codes and their scale have one reader",
    f"{CALLBACKS}/lower_bits.py: 1 -> 2 in lowest =": "of a model in which nothing has bits",
    f"{CALLBACKS}/miniature.py: loss < first + DIVERGED -> (loss <=": "a loss of just that much",
    f"{CALLBACKS}/monitor.py: 0 -> 1 in goes_on =": "a file of events has more than one byte",
    f"{CALLBACKS}/probe.py: 16 -> 17 in LEAST_SAMPLES": "a bound of taste: any near it is as good",
    f"{CALLBACKS}/reestimate.py: True -> False in for norm": "lists that were made of each other",
    f"{CALLBACKS}/reestimate.py: 50 -> 51 in def __init__": "a default that nothing else names",
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for part in PARTS:
        origin = ROOT / part
        (shutil.copytree if origin.is_dir() else shutil.copy)(origin, folder / part)
    return folder


@pytest.fixture(scope="module")
def warm(folder) -> Iterator[WarmTests]:
    warm = WarmTests(folder, SECONDS)
    yield warm
    warm.close()


def passes(warm: WarmTests, tests: list[str]) -> bool:
    return warm.run([f"tests/{name}" for name in tests])


def write(path: Path, source: str, moment: int) -> None:
    """Write a file with a time of its own: bytecode is known by seconds and size."""
    path.write_text(source, encoding="utf-8")
    os.utime(path, (moment, moment))


def survivors(warm: WarmTests, path: Path, file: str, drawn: list[Mutant]) -> list[str]:
    whole, left, moment = path.read_text(encoding="utf-8"), [], int(time.time())
    for number, mutant in enumerate(drawn):
        write(path, mutant.source, moment + 2 * number)
        has_survived = passes(warm, TESTS[file])
        verdict = "SURVIVED" if has_survived else warm.first_failure()
        say(f"{file}:{mutant.line}: {mutant.change}\n    {verdict}")
        if has_survived:
            left.append(f"{file}: {mutant.change} in {mutant.text}")
    write(path, whole, moment - 2)
    return left


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 (the figures of the campaign)


def test_nine_of_ten_faults_are_noticed(folder, warm):
    number, left = 0, []
    for file, tests in TESTS.items():
        if not any(word in file for word in WORDS):
            continue
        drawn = mutants((folder / file).read_text(encoding="utf-8"), NUMBER, SEED)
        assert passes(warm, tests), f"{file} without a fault: {warm.first_failure()}"
        found = survivors(warm, folder / file, file, drawn)
        say(f"{file}: {len(drawn) - len(found)} of {len(drawn)} noticed")
        number, left = number + len(drawn), left + found
    unexplained = [line for line in left if not line.startswith(tuple(EQUIVALENT))]
    say("\n".join([f"{number - len(left)} of {number} faults noticed; unexplained:", *unexplained]))
    assert number
    assert len(unexplained) <= number / 10
