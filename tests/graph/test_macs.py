"""Multiply-accumulates are those of the formulas that textbooks give, however torch runs them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat.graph.macs import FORMULAS, MacCounter

N, L, WIDTH, OUT = 3, 5, 4, 6


def counted(function, *args):
    with torch.no_grad(), MacCounter() as counter:
        function(*args)
    return counter.macs


def tokens(*shape):
    return torch.randn(*(shape or (N, L, WIDTH)))


@pytest.mark.parametrize(
    ("function", "args", "macs"),
    [
        (nn.Linear(WIDTH, OUT), [tokens()], N * L * WIDTH * OUT),
        (nn.Conv2d(4, 6, 3, groups=2), [tokens(N, 4, 5, 5)], N * 9 * 6 * 2 * 9),
        (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), [tokens(N, 4, 5, 5)], N * 25 * 4 * 3 * 9),
        (nn.LSTM(WIDTH, OUT), [tokens()], N * L * 4 * OUT * (WIDTH + OUT)),
        (nn.LSTM(WIDTH, OUT, 2, bidirectional=True), [tokens()],
         N * L * 2 * 4 * OUT * (WIDTH + OUT + 2 * OUT + OUT)),
        (nn.GRU(WIDTH, OUT), [tokens()], N * L * 3 * OUT * (WIDTH + OUT)),
        (nn.RNN(WIDTH, OUT), [tokens()], N * L * OUT * (WIDTH + OUT)),
        (nn.LSTMCell(WIDTH, OUT), [tokens(N, WIDTH)], N * 4 * OUT * (WIDTH + OUT)),
        (nn.GRUCell(WIDTH, OUT), [tokens(N, WIDTH)], N * 3 * OUT * (WIDTH + OUT)),
        (nn.Bilinear(WIDTH, WIDTH, OUT), [tokens(), tokens()], N * L * WIDTH * WIDTH * OUT),
        (nn.Embedding(7, WIDTH), [torch.zeros(N, L, dtype=torch.long)], 0),
        (F.scaled_dot_product_attention, [tokens(N, 2, L, WIDTH)] * 3, 2 * N * 2 * L * L * WIDTH),
        (torch.einsum, ["nid,njd->nij", tokens(), tokens()], N * L * L * WIDTH),
        (torch.baddbmm, [tokens(N, L, L), tokens(), tokens().mT], N * L * L * WIDTH),
        (torch.addbmm, [tokens(L, L), tokens(), tokens().mT], N * L * L * WIDTH),
        (torch.addmm, [tokens(L), tokens(N, WIDTH), tokens(WIDTH, L)], N * L * WIDTH),
        (torch.addmv, [tokens(N), tokens(N, WIDTH), tokens(WIDTH)], N * WIDTH),
        (torch.mv, [tokens(N, WIDTH), tokens(WIDTH)], N * WIDTH),
        (torch.dot, [tokens(WIDTH), tokens(WIDTH)], WIDTH),
        (torch.tensordot, [tokens(), tokens(), ([2], [2])], (N * L) ** 2 * WIDTH),
        (torch.cdist, [tokens(), tokens()], N * L * L * WIDTH),
        (torch.add, [tokens(), tokens()], 0),
    ],
)  # fmt: skip
def test_macs_are_those_of_the_formula(function, args, macs):
    assert counted(function, *args) == macs
    with torch.inference_mode():  # where operators arrive whole
        assert counted(function, *args) == macs


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.MultiheadAttention(WIDTH, 2, batch_first=True), 3),
        (nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True), 1),
    ],
)
def test_what_torch_fuses_in_evaluation_counts_as_its_parts_do(module, inputs):
    x = tokens()
    fused = counted(module.eval(), *[x] * inputs)
    layers = N * L * (4 * WIDTH * WIDTH + (2 * WIDTH * 8 if inputs == 1 else 0))
    assert fused == counted(module.train(), *[x] * inputs) == layers + 2 * N * L * L * WIDTH


def test_recurrent_layers_on_a_gpu_count_all_their_matrices():
    lstm = nn.LSTM(WIDTH, OUT, 2, proj_size=2)
    x, weights = tokens(L, N, WIDTH), list(lstm.parameters())
    matrices = sum(w.numel() for w in weights if w.ndim == 2)
    assert FORMULAS["aten::_cudnn_rnn"](x, weights, 5, None) == N * L * matrices
