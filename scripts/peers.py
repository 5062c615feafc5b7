"""Train the same checkpoint with other tools, on the same data, for accuracies to compare with.

METHOD is ``lsq``, a plain loop around the paper's formulas (Esser et al., arXiv:1902.08153), or
``pt2e``, torchao's quantization-aware training of exported programs. Data, augmentation, batches,
optimizer and cosine are those of recipe=cifar_resnet20; first and last layer, and what they read,
have 8 bits. The last step counts, on all test images.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.files import write_text
from qat.terminal import terminal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qat.data import ArraysData

EPILOG = """
examples:
  python scripts/peers.py lsq --data cifar10.npz --ckpt resnet20.th --bits 4 4 --epochs 3
  python scripts/peers.py pt2e --data cifar10.npz --ckpt resnet20.th --bits 4 8 --json row.json
"""


class Peer(NamedTuple):
    """What a tool made of the float model, and how it enters evaluation."""

    model: nn.Module
    evaluation: Callable[[Any], Any]


def plain_lsq(model: nn.Module, weight_bits: int, activation_bits: int, data: ArraysData) -> Peer:
    """Put LSQ in front of every layer's weight and input, one scale for each tensor."""
    import torch
    from lsq_layers import quantize_layers

    quantize_layers(model, weight_bits, activation_bits)
    with torch.no_grad():
        model.eval()(data.calibration_batches(1)[0])
    return Peer(model, lambda trained: trained.eval())


def pt2e(model: nn.Module, weight_bits: int, activation_bits: int, data: ArraysData) -> Peer:
    """Prepare with torchao's PT2E and its XNNPACK annotations, weights per channel."""
    from torchao.quantization.pt2e import move_exported_model_to_eval

    example, bits = data.calibration_batches(1)[0], (weight_bits, activation_bits)
    return Peer(
        prepare_pt2e(model, example, bits, ("conv1", "linear")), move_exported_model_to_eval
    )


def prepare_pt2e(
    model: nn.Module, example: Tensor, bits: tuple[int, int], ends: Sequence[str]
) -> nn.Module:
    """Return ``model`` exported and prepared by PT2E.

    Args:
        model: The float model.
        example: A batch.
        bits: Of weights and activations.
        ends: Names of modules that have 8 bits.
    """
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.testing.pt2e._xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    def config(weight: int, activation: int) -> Any:
        return get_symmetric_quantization_config(
            is_per_channel=True,
            is_qat=True,
            act_qmin=-(2 ** (activation - 1)),
            act_qmax=2 ** (activation - 1) - 1,
            weight_qmin=-(2 ** (weight - 1)) + 1,
            weight_qmax=2 ** (weight - 1) - 1,
        )

    quantizer = XNNPACKQuantizer().set_global(config(*bits))
    for name in ends:
        quantizer.set_module_name(name, config(8, 8))
    batch = ({0: torch.export.Dim("batch", min=2)},)
    exported = torch.export.export(model.train(), (example,), dynamic_shapes=batch)
    return prepare_qat_pt2e(exported.module(), quantizer)


METHODS: dict[str, Callable[..., Peer]] = {"lsq": plain_lsq, "pt2e": pt2e}


def train(peer: Peer, data: ArraysData, epochs: int, rate: float) -> None:
    """Train for ``epochs`` with SGD and one cosine; print the loss of each epoch."""
    import torch
    from torch.nn import functional as F

    optimizer = torch.optim.SGD(
        peer.model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    loader = data.train_dataloader()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for epoch in range(epochs):
        losses: list[Tensor] = []
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(peer.model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        print(f"epoch {epoch + 1}/{epochs}  loss {torch.stack(losses).mean():.3f}", flush=True)


def accuracy(model: Callable[[Tensor], Tensor], data: ArraysData) -> float:
    """Return the share of correct predictions on all test images, per cent."""
    import torch

    with torch.no_grad():
        found = [(model(x).argmax(1) == y) for x, y in data.test_dataloader()]
    return 100 * float(torch.cat(found).float().mean())


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train as ``args`` say and return the row."""
    import torch

    from qat.data import ArraysData
    from qat.models import build, load_checkpoint

    torch.manual_seed(args.seed)
    data = ArraysData(args.data, batch_size=args.batch_size, val_fraction=0.0, seed=args.seed)
    data.setup()
    model = build("resnet20", data.num_classes)
    load_checkpoint(model, args.ckpt)
    before, began = accuracy(model.eval(), data), time.monotonic()
    peer = METHODS[args.method](model, *args.bits, data)
    train(peer, data, args.epochs, args.lr)
    peer.evaluation(peer.model)
    after = accuracy(peer.model, data)
    w, a = args.bits
    return {
        "method": args.method,
        "bits": f"w{w}a{a}",
        "epochs": args.epochs,
        "seed": args.seed,
        "lr": args.lr,
        "float": before,
        "fake_quant": after,
        "seconds": time.monotonic() - began,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the checked arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--data", required=True, type=Path, help=".npz of data=arrays")
    parser.add_argument("--ckpt", required=True, type=Path, help="float checkpoint of a ResNet-20")
    parser.add_argument("--bits", nargs=2, type=int, default=(4, 4), metavar=("W", "A"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the row here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = parse(argv)
    from qat.errors import QatError

    try:
        row = compare(args)
    except QatError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"peers: {error}: pip install torchao, or choose lsq.", file=sys.stderr)
        return 1
    print(json.dumps(row))
    if args.json is not None:
        write_text(args.json, json.dumps(row))
    return 0


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
