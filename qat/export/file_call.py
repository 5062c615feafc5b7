"""How an ``.onnx`` file is called: arguments to inputs, outputs to what the model returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qat.calls import Call
from qat.errors import ExportError
from qat.export.checksum import KEY
from qat.export.form import CALL, input_names, read_call
from qat.export.onnx_file import decode_metadata
from qat.outputs import LOGITS


class FileCall:
    """The calls that a file takes: like the model's, if it says how; else tensors in a row.

    Args:
        inputs: Names of the file's inputs.
        outputs: Names of its outputs.
        stored: Its metadata: names and JSON.

    Raises:
        ExportError: If what it says does not fit its inputs and outputs.
    """

    def __init__(
        self, inputs: Sequence[str], outputs: Sequence[str], stored: Mapping[str, str]
    ) -> None:
        self.inputs, self.outputs = [*inputs], [*outputs]
        self.signature, self.returns = None, None
        if KEY in stored and CALL in stored:
            form = read_call(decode_metadata({CALL: stored[CALL]})[CALL])
            self.signature, self.returns = form or (None, None)
        expected = self.returns.tensors if self.returns else self.outputs
        names = input_names(self.signature) if self.signature else self.inputs
        if sorted(names) != sorted(self.inputs) or len(expected) != len(self.outputs):
            raise ExportError(f"a call of {names} for the inputs {self.inputs}")

    def feeds(self, call: Call) -> dict[str, Tensor]:
        """Return the name of every input with its tensor.

        Raises:
            ExportError: If a file that does not say how it is called gets other inputs.
            GraphError: If the model took other arguments.
        """
        if self.signature is not None:
            tensors = self.signature.flatten(call.args, call.kwargs)
            return dict(zip(input_names(self.signature), tensors, strict=True))
        feeds = {**dict(zip(self.inputs, call.args, strict=False)), **call.kwargs}
        if feeds.keys() != set(self.inputs) or len(call.args) > len(self.inputs):
            raise ExportError(
                f"expected the inputs {', '.join(self.inputs)} of the file, got "
                f"{len(call.args)} by position and {', '.join(call.kwargs) or 'none'} by name: "
                "pass each once."
            )
        return feeds

    def build(self, tensors: Sequence[Tensor]) -> Any:
        """Return the tensor of a file with one output, else the tree that the model returns."""
        if len(tensors) == 1:
            return tensors[0]
        if self.returns is None:
            return dict(zip(self.outputs, tensors, strict=True))
        return self.returns.build_of_tensors(tensors)

    @property
    def prediction(self) -> int:
        """The place of the prediction among the outputs."""
        names = [x.name for x in self.returns.tensors] if self.returns else self.outputs
        chosen = (self.signature.prediction if self.signature else None) or LOGITS
        return names.index(chosen) if chosen in names else 0
