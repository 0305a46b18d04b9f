"""Tiny random models of transformers' architectures, and a batch for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ROWS = 3  # of a batch
WORDS = 10  # of a row

ENCODERS = (
    "bert roberta xlm-roberta camembert distilbert albert electra deberta deberta-v2 mpnet modernbert xlnet "
    "longformer big_bird mobilebert fnet esm squeezebert funnel convbert nystromformer roformer"
)
DECODERS = (
    "gpt2 gptj gpt_neo gpt_neox opt bloom falcon phi phi3 llama mistral qwen2 qwen3 gemma gemma2 gemma3_text "
    "olmo olmo2 cohere glm nemotron starcoder2 stablelm granite smollm3 mixtral qwen2_moe qwen3_moe olmoe "
    "gpt_oss deepseek_v3 mamba mamba2 jamba"
)
SEQUENCES = "t5 bart mbart pegasus marian m2m_100"
VISION = "vit deit dinov2 beit segformer convnext swin swinv2"
AUDIO = "wav2vec2 hubert wavlm"
PAIRS = "clip siglip"
OTHERS = {"whisper": "SpeechSeq2Seq", "llava": "ImageTextToText"}
KINDS = {
    **dict.fromkeys(ENCODERS.split(), "SequenceClassification"),
    **dict.fromkeys(DECODERS.split(), "CausalLM"),
    **dict.fromkeys(SEQUENCES.split(), "Seq2SeqLM"),
    **dict.fromkeys(VISION.split(), "ImageClassification"),
    **dict.fromkeys(AUDIO.split(), "AudioClassification"),
    **dict.fromkeys(PAIRS.split(), ""),
    **OTHERS,
}
GENERATES = ("CausalLM", "Seq2SeqLM", "SpeechSeq2Seq", "ImageTextToText")

# sizes by the names that configurations give them; a configuration takes those that it knows
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "true_hidden_size"), 32
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "hidden_dim"), 64
    ),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size",), 64),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), 2
    ),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "rotary_dim"), 8),
    **dict.fromkeys(("vocab_size",), 99),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions"), 64
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok",), 2),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("state_size",), 8),
    **dict.fromkeys(("initializer_range", "init_std", "initializer_factor"), 0.2),
    **dict.fromkeys(("pad_token_id",), 1),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 2),
    **dict.fromkeys(("eos_token_id",), None),
}
# what a kind of model needs besides
_AUDIO: dict[str, Any] = {
    **{
        "conv_dim": (32, 32),
        "conv_stride": (5, 2),
        "conv_kernel": (10, 3),
        "num_feat_extract_layers": 2,
    },
    **{
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "classifier_proj_size": 16,
    },
}
_WINDOWS: dict[str, Any] = {
    **{"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
}
SPECIAL: dict[str, dict[str, Any]] = {
    "mobilebert": {"intra_bottleneck_size": 32},
    "funnel": {"block_sizes": [1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "deepseek_v3": {
        **{
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 8,
            "n_group": 1,
        },
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "topk_group": 1, "first_k_dense_replace": 1},
        "num_key_value_heads": 4,
    },
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        **{"expert_layer_period": 2, "expert_layer_offset": 1},
    },
    "segformer": {
        **{
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
        },
        **{
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        "decoder_hidden_size": 16,
    },
    "convnext": {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "patch_size": 4},
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    **dict.fromkeys(AUDIO.split(), _AUDIO),
    "clip_text_model": {"eos_token_id": 2},
    "whisper": {
        **{"max_source_positions": 32, "num_mel_bins": 16, "begin_suppress_tokens": None},
    },
    "llava": {"image_token_id": 98, "vision_feature_layer": -1},
}


def configuration(name: str) -> Any:
    """The configuration of a tiny model, those of its parts included."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(name)
    small = {key: value for key, value in SMALL.items() if key in known.to_dict()}
    for part in ("text_config", "vision_config"):
        inner = getattr(known, part, None)
        if inner is not None:
            small[part] = configuration(inner.model_type).to_dict()
    return AutoConfig.for_model(name, **(small | SPECIAL.get(name, {})))


def build(name: str) -> nn.Module:
    """A tiny model of this kind in eval mode, its weights drawn from one seed."""
    import transformers

    kind = KINDS[name]
    config = configuration(name)
    if name == "deit":  # whose class its configuration has to name
        config.architectures = ["DeiTForImageClassification"]
    maker = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
    torch.manual_seed(0)
    model = maker.from_config(config, attn_implementation="eager").eval()
    if kind in GENERATES:
        model.generation_config.update(bos_token_id=2, decoder_start_token_id=2, pad_token_id=1)
        model.generation_config.update(eos_token_id=None, forced_eos_token_id=None)
    return model


def inputs_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """A batch of `ROWS` rows."""
    g = torch.Generator().manual_seed(1)
    config = model.config
    words = torch.randint(5, 90, (ROWS, WORDS), generator=g)
    kind = KINDS[name]
    if kind == "ImageClassification":
        return {"pixel_values": torch.randn(ROWS, 3, _image(config), _image(config), generator=g)}
    if kind == "AudioClassification":
        return {"input_values": torch.randn(ROWS, 1600, generator=g)}
    if kind == "SpeechSeq2Seq":
        frames = 2 * config.max_source_positions
        sound = torch.randn(ROWS, config.num_mel_bins, frames, generator=g)
        return {"input_features": sound, "decoder_input_ids": words[:, :4]}
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    if kind == "Seq2SeqLM":
        batch["decoder_input_ids"] = words[:, :6]
    if kind in ("", "ImageTextToText"):
        size = _image(config.vision_config)
        batch["pixel_values"] = torch.randn(ROWS, 3, size, size, generator=g)
    if kind == "ImageTextToText":
        patches = (size // config.vision_config.patch_size) ** 2
        image = torch.full((ROWS, patches), config.image_token_id)
        batch["input_ids"] = torch.cat([image, words], 1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


def _image(config: Any) -> int:
    size = getattr(config, "image_size", None) or 32
    return size if isinstance(size, int) else size[0]


def output_of(model: nn.Module, batch: dict[str, Tensor], **more: Any) -> Tensor:
    """The result [ROWS, ...] of a forward pass, whose row depends on that row of the batch alone."""
    out = model(**batch, **more)
    if getattr(out, "image_embeds", None) is not None:
        return torch.cat([out.image_embeds, out.text_embeds], 1)
    return out.logits
