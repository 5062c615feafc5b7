"""Which files are measured: those that were named, and what they are compared with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from references import build_float, export_float, pack_float, quantize_statically, read_model
from subject import Subject, read_subject


@dataclass
class Collection:
    """Collects the files of one measurement.

    Attributes:
        folder: Where files go that are made on the way.
        given: A float file for all artifacts, instead of those of their runs.
        subjects: What was collected, by name; a reference stands before what is compared with it.
    """

    folder: Path
    given: Path | None = None
    subjects: dict[str, Subject] = field(default_factory=dict)
    _floats: dict[str, str] = field(default_factory=dict)

    def add(self, artifact: Path) -> None:
        """Add an artifact behind its float file or, without one, behind the first artifact.

        Args:
            artifact: An ``.onnx`` file, or the folder of a run.

        Raises:
            QatError: If it is none, or its float model cannot be built.
        """
        from qat.artifact import ONNX

        path = artifact / ONNX if artifact.is_dir() else artifact
        own = read_subject(str(artifact), "artifact", path)
        first = next((s.name for s in self.subjects.values() if s.kind == "artifact"), None)
        self._put(read_subject(own.name, own.kind, path, self._float(own) or first))

    def add_static(self) -> None:
        """Add what onnxruntime's static quantization makes of every float file.

        Raises:
            ConfigError: If there is no float file.
            ExportError: If onnxruntime cannot quantize it.
        """
        from qat.errors import ConfigError

        floats = [s for s in self.subjects.values() if s.kind == "float"]
        if not floats:
            raise ConfigError(
                "expected a float file for --static, got none: name one with --float FILE.onnx, "
                "or give the folder of a run."
            )
        for i, source in enumerate(floats):
            path = self.folder / f"static{i}.onnx"
            quantize_statically(source, path)
            name = f"{source.name.removesuffix(' (float)')} (static)"
            self._put(read_subject(name, "static", path, source.name))

    def _float(self, own: Subject) -> str | None:
        """Return the name of an artifact's float file, which is made where it is not there yet."""
        if self.given is not None:
            name = f"{self.given} (float)"
            if name not in self.subjects:
                self._put(read_subject(name, "float", self.given))
            return name
        found = read_model(own.path)
        if found is None:
            return None
        key = json.dumps([found, own.shape])  # runs of one architecture share its float file
        if key not in self._floats:
            path = self.folder / f"float{len(self._floats)}.onnx"
            model = build_float(*found, own)
            export_float(model, own, path)
            pack_float(model, own, path.with_suffix(".safetensors"))
            self._floats[key] = f"{own.name} (float)"
            self._put(read_subject(self._floats[key], "float", path))
        return self._floats[key]

    def _put(self, subject: Subject) -> None:
        self.subjects[subject.name] = subject


def collect(
    artifacts: Sequence[Path], folder: Path, given: Path | None, *, static: bool
) -> list[Subject]:
    """Return all files of a measurement, every reference before what is compared with it.

    Args:
        artifacts: ``.onnx`` files, or folders of runs.
        folder: Where float and static files go.
        given: A float file for all artifacts, instead of those of their runs.
        static: Whether the float files are quantized statically, too.

    Raises:
        QatError: If a file is no model, or cannot be made.
    """
    collection = Collection(folder, given)
    for artifact in artifacts:
        collection.add(artifact)
    if static:
        collection.add_static()
    return list(collection.subjects.values())
