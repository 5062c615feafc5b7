import os

import pytest


@pytest.fixture
def machine(load_script):
    return load_script("benchmark/machine")


@pytest.mark.parametrize(
    ("flags", "vnni"),
    [("fpu avx2", False), ("avx2 avx512_vnni", True), ("avx_vnni avx2", True)],
)
def test_processor_of_linux(machine, flags, vnni):
    text = f"processor\t: 0\nmodel name\t: Some CPU: fast\nflags\t\t: {flags}\n\n"
    found = machine.read_cpuinfo(text + text.replace("Some", "Other"))
    assert found["processor"] == "Some CPU: fast"
    assert found["vnni"] is vnni
    assert set(found["flags"]) == set(flags.split()) - {"fpu"}


def test_nothing_is_claimed_where_nothing_is_known(machine):
    found = machine.read_cpuinfo("")
    assert found["processor"]
    assert (found["flags"], found["vnni"]) == ([], None)


def test_description(machine):
    found = machine.describe(3, ["onnxruntime"])
    assert found["threads"] == 3
    assert 1 <= found["cores"] <= (os.cpu_count() or 1)
    assert list(found["versions"]) == ["qat", "torch", "onnx", "onnxruntime"]
