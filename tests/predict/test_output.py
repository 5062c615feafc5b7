"""An output cut off anywhere and gone on with has the bytes of one that was never stopped."""

import csv
import hashlib
import json
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict

import numpy as np
import pytest

from qat.errors import ConfigError, DataError, QatError
from qat.predict.inputs import Inputs
from qat.predict.output import open_output
from qat.predict.ownership import state_path, unreadable_path
from qat.predict.parquet import PART_ROWS, ParquetWriter
from qat.predict.predictor import Prediction
from qat.predict.reader import Reader
from qat.predict.state import save
from qat.predict.writer import as_it_was, harmless
from qat.terminal import escape

OPTIONS = {"top": 2, "batch": 3, "crop": False}
TEXT = ("csv", "json", "jsonl")


def batch(number):
    """Make three inputs; the second batch has none that can be read, the others leave one out."""
    found = [
        Prediction(f'{number}, "é"\n{i}.png', ["a,b", "c"], [2 / 3, 1 / (3 + i)]) for i in range(2)
    ]
    lost = [(f"{number}-{i}.png", "expected, got") for i in range(3 if number == 1 else 1)]
    return ([] if number == 1 else found), lost


BATCHES = [batch(number) for number in range(4)]


@pytest.fixture
def opened(tmp_path):
    """Open an output of a format for one model and one input."""
    model, source = tmp_path / "model.onnx", tmp_path / "x.npy"
    model.write_text("model")
    np.save(source, np.zeros((12, 1), np.float32))

    def open_it(kind, name="out", options=OPTIONS, **how):
        inputs = Inputs([source], Reader((1,), None, None))
        return open_output(kind, tmp_path / name, model, inputs, options, **how)

    return open_it


def fill(output):
    with output:
        for found in BATCHES[output.place.batches :]:
            output.add(*found)
    return output


def stop(output, after):
    """Write some batches and leave it as a kill would, with all that was flushed by then."""
    for found in BATCHES[:after]:
        output.add(*found)
    output._writer.close()
    output._list.close()


def contents(path):
    """Return the bytes of everything that belongs to an output."""
    files = sorted(path.parent.glob(f"{path.name}*"))
    inside = [f for file in files for f in ([file] if file.is_file() else sorted(file.iterdir()))]
    return {file.name.removeprefix(path.name): file.read_bytes() for file in inside}


@pytest.mark.parametrize("kind", TEXT)
def test_what_is_written_is_what_was_predicted(kind, opened, tmp_path):
    output = fill(opened(kind))
    text = (tmp_path / "out").read_text(encoding="utf-8")
    expected = [asdict(p) for found, _ in BATCHES for p in found]
    if kind == "csv":
        with (tmp_path / "out").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        best = [row for row in rows if row["rank"] == "1"]
        assert [row["file"] for row in best] == [escape(row["file"]) for row in expected]
        shares = [float(row["probability"]) for row in rows]
        assert shares == [share for row in expected for share in row["probabilities"]]
        assert [row["class"] for row in rows[:2]] == ["a,b", "c"]
    elif kind == "json":
        assert json.loads(text) == expected
    else:
        assert [json.loads(line) for line in text.splitlines()] == expected
    with unreadable_path(tmp_path / "out").open(newline="", encoding="utf-8") as file:
        listed = [tuple(row) for row in csv.reader(file)]
    lost = [pair for _, left_out in BATCHES for pair in left_out]
    assert listed == [("file", "reason"), *lost]
    assert (output.place.predicted, output.left_out) == (6, lost)


@pytest.mark.parametrize("kind", TEXT)
def test_a_kill_anywhere_changes_nothing(kind, opened, tmp_path):
    fill(opened(kind, "whole"))
    whole = contents(tmp_path / "whole")
    out = tmp_path / "out"
    beside = unreadable_path(out)
    for after in range(len(BATCHES) + 1):
        stop(opened(kind, force=True), after)
        state, written = state_path(out).read_bytes(), out.stat().st_size
        for extra in range(0, len(whole[""]) - written + 1, 11):  # of what was about to be written
            out.write_bytes(whole[""][: written + extra])
            beside.write_bytes(whole[".unreadable.csv"])
            state_path(out).write_bytes(state)
            output = opened(kind, resume=True)
            assert output.place.batches == after
            fill(output)
            assert contents(out) == whole


def test_a_json_list_of_nothing(opened, tmp_path):
    with opened("json") as output:
        output.add([], [("a.png", "broken")])
    assert json.loads((tmp_path / "out").read_text()) == []


def test_an_error_leaves_an_output_to_go_on_with(opened, tmp_path):
    fill(opened("json", "whole"))
    with suppress(ZeroDivisionError), opened("json") as output:
        output.add(*BATCHES[0])
        output.add([1 / 0], [])
    fill(opened("json", resume=True))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_output_stays(opened, tmp_path):
    fill(opened("json"))
    before = contents(tmp_path / "out")
    again = fill(opened("json", resume=True))
    assert contents(tmp_path / "out") == before
    assert (again.place.finished, again.place.predicted, len(again.left_out)) == (True, 6, 6)


def test_nothing_is_replaced_unasked(opened, tmp_path):
    fill(opened("csv"))
    with pytest.raises(ConfigError, match=r"'.*out' exists: .*--resume.*--force"):
        opened("csv")
    fill(opened("jsonl", force=True))
    assert (tmp_path / "out").read_text().startswith("{")
    for name in ("x.npy", "model.onnx"):
        with pytest.raises(ConfigError, match="that is no input"):
            opened("csv", name, force=True)
    assert len(np.load(tmp_path / "x.npy")) == 12


@pytest.mark.parametrize("key", OPTIONS)
def test_other_options_are_refused(key, opened):
    stop(opened("csv"), 1)
    with pytest.raises(ConfigError, match=f"with the same {key}, which was {OPTIONS[key]} and is"):
        opened("csv", options={**OPTIONS, key: 5}, resume=True)


def test_another_model_input_or_format_is_refused(opened, tmp_path):
    stop(opened("csv"), 1)
    with pytest.raises(ConfigError, match="the same format, which was csv and is jsonl"):
        opened("jsonl", resume=True)
    (tmp_path / "x.npy").write_text("another")
    with pytest.raises(ConfigError, match="the same inputs"):
        opened("csv", resume=True)
    (tmp_path / "model.onnx").write_text("another")
    with pytest.raises(ConfigError, match="the same model file"):
        opened("csv", resume=True)


@pytest.mark.parametrize("state", [None, "", "[]", "{}", '{"model": 1}', "\0"])
def test_without_its_state_an_output_is_not_gone_on_with(state, opened, tmp_path):
    stop(opened("csv"), 2)
    path = state_path(tmp_path / "out")
    path.unlink() if state is None else path.write_text(state)
    with pytest.raises(ConfigError, match=r"state.json' to say how far .*--force"):
        opened("csv", resume=True)


def test_what_is_shorter_than_it_was_is_refused(opened, tmp_path):
    stop(opened("csv"), 1)
    (tmp_path / "out").write_text("file")
    with pytest.raises(DataError, match=r"expected at least \d+ bytes .*, got 4"):
        opened("csv", resume=True)


def test_resume_begins_what_is_not_there(opened, tmp_path):
    fill(opened("csv", "whole"))
    fill(opened("csv", resume=True))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_without_pyarrow_parquet_is_a_sentence(opened, monkeypatch, tmp_path):
    (tmp_path / "out").write_text("precious")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pyarrow .* not installed .*pip install pyarrow"):
        opened("parquet", force=True)
    assert (tmp_path / "out").read_text() == "precious"


@pytest.fixture
def pyarrow(monkeypatch):
    """Make a part of every two batches."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    monkeypatch.setattr("qat.predict.parquet.PART_ROWS", 2 * OPTIONS["batch"] * OPTIONS["top"])
    return parquet


def test_parts_hold_what_was_predicted(pyarrow, opened, tmp_path):
    fill(opened("parquet"))
    names = [part.name for part in sorted((tmp_path / "out").iterdir())]
    assert names == ["part-000000.parquet", "part-000001.parquet"]
    table = pyarrow.read_table(tmp_path / "out").to_pylist()
    assert table == [
        {"file": p.file, "rank": rank, "class": name, "probability": share}
        for found, _ in BATCHES
        for p in found
        for rank, (name, share) in enumerate(zip(p.classes, p.probabilities, strict=True), 1)
    ]


@pytest.mark.parametrize("after", range(len(BATCHES) + 1))
@pytest.mark.parametrize("in_progress", [False, True])
def test_a_kill_loses_the_part_in_progress(after, in_progress, pyarrow, opened, tmp_path):
    fill(opened("parquet", "whole"))
    stop(opened("parquet"), after)
    parts = after // 2
    if in_progress:
        (tmp_path / "out" / f".part-{parts:06}.parquet.part").write_text("half a part")
        shutil.copy(
            tmp_path / "whole/part-000000.parquet", tmp_path / f"out/part-{parts:06}.parquet"
        )
    output = opened("parquet", resume=True)
    assert output.place.batches == 2 * parts
    fill(output)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_parts_that_vanished_and_files_of_others(pyarrow, opened, tmp_path):
    stop(opened("parquet"), 2)
    other = tmp_path / "out" / "part-of-mine.parquet"
    other.write_text("mine")
    (tmp_path / "out" / "part-000000.parquet").unlink()
    with pytest.raises(QatError, match=r"expected 1 parts .* is missing"):
        opened("parquet", resume=True)
    fill(opened("parquet", force=True))
    assert other.read_text() == "mine"


def test_parts_have_a_size_that_memory_can_hold(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    for rows in (1, 64, PART_ROWS, 10 * PART_ROWS):
        assert ParquetWriter(tmp_path, rows=rows).every == max(1, PART_ROWS // rows)


@pytest.mark.parametrize("start", [*"=+-@\t\r\n＝＋－＠", "'=", "''@"])  # noqa: RUF001
def test_no_cell_is_a_formula(start):
    text = f"{start}SUM(1)"
    cell = harmless(text)
    assert cell == f"'{text}"
    assert as_it_was(cell) == text


@pytest.mark.parametrize("text", ["", "'", "'a", "a=1", "photos/1.png", " =1", "''"])
def test_other_cells_stay(text):
    assert harmless(text) == text == as_it_was(text)


def test_names_are_harmless_in_tables_and_come_back(opened, tmp_path):
    output = opened("csv")
    output.add([Prediction("=1.png", ["@a", "-1"], [0.75, 0.25]), Prediction("b", ["a"], [1])], [])
    output.add([], [("+2.png", "-reason")] * 3)
    output._writer.close()
    output._list.close()
    text = (tmp_path / "out").read_text(encoding="utf-8").splitlines()
    assert text[1:3] == ["'=1.png,1,'@a,0.75", "'=1.png,2,'-1,0.25"]
    assert "'+2.png,'-reason" in unreadable_path(tmp_path / "out").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", TEXT)
def test_what_was_edited_since_is_not_gone_on_with(kind, opened, tmp_path):
    for after in (2, len(BATCHES)):
        for name in ("out", "out.unreadable.csv", "out.state.json"):
            output = opened(kind, force=True)
            stop(output, after) if after == 2 else fill(output)
            path = tmp_path / name
            content = bytearray(path.read_bytes())
            content[-9] ^= 1
            path.write_bytes(content)
            before = contents(tmp_path / "out")
            with pytest.raises(ConfigError, match=r"state.json' to say how far"):
                opened(kind, resume=True)
            assert contents(tmp_path / "out") == before
            path.unlink()
            with pytest.raises(QatError, match=r"expected '.*state.json'|bytes in"):
                opened(kind, resume=True)
            save(tmp_path / "out", output.request, output.place)  # so that --force knows it


def edited(state, **changes):
    """Return a state as if it had been written so."""
    state = {key: value for key, value in {**state, **changes}.items() if key != "checksum"}
    text = json.dumps(state, sort_keys=True)
    return json.dumps({**state, "checksum": hashlib.sha256(text.encode()).hexdigest()})


def test_a_state_that_lies_is_a_sentence(opened, tmp_path):
    stop(opened("csv"), 2)
    path = state_path(tmp_path / "out")
    state = json.loads(path.read_text())
    lies = [
        edited(state, **{key: value})
        for key in ("batches", "predicted", "size", "unreadable")
        for value in (None, True, -1, 1.5, "1", state[key] + 1, state[key] - 1, 2**62, 2**70)
    ]
    lies += [edited(state, **change) for change in (
        {"finished": 0}, {"finished": True}, {"finished": True, "size": 0}, {"more": 1},
        {"sha256": "0" * 64}, {"sha256": ""}, {"options": []}, {"options": {**OPTIONS, "top": "2"}},
        {"model": 5}, {"inputs": None})]  # fmt: skip
    lies += [json.dumps({**state, "predicted": 0}), "[" * 50_000, json.dumps(state) + " " * 2**17]
    lies += ['{"batches": 1, ' + json.dumps(state)[1:]]
    before = contents(tmp_path / "out")
    for lie in lies:
        path.write_text(lie)
        with pytest.raises(QatError, match="expected"):
            opened("csv", resume=True)
        assert contents(tmp_path / "out") == {**before, ".state.json": lie.encode()}


def test_a_full_disk_is_a_sentence_and_goes_on(opened, tmp_path, monkeypatch):
    fill(opened("csv", "whole"))
    output = opened("csv")
    output.add(*BATCHES[0])

    def refuse():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output._writer, "flush", refuse)
    with pytest.raises(DataError, match=r"No space left .*--resume"), output:
        output.add(*BATCHES[1])
    fill(opened("csv", resume=True))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
