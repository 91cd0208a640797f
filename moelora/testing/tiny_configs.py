"""What each tiny model is made of: one row per family, read by `moelora.testing.tiny`.

A row names the config class, the model class (with the head that users of the family load) and what the config is told.
Widths are small and as distinct as the family allows (query width, key width, hidden width, intermediate width all
differ), so that a mixed-up axis is a shape error and not a silent success.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """How one tiny model is built: class names in `transformers`, and the keyword arguments of its config."""

    config: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)


TOKENS: dict[str, Any] = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# query width 4 * 12 = 48, key width 2 * 12 = 24, hidden width 32, intermediate width 56
DECODER: dict[str, Any] = TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
}

# families whose heads must tile the hidden width
PLAIN_HEADS: dict[str, Any] = {key: value for key, value in DECODER.items() if key != "head_dim"}
EQUAL_HEADS: dict[str, Any] = {key: value for key, value in PLAIN_HEADS.items() if key != "num_key_value_heads"}

ENCODER: dict[str, Any] = EQUAL_HEADS | {"type_vocab_size": 2}

MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}

MAMBA: dict[str, Any] = TOKENS | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 6,
    "expand": 2,
    "time_step_rank": 3,
}

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}

GPT: dict[str, Any] = TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 56, "n_positions": 64}

ENCODER_DECODER: dict[str, Any] = TOKENS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56,
}

MAMBA2_HEADS: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 6,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 4,
    "mamba_expand": 2,
}

CONFIGS: dict[str, TinyFamily] = {
    # decoders with separate projections
    "llama": TinyFamily(config="LlamaConfig", model="LlamaForCausalLM", options=DECODER),
    "mistral": TinyFamily(config="MistralConfig", model="MistralForCausalLM", options=DECODER),
    "qwen2": TinyFamily(config="Qwen2Config", model="Qwen2ForCausalLM", options=PLAIN_HEADS),
    "qwen3": TinyFamily(config="Qwen3Config", model="Qwen3ForCausalLM", options=DECODER),
    "gemma2": TinyFamily(config="Gemma2Config", model="Gemma2ForCausalLM", options=DECODER),
    "gemma3": TinyFamily(config="Gemma3TextConfig", model="Gemma3ForCausalLM", options=DECODER),
    "olmo2": TinyFamily(config="Olmo2Config", model="Olmo2ForCausalLM", options=PLAIN_HEADS),
    "cohere2": TinyFamily(config="Cohere2Config", model="Cohere2ForCausalLM", options=DECODER),
    "stablelm": TinyFamily(config="StableLmConfig", model="StableLmForCausalLM", options=PLAIN_HEADS),
    "starcoder2": TinyFamily(config="Starcoder2Config", model="Starcoder2ForCausalLM", options=PLAIN_HEADS),
    "smollm3": TinyFamily(config="SmolLM3Config", model="SmolLM3ForCausalLM", options=PLAIN_HEADS),
    "granite": TinyFamily(config="GraniteConfig", model="GraniteForCausalLM", options=PLAIN_HEADS),
    "glm4": TinyFamily(config="Glm4Config", model="Glm4ForCausalLM", options=DECODER),
    "nemotron": TinyFamily(config="NemotronConfig", model="NemotronForCausalLM", options=DECODER),
    "phi": TinyFamily(config="PhiConfig", model="PhiForCausalLM", options=PLAIN_HEADS),
    "opt": TinyFamily(
        config="OPTConfig",
        model="OPTForCausalLM",
        options=TOKENS
        | {
            "hidden_size": 32,
            "ffn_dim": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
        },
    ),
    "gptj": TinyFamily(config="GPTJConfig", model="GPTJForCausalLM", options=GPT | {"rotary_dim": 4}),
    "gpt_neo": TinyFamily(
        config="GPTNeoConfig",
        model="GPTNeoForCausalLM",
        options=TOKENS
        | {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 56,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    # decoders with one fused projection
    "phi3": TinyFamily(config="Phi3Config", model="Phi3ForCausalLM", options=PLAIN_HEADS),
    "gpt2": TinyFamily(config="GPT2Config", model="GPT2LMHeadModel", options=GPT),
    "gpt_bigcode": TinyFamily(config="GPTBigCodeConfig", model="GPTBigCodeForCausalLM", options=GPT),
    "gpt_neox": TinyFamily(config="GPTNeoXConfig", model="GPTNeoXForCausalLM", options=EQUAL_HEADS),
    "bloom": TinyFamily(
        config="BloomConfig", model="BloomForCausalLM", options=TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}
    ),
    "falcon": TinyFamily(
        config="FalconConfig",
        model="FalconForCausalLM",
        options=EQUAL_HEADS | {"ffn_hidden_size": 56},
    ),
    "mpt": TinyFamily(
        config="MptConfig",
        model="MptForCausalLM",
        options=TOKENS | {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64},
    ),
    "codegen": TinyFamily(config="CodeGenConfig", model="CodeGenForCausalLM", options=GPT | {"rotary_dim": 4}),
    "persimmon": TinyFamily(config="PersimmonConfig", model="PersimmonForCausalLM", options=EQUAL_HEADS),
    # mixtures of experts
    "mixtral": TinyFamily(
        config="MixtralConfig",
        model="MixtralForCausalLM",
        options=DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": TinyFamily(config="Qwen3MoeConfig", model="Qwen3MoeForCausalLM", options=DECODER | MOE),
    "olmoe": TinyFamily(
        config="OlmoeConfig",
        model="OlmoeForCausalLM",
        options=PLAIN_HEADS | {"num_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": TinyFamily(
        config="GptOssConfig",
        model="GptOssForCausalLM",
        options=DECODER
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek_v3": TinyFamily(
        config="DeepseekV3Config",
        model="DeepseekV3ForCausalLM",
        options=EQUAL_HEADS
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 18,
            "kv_lora_rank": 14,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 10,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 20,
        },
    ),
    # encoders
    "bert": TinyFamily(config="BertConfig", model="BertForMaskedLM", options=ENCODER),
    "roberta": TinyFamily(config="RobertaConfig", model="RobertaForMaskedLM", options=ENCODER),
    "electra": TinyFamily(config="ElectraConfig", model="ElectraModel", options=ENCODER | {"embedding_size": 20}),
    "distilbert": TinyFamily(
        config="DistilBertConfig",
        model="DistilBertForMaskedLM",
        options=TOKENS | {"dim": 32, "hidden_dim": 56, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "albert": TinyFamily(config="AlbertConfig", model="AlbertForMaskedLM", options=ENCODER | {"embedding_size": 20}),
    "deberta-v2": TinyFamily(
        config="DebertaV2Config",
        model="DebertaV2ForMaskedLM",
        options=ENCODER
        | {
            "relative_attention": True,
            "position_buckets": 8,
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "modernbert": TinyFamily(
        config="ModernBertConfig",
        model="ModernBertForMaskedLM",
        options=EQUAL_HEADS
        | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8, "global_attn_every_n_layers": 2},
    ),
    # encoder and decoder
    "t5": TinyFamily(
        config="T5Config",
        model="T5ForConditionalGeneration",
        options={
            "vocab_size": 99,
            "d_model": 32,
            "d_kv": 12,
            "d_ff": 56,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": TinyFamily(
        config="BartConfig",
        model="BartForConditionalGeneration",
        options=ENCODER_DECODER
        | {
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
    ),
    "whisper": TinyFamily(
        config="WhisperConfig",
        model="WhisperForConditionalGeneration",
        options=ENCODER_DECODER
        | {
            "num_mel_bins": 10,
            "max_source_positions": 9,
            "max_target_positions": 64,
            "decoder_start_token_id": 3,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    # images, images with text, audio
    "vit": TinyFamily(config="ViTConfig", model="ViTForImageClassification", options=VISION | {"num_labels": 5}),
    "dinov2": TinyFamily(config="Dinov2Config", model="Dinov2ForImageClassification", options=VISION),
    "clip": TinyFamily(
        config="CLIPConfig",
        model="CLIPModel",
        options={
            "projection_dim": 16,
            "text_config": TOKENS
            | {
                "hidden_size": 24,
                "intermediate_size": 44,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 64,
            },
            "vision_config": VISION,
        },
    ),
    "siglip": TinyFamily(
        config="SiglipConfig",
        model="SiglipModel",
        options={
            "text_config": TOKENS
            | {
                "hidden_size": 32,
                "intermediate_size": 44,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 64,
            },
            "vision_config": VISION,
        },
    ),
    "wav2vec2": TinyFamily(
        config="Wav2Vec2Config",
        model="Wav2Vec2ForCTC",
        options=TOKENS
        | {
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "conv_dim": [16, 16, 16],
            "conv_kernel": [8, 4, 4],
            "conv_stride": [5, 4, 2],
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
    # state space and hybrids
    "mamba": TinyFamily(config="MambaConfig", model="MambaForCausalLM", options=MAMBA),
    "falcon_mamba": TinyFamily(config="FalconMambaConfig", model="FalconMambaForCausalLM", options=MAMBA),
    "mamba2": TinyFamily(
        config="Mamba2Config",
        model="Mamba2ForCausalLM",
        options=MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    ),
    "jamba": TinyFamily(
        config="JambaConfig",
        model="JambaForCausalLM",
        options=PLAIN_HEADS
        | {
            "mamba_d_state": 6,
            "mamba_dt_rank": 3,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "bamba": TinyFamily(
        config="BambaConfig",
        model="BambaForCausalLM",
        options=PLAIN_HEADS | MAMBA2_HEADS | {"attn_layer_indices": [1]},
    ),
    "granitemoehybrid": TinyFamily(
        config="GraniteMoeHybridConfig",
        model="GraniteMoeHybridForCausalLM",
        options=PLAIN_HEADS
        | MAMBA2_HEADS
        | {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 28,
        },
    ),
    "falcon_h1": TinyFamily(
        config="FalconH1Config",
        model="FalconH1ForCausalLM",
        options=DECODER | MAMBA2_HEADS | {"mamba_d_ssm": 64},
    ),
    "zamba2": TinyFamily(
        config="Zamba2Config",
        model="Zamba2ForCausalLM",
        options=EQUAL_HEADS
        | {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "num_mem_blocks": 1,
            "mamba_d_state": 6,
            "mamba_ngroups": 2,
            "n_mamba_heads": 8,
            "chunk_size": 4,
            "use_shared_attention_adapter": False,
        },
    ),
    "nemotron_h": TinyFamily(
        config="NemotronHConfig",
        model="NemotronHForCausalLM",
        options=DECODER
        | {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "ssm_state_size": 6,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "chunk_size": 4,
        },
    ),
    # two recurrent blocks before every attention, so three layers
    "recurrent_gemma": TinyFamily(
        config="RecurrentGemmaConfig",
        model="RecurrentGemmaForCausalLM",
        options=EQUAL_HEADS | {"num_hidden_layers": 3, "num_key_value_heads": 2, "lru_width": 40},
    ),
    "qwen3_next": TinyFamily(
        config="Qwen3NextConfig",
        model="Qwen3NextForCausalLM",
        options=DECODER
        | MOE
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 10,
            "shared_expert_intermediate_size": 20,
        },
    ),
}
