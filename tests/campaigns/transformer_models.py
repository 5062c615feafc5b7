"""Models of Hugging Face transformers of many kinds, small and with random weights.

Each is wrapped so that it takes one tensor and gives one: masks, decoder inputs and points are
made of it.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

hf: Any = transformers  # what its configurations take is not all declared
WORDS, LENGTH = 100, 12
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SMALL, "intermediate_size": 64}
TEXT = {**WIDE, "vocab_size": WORDS, "max_position_embeddings": 64}
CAUSAL = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False, "pad_token_id": 0}
IMAGE = {**WIDE, "image_size": 32, "patch_size": 8, "num_labels": 5}


class Wrapped(nn.Module):
    """One tensor in, one out."""

    def __init__(self, model: nn.Module, call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.call = model.eval(), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.model, x)


def logits(model: Any, x: Tensor) -> Tensor:
    return model(x).logits


def states(model: Any, x: Tensor) -> Tensor:
    return model(x).last_hidden_state


def masked(model: Any, x: Tensor) -> Tensor:
    return model(x, attention_mask=(x > 5).long()).logits


def with_decoder(model: Any, x: Tensor) -> Tensor:
    return model(input_ids=x, decoder_input_ids=x).logits


def causal(kind: str, **options: Any) -> nn.Module:
    config = getattr(hf, f"{kind}Config")(**{**CAUSAL, **options})
    return Wrapped(getattr(hf, f"{kind}ForCausalLM")(config), logits)


def encoder(kind: str, call: Any = logits, **options: Any) -> nn.Module:
    config = getattr(hf, f"{kind}Config")(**{**TEXT, "num_labels": 5, "pad_token_id": 0, **options})
    return Wrapped(getattr(hf, f"{kind}ForSequenceClassification")(config), call)


def classifier(kind: str, **options: Any) -> nn.Module:
    config = getattr(hf, f"{kind}Config")(**options)
    return Wrapped(getattr(hf, f"{kind}ForImageClassification")(config), logits)


def gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    config = hf.GPT2Config(
        vocab_size=WORDS, **sizes, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return Wrapped(hf.GPT2LMHeadModel(config), logits)


def mamba() -> nn.Module:
    config = hf.MambaConfig(vocab_size=WORDS, hidden_size=32, state_size=8, num_hidden_layers=2,
                            use_cache=False, time_step_rank=4)  # fmt: skip
    return Wrapped(hf.MambaForCausalLM(config), logits)


def t5() -> nn.Module:
    config = hf.T5Config(vocab_size=WORDS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                         use_cache=False, decoder_start_token_id=0)  # fmt: skip
    return Wrapped(hf.T5ForConditionalGeneration(config), with_decoder)


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=WORDS, num_mel_bins=8, encoder_layers=2, decoder_layers=2, d_model=32,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_source_positions=16, max_target_positions=16, use_cache=False,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    words = torch.arange(1, 7)[None]

    def call(model: Any, x: Tensor) -> Tensor:
        return model(input_features=x, decoder_input_ids=words.expand(len(x), -1)).logits

    return Wrapped(hf.WhisperForConditionalGeneration(config), call)


def clip() -> nn.Module:
    text = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = hf.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16)
    words = torch.arange(3, 15)[None]

    def call(model: Any, x: Tensor) -> Tensor:
        return model(input_ids=words.expand(len(x), -1), pixel_values=x).logits_per_image

    return Wrapped(hf.CLIPModel(config), call)


def detr() -> nn.Module:
    backbone = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                               out_features=["stage2"])  # fmt: skip
    config = hf.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False,
        d_model=32, num_queries=6, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4, num_labels=5,
        backbone=None,
    )  # fmt: skip
    return Wrapped(hf.DetrForObjectDetection(config), logits)


def segformer() -> nn.Module:
    config = hf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16, num_labels=5,
    )  # fmt: skip
    return Wrapped(hf.SegformerForSemanticSegmentation(config), logits)


def sam() -> nn.Module:
    vision = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2,
              "num_attention_heads": 4, "image_size": 64, "patch_size": 16, "window_size": 2,
              "global_attn_indexes": [1], "num_pos_feats": 16, "mlp_dim": 64}  # fmt: skip
    prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 8}
    mask = {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "iou_head_hidden_dim": 32}  # fmt: skip
    config = hf.SamConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask
    )
    points = torch.tensor([[[[20.0, 30.0]]]])

    def call(model: Any, x: Tensor) -> Tensor:
        found = model(pixel_values=x, input_points=points.expand(len(x), -1, -1, -1))
        return found.pred_masks.flatten(1)

    return Wrapped(hf.SamModel(config), call)


def depth_anything() -> nn.Module:
    backbone = hf.Dinov2Config(**{**SMALL, "image_size": 32, "patch_size": 8},
                               out_indices=[1, 2], reshape_hidden_states=False)  # fmt: skip
    config = hf.DepthAnythingConfig(
        backbone_config=backbone, patch_size=8, reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 16], fusion_hidden_size=8, head_hidden_size=8,
        reassemble_factors=[2, 1],
    )  # fmt: skip
    return Wrapped(hf.DepthAnythingForDepthEstimation(config),
                   lambda model, x: model(x).predicted_depth)  # fmt: skip


MIXTURE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
IDS = {
    "gemma": lambda: causal("Gemma"),
    "qwen3": lambda: causal("Qwen3"),
    "qwen3_moe": lambda: causal("Qwen3Moe", **MIXTURE),
    "phi3": lambda: causal("Phi3"),
    "llama": lambda: causal("Llama"),
    "mistral": lambda: causal("Mistral"),
    "gpt2": gpt2,
    "mamba": mamba,
    "bert_with_mask": lambda: encoder("Bert", masked),
    "roberta": lambda: encoder("Roberta", masked),
    "modernbert": lambda: encoder("ModernBert", num_hidden_layers=2),
    "albert": lambda: encoder("Albert", embedding_size=16),
    "t5": t5,
}
IMAGES = {
    "clip": clip,
    "vit": lambda: classifier("ViT", **IMAGE),
    "dinov2": lambda: classifier("Dinov2", **IMAGE),
    "swin": lambda: classifier("Swin", image_size=32, patch_size=4, embed_dim=16, depths=[1, 1],
                               num_heads=[2, 4], window_size=4, num_labels=5),
    "convnext": lambda: classifier("ConvNext", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2,
                                   num_labels=5),
    "resnet": lambda: classifier("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                 num_labels=5),
    "detr": detr,
    "segformer": segformer,
    "depth_anything": depth_anything,
}  # fmt: skip
OTHERS = {"sam": (sam, (3, 64, 64)), "whisper": (whisper, (8, 32))}
NAMES = [*IDS, *IMAGES, *OTHERS]


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model and a batch of four for it."""
    if name in IDS:
        return IDS[name](), torch.randint(1, WORDS, (4, LENGTH))
    make, shape = OTHERS[name] if name in OTHERS else (IMAGES[name], (3, 32, 32))
    return make(), torch.randn(4, *shape)
