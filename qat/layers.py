"""Weight quantization of any layer, in place, and the batch-norm behind it.

A layer gets a dynamic subclass of *its own* class whose ``weight`` and ``bias`` are computed:
parameter names, optimizers, pickling and the forward of unusual subclasses stay as they were, and
one call undoes it. Before the fold stage a layer shows its fake-quantized weight and the batch-norm
runs behind it in float; in the fold stage the batch-norm is part of the weight's scale and of the
bias, the bias lies on its int32 grid, and the batch-norm lets everything pass. Both are the same
module in another state, so optimizers and checkpoints never notice.

Source of the fold: Jacob et al., arXiv:1712.05877, section 3.2; of training with the batch-norm
behind the layer and folding later: Krishnamoorthi, arXiv:1806.08342, section 3.2.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.batch_norm import (
    Stage,
    StagedBatchNorm,
    batch_norms,
    channel_gain,
    channel_shift,
    restore_batch_norm,
)
from qat.channels import channel_view
from qat.fake_quant import FakeQuant
from qat.functional.affine import (
    MAX_BIAS_CODE,
    MIN_SCALE,
    dequantize,
    expand,
    fake_quantize_bias,
    quantize_bias,
)
from qat.functional.ste import power_of_two, replace_value
from qat.held import Holder, held_once
from qat.spec import BatchNormMode, QuantSpec
from qat.subclass import generalise, reduce_subclass, specialise


@dataclass
class Links:
    """The neighbours a quantized layer needs, kept out of the module tree so that no key doubles.

    Attributes:
        batch_norm: The batch-norm behind the layer, if it can be folded.
        batch_norm_mode: ``"late"``: the weight's grid lies on the raw weight until the fold;
            ``"folded"``: on the folded weight, from the start.
        input_quant: The fake-quant of the layer's input: its scale is part of the bias's grid.
        inner: The layer quantizes its input by itself, as no graph does it.
    """

    batch_norm: Any = None
    batch_norm_mode: BatchNormMode = "late"
    input_quant: FakeQuant | None = None
    inner: bool = False


class IntegerParameters(NamedTuple):
    """What a chip gets of one layer: real weight = ``weight_scale * (weight - zero_point)``.

    Codes are already multiplied by the format's ``storage_gain``, scales divided by it.

    Attributes:
        weight: Codes, int32, shape of the float weight.
        weight_scale: In real units; a shape that ``expand`` takes.
        zero_point: Code of the real value 0.
        bias: Codes at ``bias_scale``, int32 ``(O,)``; real values where the layer's input is not
            quantized or one accumulator has several scales; ``None`` where there is no bias.
        bias_scale: Input scale times weight scale ``(O,)``, or ``None`` where ``bias`` is real.
    """

    weight: Tensor
    weight_scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    bias_scale: Tensor | None


class QuantizedLayer(Holder):
    """Mixin of the dynamic layer subclass: ``weight`` and ``bias`` as the forward should see them.

    The raw parameters, which optimizers train, are ``_parameters["weight"]`` and ``["bias"]``.
    """

    weight_quant: FakeQuant
    weight_mask: Tensor
    links: Links
    folded: bool

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer makes of ``input`` with the weight and bias in use."""
        if self.links.inner and self.links.input_quant is not None:
            input = self.links.input_quant(input)
        return super().forward(input, *args, **kwargs)

    @property
    @held_once
    def weight(self) -> Tensor:
        """The weight in use, real values, shape of the raw weight."""
        if not self.folded:
            return self._training_weight()
        return self._folded_weight()

    @property
    @held_once
    def bias(self) -> Tensor | None:
        """The bias in use, real values, shape ``(O,)``; on its int32 grid in the fold stage."""
        if not self.folded:
            return self._parameters.get("bias")
        bias, grid = self._folded_bias(), self._bias_scale()
        if bias is None or grid is None or not self._quantizes:
            return bias
        return fake_quantize_bias(bias, grid)

    @property
    def raw_weight(self) -> Tensor:
        """The trained weight behind its pruning mask, real values."""
        weight = self._parameters["weight"]
        assert weight is not None
        mask = self._buffers.get("weight_mask")
        return weight if mask is None else weight * mask

    @property
    def grid_gain(self) -> Tensor:
        """What the raw weight is multiplied by in front of its grid; never 0; broadcasts."""
        gain = self._channel_gain()
        if self.links.batch_norm_mode == "late":
            return torch.ones_like(gain)
        return torch.where(gain.abs() < MIN_SCALE, torch.full_like(gain, MIN_SCALE), gain)

    @property
    def spec(self) -> QuantSpec:
        """The number format of the weight's codes."""
        return self.weight_quant.spec

    def neighbours(self) -> list[nn.Module]:
        """Return the batch-norm behind the layer and the fake-quant in front of it, if any."""
        return [m for m in (self.links.batch_norm, self.links.input_quant) if m is not None]

    @property
    def _quantizes(self) -> bool:
        source = self.links.input_quant
        return self.weight_quant.active and source is not None and source.is_static

    def _training_weight(self) -> Tensor:
        weight, norm = self.raw_weight, self.links.batch_norm
        if norm is None or self.links.batch_norm_mode == "late":
            return self.weight_quant(weight)
        gain = self.grid_gain
        snapped = self.weight_quant(weight * gain)
        return snapped / gain if self.weight_quant.active else weight

    def _folded_weight(self) -> Tensor:
        weight, gain = self.raw_weight, self._channel_gain()
        late = self.links.batch_norm_mode == "late"
        snapped = self.weight_quant(weight if late else weight * gain)
        surrogate = snapped * gain if late else snapped
        if not self.weight_quant.active:
            return surrogate
        return replace_value(dequantize(*self._integer_weight()), surrogate)

    def _channel_gain(self) -> Tensor:
        """What the batch-norm multiplies the weight by; broadcasts against the weight."""
        weight, norm = self.raw_weight, self.links.batch_norm
        if norm is None:
            return torch.ones((), device=weight.device)
        return expand(channel_view(self, channel_gain(norm)), weight.shape)

    def _folded_bias(self) -> Tensor | None:
        bias, norm = self._parameters.get("bias"), self.links.batch_norm
        return bias if norm is None else channel_shift(norm, bias)

    def _folded_scales(self) -> tuple[Tensor, Tensor]:
        """Return the scale behind the batch-norm, and the same held where the bias still fits."""
        quantizer, norm = self.weight_quant.quantizer, self.links.batch_norm
        scale = quantizer.scale
        if norm is not None and self.links.batch_norm_mode == "late":
            scale = scale * channel_view(self, channel_gain(norm)).abs()
        floor = torch.full((), MIN_SCALE**2, device=scale.device)
        bias, source = self._folded_bias(), self.links.input_quant
        if bias is not None and source is not None and source.is_static:
            reach = source.quantizer.scale.double() * (MAX_BIAS_CODE / self.spec.storage_gain)
            needed = (bias.double().abs() / reach).float()
            floor = torch.maximum(floor, channel_view(self, needed) if scale.ndim else needed.max())
        held = torch.maximum(scale, floor)
        return scale, power_of_two(held, up=True) if quantizer.spec.power_of_two else held

    @torch.no_grad()
    def _integer_weight(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return stored codes, their scale and their zero point."""
        quantizer, weight = self.weight_quant.quantizer, self.raw_weight
        if self.links.batch_norm_mode == "late":
            steps = quantizer.codes(weight) * self._channel_gain().sign()
        else:
            steps = quantizer.codes(weight * self._channel_gain())
        offset = expand(quantizer.zero_point, weight.shape)
        scale, held = self._folded_scales()
        shrink = expand(scale, weight.shape) / expand(held, weight.shape)  # 1 but for dead channels
        codes = ((steps - offset) * shrink).round() + offset
        gain = self.spec.storage_gain
        return codes * gain, held / gain, quantizer.zero_point

    @torch.no_grad()
    def _bias_scale(self) -> Tensor | None:
        """Return the accumulator's scale ``(O,)``, or ``None`` where there is no integer one."""
        source, spec = self.links.input_quant, self.spec
        if source is None or not source.is_static or spec.group_size is not None:
            return None
        bias, held = self._folded_bias(), self._folded_scales()[1] / spec.storage_gain
        if bias is None:
            return None
        return source.quantizer.scale * held.expand(channel_view(self, bias).shape).flatten()

    @torch.no_grad()
    @held_once
    def integers(self) -> IntegerParameters:
        """Return the layer as integers; the fold stage computes with exactly these."""
        assert self.folded, "convert needs the fold stage"
        codes, scale, zero_point = self._integer_weight()
        bias, grid = self._folded_bias(), self._bias_scale()
        if bias is not None and grid is not None and self._quantizes:
            bias = quantize_bias(bias, grid)
        else:
            grid = None
        return IntegerParameters(codes.to(torch.int32), scale, zero_point, bias, grid)

    def get_extra_state(self) -> Tensor:
        """Return whether the layer is folded, as a tensor."""
        return torch.tensor([int(self.folded)], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what ``get_extra_state`` gave."""
        self.folded = bool(state.item())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduce_subclass(self, QuantizedLayer)


def quantize_layer(layer: nn.Module, weight_quant: FakeQuant, links: Links) -> None:
    """Make ``layer`` show its weight through ``weight_quant``, in place.

    Args:
        layer: A layer with a ``weight`` and, maybe, a ``bias``.
        weight_quant: Made for the shape of that weight.
        links: The layer's neighbours.
    """
    layer.weight_quant = weight_quant
    specialise(layer, QuantizedLayer, links=links, folded=False)


def restore_layer(layer: QuantizedLayer) -> None:
    """Undo ``quantize_layer``, in place."""
    del layer.weight_quant
    layer._buffers.pop("weight_mask", None)
    generalise(layer, "links", "folded")


def restore(model: nn.Module) -> None:
    """Undo ``quantize_layer`` and ``stage_batch_norm`` everywhere in ``model``, in place."""
    for module in list(model.modules()):
        if isinstance(module, QuantizedLayer):
            restore_layer(module)
        elif isinstance(module, StagedBatchNorm):
            restore_batch_norm(module)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Yield ``(name, layer)`` of every layer whose weight is quantized."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLayer))


def fold(model: nn.Module) -> None:
    """Enter the fold stage: batch-norms into the layers in front, biases onto their grids."""
    for norm in batch_norms(model):
        norm.stage = Stage.AFFINE
    for _, layer in quantized_layers(model):
        layer.folded = True
        if layer.links.batch_norm is not None:
            layer.links.batch_norm.stage = Stage.FOLDED
