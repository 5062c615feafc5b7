"""Models of Hugging Face transformers, small and with random weights, unchanged, the whole way."""

from functools import cache

import pytest
import torch
import transformers
from torch import nn

from qat.export.onnx import export_onnx
from qat.export.runtime import OnnxModel
from qat.graph.convert import convert
from qat.graph.insert import prepare
from qat.layers import fold
from qat.reference.run import IntegerRun
from qat.training.evaluate import first_output
from tests.helpers import calibrate, make_scheme, slow_but
from tests.products import count_file

WORDS, LENGTH = 100, 12
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SMALL, "intermediate_size": 64}
LABELS = {"num_labels": 5}
ENCODER = {"vocab_size": WORDS, "max_position_embeddings": 32}


def bert() -> nn.Module:
    config = transformers.BertConfig(**WIDE, **ENCODER, **LABELS)
    return transformers.BertForSequenceClassification(config)


def distilbert() -> nn.Module:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    config = transformers.DistilBertConfig(**sizes, **ENCODER, **LABELS)
    return transformers.DistilBertForSequenceClassification(config)


def gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=WORDS, **sizes, **ends, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**WIDE, **ENCODER, num_key_value_heads=2, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(**WIDE, image_size=32, patch_size=8, **LABELS)
    return transformers.ViTForImageClassification(config)


MODELS = {"bert": bert, "distilbert": distilbert, "gpt2": gpt2, "llama": llama, "vit": vit}


@cache
def prepared(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    x = torch.randn(8, 3, 32, 32) if name == "vit" else torch.randint(0, WORDS, (8, LENGTH))
    return model, *prepare(model, make_scheme(8, 8), x), x


@pytest.mark.parametrize("name", MODELS)
def test_every_product_is_quantized(name):
    model, captured, plan, _ = prepared(name)
    assert captured.leaves == []
    assert plan.float_share == 0
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert {n for n, w in plan.weights.items() if w.op == "linear"} >= set(layers)


@pytest.mark.parametrize("name", slow_but(MODELS, "bert"))
def test_the_file_predicts_what_the_fold_stage_predicts(name, tmp_path):
    _, captured, plan, x = prepared(name)
    calibrate(captured, x)
    fold(captured.eval())
    expected = first_output(captured(x))
    converted = convert(captured)
    logits = first_output(IntegerRun(converted)(x))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    export_onnx(converted, x[:1], tmp_path / "model.onnx")
    assert count_file(tmp_path / "model.onnx", {"input": x.numpy()}) == (plan.macs * len(x), 0)
    found = OnnxModel(tmp_path / "model.onnx")(x).reshape(logits.shape)
    assert torch.equal(found.argmax(-1), logits.argmax(-1))
