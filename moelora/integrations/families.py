"""Where the projections of each model family are: one table, and what counts as a linear. Begin with `MODEL_TYPES`.

`MODEL_TYPES` maps a config's `model_type` to a layout; a layout maps roles to endings of module paths. An ending
matches a path that equals it or ends with a dot and the ending; the longest matching ending wins, so that BERT's
`attention.output.dense` is not mistaken for its `output.dense`. Families that are not here are resolved by structure
(`moelora.integrations.structure`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

ROLES: tuple[str, ...] = (
    "attn_in",
    "attn_out",
    "cross_in",
    "cross_out",
    "ssm_in",
    "ssm_x",
    "ssm_out",
    "mlp_in",
    "mlp_out",
    "other",
)
DEFAULT_ROLES: tuple[str, ...] = ("attn_in", "attn_out", "cross_in", "cross_out", "ssm_in", "ssm_out")

# The key "reads_encoder" is no role: it names those endings of "cross_in" whose input is the encoder's output.
LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    # self_attn.q_proj ... self_attn.o_proj, gated or plain MLP
    "llama": {
        "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn_out": ("self_attn.o_proj",),
        "mlp_in": (
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.gate_up_proj",
            "mlp.c_fc",
            "shared_expert.gate_proj",
            "shared_expert.up_proj",
        ),
        "mlp_out": ("mlp.down_proj", "mlp.c_proj", "shared_expert.down_proj"),
    },
    "phi": {
        "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn_out": ("self_attn.dense",),
        "mlp_in": ("mlp.fc1",),
        "mlp_out": ("mlp.fc2",),
    },
    "phi3": {
        "attn_in": ("self_attn.qkv_proj",),
        "attn_out": ("self_attn.o_proj",),
        "mlp_in": ("mlp.gate_up_proj",),
        "mlp_out": ("mlp.down_proj",),
    },
    # low-rank attention: the projections that read the hidden state are the way in, the b-projections stay as they are
    "deepseek": {
        "attn_in": ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        "attn_out": ("self_attn.o_proj",),
        "mlp_in": ("mlp.gate_proj", "mlp.up_proj", "shared_experts.gate_proj", "shared_experts.up_proj"),
        "mlp_out": ("mlp.down_proj", "shared_experts.down_proj"),
    },
    # decoder alone (OPT), encoder alone (CLIP's towers), or both (BART, Whisper)
    "bart": {
        "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn_out": ("self_attn.out_proj",),
        "cross_in": ("encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.v_proj"),
        "cross_out": ("encoder_attn.out_proj",),
        "reads_encoder": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
        "mlp_in": ("fc1",),
        "mlp_out": ("fc2",),
    },
    "wav2vec2": {
        "attn_in": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attn_out": ("attention.out_proj",),
        "mlp_in": ("feed_forward.intermediate_dense",),
        "mlp_out": ("feed_forward.output_dense",),
    },
    "vit": {
        # DINOv2 took ViT's names after transformers 5.17, and split its gated MLP; the older names stand second
        "attn_in": (
            *("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            *("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        ),
        "attn_out": ("attention.o_proj", "attention.output.dense"),
        "mlp_in": ("mlp.fc1", "mlp.gate_proj", "mlp.up_proj", "mlp.weights_in"),
        "mlp_out": ("mlp.fc2", "mlp.down_proj", "mlp.weights_out"),
    },
    "gpt2": {
        "attn_in": ("attn.c_attn",),
        "attn_out": ("attn.c_proj",),
        "cross_in": ("crossattention.q_attn", "crossattention.c_attn"),
        "cross_out": ("crossattention.c_proj",),
        "reads_encoder": ("crossattention.c_attn",),
        "mlp_in": ("mlp.c_fc",),
        "mlp_out": ("mlp.c_proj",),
    },
    "gptj": {
        "attn_in": ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.qkv_proj"),
        "attn_out": ("attn.out_proj",),
        "mlp_in": ("mlp.fc_in",),
        "mlp_out": ("mlp.fc_out",),
    },
    "gpt_neo": {
        "attn_in": ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        "attn_out": ("attn.attention.out_proj",),
        "mlp_in": ("mlp.c_fc",),
        "mlp_out": ("mlp.c_proj",),
    },
    # gpt_neox says attention, bloom and falcon self_attention, persimmon self_attn
    "gpt_neox": {
        "attn_in": ("query_key_value",),
        "attn_out": ("attention.dense", "self_attention.dense", "self_attn.dense"),
        "mlp_in": ("mlp.dense_h_to_4h",),
        "mlp_out": ("mlp.dense_4h_to_h",),
    },
    "mpt": {
        "attn_in": ("attn.Wqkv",),
        "attn_out": ("attn.out_proj",),
        "mlp_in": ("ffn.up_proj",),
        "mlp_out": ("ffn.down_proj",),
    },
    "modernbert": {
        "attn_in": ("attn.Wqkv",),
        "attn_out": ("attn.Wo",),
        "mlp_in": ("mlp.Wi",),
        "mlp_out": ("mlp.Wo",),
    },
    "bert": {
        "attn_in": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attn_out": ("attention.output.dense",),
        "cross_in": ("crossattention.self.query", "crossattention.self.key", "crossattention.self.value"),
        "cross_out": ("crossattention.output.dense",),
        "reads_encoder": ("crossattention.self.key", "crossattention.self.value"),
        "mlp_in": ("intermediate.dense",),
        "mlp_out": ("output.dense",),
    },
    "deberta-v2": {
        "attn_in": ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        "attn_out": ("attention.output.dense",),
        "mlp_in": ("intermediate.dense",),
        "mlp_out": ("output.dense",),
    },
    "albert": {
        "attn_in": ("attention.query", "attention.key", "attention.value"),
        "attn_out": ("attention.dense",),
        "mlp_in": ("ffn",),
        "mlp_out": ("ffn_output",),
    },
    "distilbert": {
        "attn_in": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attn_out": ("attention.out_lin",),
        "mlp_in": ("ffn.lin1",),
        "mlp_out": ("ffn.lin2",),
    },
    "t5": {
        "attn_in": ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"),
        "attn_out": ("SelfAttention.o",),
        "cross_in": ("EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v"),
        "cross_out": ("EncDecAttention.o",),
        "reads_encoder": ("EncDecAttention.k", "EncDecAttention.v"),
        "mlp_in": ("DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1"),
        "mlp_out": ("DenseReluDense.wo",),
    },
    # in_proj makes the state and its gate; jamba and the hybrids say mamba for the same thing
    "mamba": {
        "ssm_in": ("mixer.in_proj",),
        "ssm_x": ("mixer.x_proj",),
        "ssm_out": ("mixer.out_proj",),
    },
    "mamba_hybrid": {
        "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn_out": ("self_attn.o_proj",),
        "ssm_in": ("mamba.in_proj",),
        "ssm_x": ("mamba.x_proj",),
        "ssm_out": ("mamba.out_proj",),
        "mlp_in": (
            "feed_forward.gate_proj",
            "feed_forward.up_proj",
            "feed_forward.gate_up_proj",
            "shared_mlp.input_linear",
        ),
        "mlp_out": ("feed_forward.down_proj", "shared_mlp.output_linear"),
    },
    # one container name for all three kinds of block; their projections are named apart
    "nemotron_h": {
        "attn_in": ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
        "attn_out": ("mixer.o_proj",),
        "ssm_in": ("mixer.in_proj",),
        "ssm_out": ("mixer.out_proj",),
        "mlp_in": ("mixer.up_proj", "shared_experts.up_proj"),
        "mlp_out": ("mixer.down_proj", "shared_experts.down_proj"),
    },
    "recurrent_gemma": {
        "attn_in": ("temporal_block.q_proj", "temporal_block.k_proj", "temporal_block.v_proj"),
        "attn_out": ("temporal_block.o_proj",),
        "ssm_in": ("temporal_block.linear_x", "temporal_block.linear_y"),
        "ssm_out": ("temporal_block.linear_out",),
        "mlp_in": ("mlp_block.gate_proj", "mlp_block.up_proj"),
        "mlp_out": ("mlp_block.down_proj",),
    },
    # gates (ogate_preact and the like) stay as they are
    "xlstm": {
        "ssm_in": ("mlstm_layer.q", "mlstm_layer.k", "mlstm_layer.v"),
        "ssm_out": ("mlstm_layer.out_proj",),
        "mlp_in": ("ffn.proj_up_gate", "ffn.proj_up", "ffn.proj_up_gate_z"),
        "mlp_out": ("ffn.proj_down",),
    },
    "rwkv": {
        "ssm_in": ("attention.key", "attention.value", "attention.receptance"),
        "ssm_out": ("attention.output",),
        "mlp_in": ("feed_forward.key", "feed_forward.receptance"),
        "mlp_out": ("feed_forward.value",),
    },
    "qwen3_next": {
        "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn_out": ("self_attn.o_proj",),
        "ssm_in": (
            "linear_attn.in_proj_qkvz",
            "linear_attn.in_proj_ba",
            "linear_attn.in_proj_qkv",
            "linear_attn.in_proj_z",
            "linear_attn.in_proj_b",
            "linear_attn.in_proj_a",
        ),
        "ssm_out": ("linear_attn.out_proj",),
        "mlp_in": ("mlp.gate_proj", "mlp.up_proj", "shared_expert.gate_proj", "shared_expert.up_proj"),
        "mlp_out": ("mlp.down_proj", "shared_expert.down_proj"),
    },
}

MODEL_TYPES: dict[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "ministral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "gemma": "llama",
    "gemma2": "llama",
    "gemma3_text": "llama",
    "gemma4_text": "llama",
    "llama4_text": "llama",
    "olmo": "llama",
    "olmo2": "llama",
    "olmo3": "llama",
    "cohere": "llama",
    "cohere2": "llama",
    "stablelm": "llama",
    "starcoder2": "llama",
    "smollm3": "llama",
    "granite": "llama",
    "glm4": "llama",
    "ernie4_5": "llama",
    "nemotron": "llama",
    "mixtral": "llama",
    "qwen2_moe": "llama",
    "qwen3_moe": "llama",
    "olmoe": "llama",
    "gpt_oss": "llama",
    "phi": "phi",
    "phi3": "phi3",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "opt": "bart",
    "bart": "bart",
    "mbart": "bart",
    "whisper": "bart",
    "clip": "bart",
    "clip_text_model": "bart",
    "clip_vision_model": "bart",
    "siglip": "bart",
    "siglip_text_model": "bart",
    "siglip_vision_model": "bart",
    "wav2vec2": "wav2vec2",
    "hubert": "wav2vec2",
    "vit": "vit",
    "dinov2": "vit",
    "gpt2": "gpt2",
    "gpt_bigcode": "gpt2",
    "gptj": "gptj",
    "codegen": "gptj",
    "gpt_neo": "gpt_neo",
    "gpt_neox": "gpt_neox",
    "bloom": "gpt_neox",
    "falcon": "gpt_neox",
    "persimmon": "gpt_neox",
    "mpt": "mpt",
    "modernbert": "modernbert",
    "bert": "bert",
    "roberta": "bert",
    "xlm-roberta": "bert",
    "camembert": "bert",
    "electra": "bert",
    "deberta-v2": "deberta-v2",
    "albert": "albert",
    "distilbert": "distilbert",
    "t5": "t5",
    "mt5": "t5",
    "umt5": "t5",
    "mamba": "mamba",
    "mamba2": "mamba",
    "falcon_mamba": "mamba",
    "jamba": "mamba_hybrid",
    "bamba": "mamba_hybrid",
    "granitemoehybrid": "mamba_hybrid",
    "falcon_h1": "mamba_hybrid",
    "zamba2": "mamba_hybrid",
    "nemotron_h": "nemotron_h",
    "recurrent_gemma": "recurrent_gemma",
    "rwkv": "rwkv",
    "xlstm": "xlstm",
    "qwen3_next": "qwen3_next",
    "qwen3_5_text": "qwen3_next",
    "qwen3_5_moe_text": "qwen3_next",
}


def ends_with(path: str, ending: str) -> bool:
    """Whether a module path is the ending, or ends with a dot and the ending."""
    return path == ending or path.endswith("." + ending)


def role_in_layout(path: str, layout: Mapping[str, tuple[str, ...]]) -> tuple[str, bool]:
    """The role of a linear's path ("other" if nothing matches), and whether it reads the encoder's output."""
    best, role = "", "other"
    for candidate in ROLES:
        for ending in layout.get(candidate, ()):
            if len(ending) > len(best) and ends_with(path, ending):
                best, role = ending, candidate
    return role, best in layout.get("reads_encoder", ()) and role == "cross_in"


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(input width, output width) of a linear projection, or None if the module is none.

    Sizes come from attributes, never from `.weight`, because a quantised weight is packed: `in_features` and
    `out_features` (`nn.Linear`, its subclasses, bitsandbytes, AWQ, HQQ), `infeatures` and `outfeatures` (GPTQ), `nx`
    and `nf` (GPT-2's `Conv1D`).
    """
    for wide, narrow in (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf")):
        sizes: tuple[Any, Any] = getattr(module, wide, None), getattr(module, narrow, None)
        if all(isinstance(size, int) and size > 0 for size in sizes):
            return sizes
    return None


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of a model by its first path; a module that stands at several places is there once."""
    return {path: module for path, module in model.named_modules() if linear_sizes(module) is not None}


def aliases(model: nn.Module, paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each of the paths, all other paths at which the same module object stands (ALBERT-like sharing)."""
    wanted = {id(model.get_submodule(path)): path for path in paths}
    found: dict[str, list[str]] = {path: [] for path in wanted.values()}
    for path, module in model.named_modules(remove_duplicate=False):
        first = wanted.get(id(module))
        if first is not None and path != first:
            found[first].append(path)
    return {first: tuple(others) for first, others in found.items()}
