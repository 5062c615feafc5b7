"""The training benchmarks on a tiny network: rows, ratios and pages; never how long it took."""

import json
import sys
from importlib import import_module

import pytest
from torch import nn

PAGE = "# Page\n\n<!-- step -->\nold\n<!-- /step -->\nend\n"


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def tiny(monkeypatch):
    networks = import_module("networks")
    monkeypatch.setattr(networks, "NETWORKS", {"tiny": networks.Network(Tiny, 4, 12)})


def test_rows_of_steps(tiny, tmp_path, capsys):
    del tiny
    page, target = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text(PAGE)
    modes = "float,qat off,qat regional,LSQ by hand"
    arguments = ["--modes", modes, "--rounds", "2", "--threads", "1"]
    main = import_module("step").main
    assert main([*arguments, "--json", str(target), "--into", str(page)]) == 0
    rows = json.loads(target.read_text())
    assert [row["mode"] for row in rows] == modes.split(",")
    assert rows[0]["ratio_to_float"] == 1.0
    assert all(row["median_ms"] > 0 and "ratio_to_float_compiled" not in row for row in rows)
    text = page.read_text()
    assert "old" not in text
    assert text.count("| tiny |") == 4
    assert "| tiny | qat regional |" in capsys.readouterr().out


def test_a_page_without_marks_is_refused(tiny, tmp_path, capsys):
    del tiny
    page = tmp_path / "page.md"
    page.write_text("nothing")
    arguments = ["--modes", "float", "--rounds", "2", "--threads", "1", "--into", str(page)]
    with pytest.raises(SystemExit, match="1"):
        import_module("step").main(arguments)
    assert "expected <!-- step --> and <!-- /step --> in the page" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_the_peak_of_a_step_is_more_than_what_it_keeps(monkeypatch):
    networks = import_module("networks")
    monkeypatch.setattr(networks, "NETWORKS", {"tiny": networks.Network(Tiny, 64, 64)})
    kept = 4 * 64 * 8 * 62 * 62  # what the convolution makes
    assert kept < import_module("memory").peak("tiny", "float", "cpu") < 20 * kept


def test_rows_of_operators(monkeypatch, tmp_path):
    op, target = import_module("op"), tmp_path / "rows.json"
    monkeypatch.setattr(op, "SIZES", {"tiny": (4, 8, 16, 16)})
    assert op.main(["--rounds", "2", "--threads", "1", "--json", str(target)]) == 0
    rows = json.loads(target.read_text())
    assert [row["mode"].split()[1] for row in rows] == ["forward", "backward"] * 2
    assert all(row["gigabytes_s"] > 0 and row["ratio_to_copy"] > 0 for row in rows)


def test_rows_of_before_are_shown_and_nothing_is_measured(tmp_path, capsys):
    row = {"network": "tiny", "mode": "float", "median_ms": 3.0, "ratio_to_float": 1.0}
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text(json.dumps([row]))
    main = import_module("step").main
    assert main(["--rows", *map(str, paths)]) == 0
    assert capsys.readouterr().out.count("| tiny | float | 3 | 1.00 |") == 2
    with pytest.raises(SystemExit, match="1"):
        main(["--rows", str(tmp_path / "absent.json")])
    assert "expected files that --json wrote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "option", "known"),
    [
        ("step", "--networks", "resnet18_cifar"),
        ("step", "--modes", "qat regional"),
        ("memory", "--modes", "qat regional"),
        ("op", "--modes", "activation forward"),
        ("startup", "--modes", "cold, warm"),
    ],
)
def test_unknown_names_are_refused(name, option, known, capsys):
    with pytest.raises(SystemExit, match="1"):
        import_module(name).main([option, "flaot"])
    error = capsys.readouterr().err
    assert f"expected {option} among " in error
    assert known in error
    assert "got 'flaot': correct it." in error


def test_bars(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path, image = tmp_path / "rows.json", tmp_path / "bars.png"
    rows = [
        {"network": n, "mode": m, "median_ms": 3.0, "ratio_to_float": 1.0}
        for n in "ab"
        for m in "xy"
    ]
    path.write_text(json.dumps(rows))
    assert import_module("step").main(["--rows", str(path), "--plot", str(image)]) == 0
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_rows_of_a_start(tmp_path):
    target = tmp_path / "rows.json"
    arguments = ["--modes", "warm", "--rounds", "1", "--json", str(target)]
    assert import_module("startup").main(arguments) == 0
    *parts, whole = [row["seconds"] for row in json.loads(target.read_text())]
    assert len(parts) == 3
    assert sum(parts) == pytest.approx(whole)
