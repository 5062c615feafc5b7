"""Imports go down the layers only, configs stay at the top, and everything public is documented."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qat"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [
    {"errors", "files", "terminal", "compile_cache"},
    {"signals"},
    {"kinds", "folders", "held", "memory", "trees"},
    {"calls", "outputs"},
    {"signature"},
    {"extensions"},
    {"stored_config"},
    {"spec"},
    {"functional"},
    {"observers", "quantizers"},
    {"fake_quant"},
    {"subclass", "channels"},
    {"batch_norm"},
    {"layers"},
    {"codecs"},
    {"integer_layers"},
    {"graph", "models", "data", "pruning", "export", "analysis"},
    {"reference", "initialise"},
    {"runtimes"},
    {"training", "predict"},
    {"forms"},
    {"gate", "trial"},
    {"artifact"},
    {"settings"},
    {"explain"},
    {"run_folder"},
    {"resume"},
    {"assemble", "compose"},
    {"trainer"},
    {"run"},
    {"cli", "restore"},
]
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}
CONFIG_ROOMS = {"assemble", "explain", "compose", "run", "cli"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    if path == PACKAGE / "__init__.py":
        return
    own = room(path)
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "qat" and len(parts) > 1 and parts[1] != own:
            assert RANK[parts[1]] < RANK[own], f"{own} must not import {module}"
        if parts[0] in ("hydra", "omegaconf"):
            assert own in CONFIG_ROOMS, f"{own} must not know about configs"
        assert not module.startswith("torch.ao")


def public(tree: ast.AST) -> list[ast.ClassDef | ast.FunctionDef]:
    found: list[ast.ClassDef | ast.FunctionDef] = []
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            found.append(node)
            found += public(node) if isinstance(node, ast.ClassDef) else []
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_everything_public_has_a_docstring_that_names_its_errors(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in public(tree):
        text = ast.get_docstring(node)
        assert text, f"{node.name} has no docstring"
        for raised in ast.walk(node) if isinstance(node, ast.FunctionDef) else []:
            if isinstance(raised, ast.Raise) and isinstance(raised.exc, ast.Call):
                name = getattr(raised.exc.func, "id", "")
                if name.endswith("Error") and not name.startswith("_"):
                    assert name in text, f"{node.name} does not say that it raises {name}"


@pytest.mark.parametrize(
    "name",
    [
        "functional/ste",
        "functional/fake_quantize",
        "quantizers/fp4",
        "quantizers/fp8",
        "quantizers/learned_bits",
        "quantizers/lsq",
        "quantizers/lsq_plus",
        "quantizers/mx",
        "quantizers/nvfp4",
        "functional/float_formats",
        "functional/block_formats",
        "observers/mean_magnitude",
        "observers/mse",
        "observers/sawb",
        "quantizers/pact",
        "quantizers/ewgs",
        "quantizers/dorefa",
        "quantizers/tqt",
        "quantizers/dsq",
        "functional/staircase",
        "functional/stochastic",
        "functional/estimators",
        "layers",
        "pruning/magnitude",
        "functional/rounding",
        "initialise/equalise",
        "initialise/adaround",
        "initialise/bias_correction",
        "training/oscillations",
        "training/sam",
    ],
)
def test_published_method_names_its_source(name):
    assert "arXiv:" in (PACKAGE / f"{name}.py").read_text()
