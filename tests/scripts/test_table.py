"""The results table: newest run of each seed, only those that passed, between its marks."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "table.py"


def write(folder: Path, seed: int, accuracy: float, *, when: int, passed: bool = True) -> None:
    folder.mkdir(parents=True)
    report = {
        "name": "r",
        "passed": passed,
        "accuracy": {"float": 90.0, "fake_quant": accuracy, "onnxruntime": accuracy},
        "agreement": {"onnxruntime": 1.0},
        "size_bytes": {"float": 1000, "onnx": 500, "safetensors": 250},
        "seconds": {"float": 1.5, "quantize": 2.5},
        "details": {"seed": seed, "epochs": "3 + 2", "date": "2020-01-02", "machine": "m"},
    }
    path = folder / "report.json"
    path.write_text(json.dumps(report))
    os.utime(path, (when, when))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_table_between_its_marks(tmp_path: Path) -> None:
    write(tmp_path / "runs/a", 0, 10.0, when=1)
    write(tmp_path / "runs/b", 0, 88.0, when=2)
    write(tmp_path / "runs/c", 1, 90.0, when=3)
    write(tmp_path / "runs/d", 1, 20.0, when=4, passed=False)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    assert run(tmp_path / "runs", "--into", page).returncode == 0
    before, row, after = page.read_text().partition(
        "| r | 3 + 2 | 0, 1 | 90.00 ± 0.00 | 89.00 ± 1.41 | 89.00 ± 1.41 | 100.00 | 1,000 "
        "| 250 | 4.00 ± 0.00 | 2020-01-02 | m |"
    )
    assert row
    assert before.startswith("before\n<!-- results -->\n| run |")
    assert after == "\n<!-- /results -->\nafter\n"


def test_runs_of_other_settings_have_rows_of_their_own(tmp_path: Path) -> None:
    def settings(seed: int, quantizer: str, bits: int = 8, **more: object) -> str:
        rules = {"body": {"weight": {"bits": bits, "quantizer": quantizer}, "match": "a|b"}}
        groups = {"quantizer": {"weight": quantizer}, "scheme": {"rules": rules}}
        return json.dumps({"data": {"path": str(seed)}, "seed": seed, **groups, **more})

    runs = {
        "a": (0, 80.0, settings(0, "lsq")),
        "b": (1, 82.0, settings(1, "lsq", of_a_later_version=True, ckpt_key=None)),
        "c": (0, 60.0, settings(0, "apot")),
        "d": (0, 40.0, settings(0, "apot", 4)),
        "e": (1, 62.0, settings(1, "apot")),
        "f": (1, 63.0, settings(1, "apot", output_dir="elsewhere")),
    }
    for when, (name, (seed, accuracy, config)) in enumerate(runs.items()):
        write(tmp_path / "runs" / name, seed, accuracy, when=when + 1)
        (tmp_path / "runs" / name / "config.yaml").write_text(config)
    done = run(tmp_path / "runs")
    cells = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [(row[0], row[2], row[4]) for row in cells] == [
        ("r", "0, 1", "61.50 ± 2.12"),
        ("r, quantizer.weight=lsq", "0, 1", "81.00 ± 1.41"),
        ("r, scheme.rules.body.weight.bits=4", "0", "40.00"),
    ]


def test_a_study_among_the_seeds_has_no_file(tmp_path: Path) -> None:
    for seed, accuracy in ((0, 88.0), (1, 90.0)):
        write(tmp_path / f"runs/{seed}", seed, accuracy, when=seed + 1)
    path = tmp_path / "runs/1/report.json"
    report = json.loads(path.read_text())
    report["passed"] = None
    del report["agreement"], report["accuracy"]["onnxruntime"], report["size_bytes"]["safetensors"]
    path.write_text(json.dumps(report))
    cells = run(tmp_path / "runs").stdout.splitlines()[-1].split(" | ")
    assert cells[4:7] == ["89.00 ± 1.41", "88.00 (1 of 2 seeds)", "100.00"]
    assert cells[8] == "250"


def test_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("mine")
    done = run(tmp_path, "--into", page)
    assert done.returncode == 2
    assert "expected <!-- results -->" in done.stderr
    assert page.read_text() == "mine"


def test_header_of_a_recipe_is_filled_and_filled_again(tmp_path: Path) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "r.yaml").write_text("# @package _global_\n# what it is\ndefaults:\n  - a\n")
    (recipes / "other.yaml").write_text("defaults: []\n")
    for seed, accuracy in ((0, 88.0), (1, 90.0)):
        write(tmp_path / f"runs/{seed}", seed, accuracy, when=seed + 1)
        assert run(tmp_path / "runs", "--recipes", recipes).returncode == 0
    assert (recipes / "r.yaml").read_text() == (
        "# @package _global_\n# what it is\n"
        "# Measured: float 90.00 ± 0.00 %, onnxruntime 89.00 ± 1.41 %, agreement 100.00 %, "
        "seed 0, 1; 4.00 ± 0.00 s\n#   on m; 2020-01-02.\n"
        "defaults:\n  - a\n"
    )
    assert (recipes / "other.yaml").read_text() == "defaults: []\n"


def test_header_has_the_perplexities_where_all_are_known(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("defaults:\n")
    write(tmp_path / "runs/a", 0, 88.0, when=1)
    path = tmp_path / "runs/a/report.json"
    known = {"float": 3.5, "post_training": 4.25, "onnxruntime": 3.75, "simulated": 9.0}
    path.write_text(json.dumps({**json.loads(path.read_text()), "perplexity": known}))
    assert run(tmp_path / "runs", "--recipes", tmp_path).returncode == 0
    line = "#   Perplexity: float 3.500, post-training 4.250, onnxruntime 3.750."
    assert line in recipe.read_text().splitlines()


def test_rows_of_full_length_have_marks_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "runs/a", 0, 88.0, when=1)
    page = tmp_path / "page.md"
    page.write_text("<!-- results -->kept<!-- /results --><!-- full -->none<!-- /full -->")
    assert run(tmp_path / "runs", "--marks", "full", "--into", page).returncode == 0
    assert page.read_text().startswith(
        "<!-- results -->kept<!-- /results --><!-- full -->\n| run |"
    )


def test_peers_stand_below_the_run_of_their_width(tmp_path: Path) -> None:
    for seed, accuracy in ((0, 88.0), (1, 90.0)):
        write(tmp_path / f"runs/{seed}", seed, accuracy, when=seed + 1)
        path = tmp_path / f"runs/{seed}/report.json"
        path.write_text(path.read_text().replace('"r"', '"net_w4a4"'))
        peer = {
            "method": "lsq",
            "bits": "w4a4",
            "seed": seed,
            "lr": 0.01,
            "fake_quant": accuracy - 1,
        }
        (tmp_path / f"{seed}.json").write_text(json.dumps(peer))
    page = tmp_path / "page.md"
    page.write_text("<!-- results --><!-- /results -->\n<!-- peers --><!-- /peers -->\n")
    files = [tmp_path / "1.json", tmp_path / "0.json"]
    assert run(tmp_path / "runs", "--into", page, "--peers", *files).returncode == 0
    assert page.read_text().endswith(
        "| w4a4 | qat | 0, 1 | 89.00 ± 1.41 |\n"
        "| w4a4 | lsq, rate 0.01 | 0, 1 | 88.00 ± 1.41 |\n<!-- /peers -->\n"
    )
    done = run(tmp_path / "runs", "--into", page, "--peers", tmp_path / "absent.json")
    assert done.returncode != 0


def test_rows_of_other_folders_stay(tmp_path: Path) -> None:
    page, peer = tmp_path / "page.md", {"bits": "w4a4", "lr": 0.01, "seed": 0, "fake_quant": 90.0}
    page.write_text("<!-- results --><!-- /results -->\n<!-- peers --><!-- /peers -->\n")
    for number, name in enumerate(("b_w4a4", "a_w4a4", "b_w4a4")):
        folder, found = tmp_path / str(number), tmp_path / f"{number}.json"
        write(folder, 0, 90.0 + number, when=number)
        path = folder / "report.json"
        path.write_text(path.read_text().replace('"r"', f'"{name}"'))
        found.write_text(json.dumps({**peer, "method": f"lsq{number % 2}"}))
        assert run(folder, "--into", page, "--peers", found).returncode == 0
    rows = [
        line.strip("| ").split(" | ") for line in page.read_text().splitlines() if "w4a4" in line
    ]
    assert [(row[0], row[4]) for row in rows[:2]] == [("a_w4a4", "91.00"), ("b_w4a4", "92.00")]
    assert [row[1] for row in rows[2:]] == ["qat", "lsq0, rate 0.01", "lsq1, rate 0.01"]
    assert rows[2][3] == "92.00"


def test_files_that_are_no_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"name": 5}')
    (tmp_path / "peer.json").write_text("[]")
    (tmp_path / "runs").mkdir()
    for words, named in (
        ([tmp_path], "report.json"),
        ([tmp_path / "none"], "none"),
        ([tmp_path / "runs", "--peers", tmp_path / "peer.json"], "peer.json"),
    ):
        done = run(*words)
        assert done.returncode == 1
        assert done.stderr.startswith("qat: ")
        assert named in done.stderr
        assert done.stderr.count("\n") == 1
