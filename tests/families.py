"""Tiny random models of every family the tests cover, a few lines of config each.

The sizes are small but not trivial: several layers, grouped attention, experts in the plural, and
weights large enough that routing and logits differ from token to token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, PreTrainedModel

from moepack_runtime.experts import Compute, ExpertsAdapter, is_decorated
from moepack_runtime.plugin.auto_class import auto_class_of
from tests.more_families import LATENT_ATTENTION, MORE_FAMILIES, small_config

_COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK = {
    "moe_intermediate_size": 40,
    "intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    **LATENT_ATTENTION,
}
_LOCAL_EXPERTS = {"intermediate_size": 40, "num_local_experts": 8, "num_experts_per_tok": 2}
_QWEN = {
    "moe_intermediate_size": 40,
    "intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
# Keys set to None are left out of the config.
DECORATED: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL_EXPERTS,
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**_QWEN, "head_dim": 16, "norm_topk_prob": True},
    "qwen3_next": {
        **_QWEN,
        "shared_expert_intermediate_size": 40,
        "head_dim": 16,
        "num_hidden_layers": 4,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "olmoe": {"intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": {
        **_LOCAL_EXPERTS,
        "intermediate_size": 96,  # MXFP4 has blocks of 32
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granitemoe": _LOCAL_EXPERTS,
    "phimoe": _LOCAL_EXPERTS,
    "minimax_m2": {**_LOCAL_EXPERTS, "head_dim": 16, "rotary_dim": 8},
    "glm4_moe": {
        "moe_intermediate_size": 40,
        "intermediate_size": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "head_dim": 16,
    },
    "hunyuan_v1_moe": {"intermediate_size": 40, "num_experts": 8, "moe_topk": 2, "head_dim": 16},
    "ernie4_5_moe": {
        "moe_intermediate_size": 40,
        "intermediate_size": 48,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "jamba": {
        "intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "nemotron_h": {
        "num_hidden_layers": None,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 40,
        "layers_block_type": ["attention", "moe", "mamba", "moe"],
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "afmoe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 40,
        "num_experts": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "head_dim": 16,
    },
    "lfm2_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 40,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
        "use_expert_bias": True,
    },
}
_LLAMA4_TEXT = {
    "intermediate_size": 40,
    "intermediate_size_mlp": 48,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "interleave_moe_layer_step": 1,
    "attention_chunk_size": 64,
}
UNDECORATED: dict[str, dict[str, Any]] = {
    "llama4_text": _LLAMA4_TEXT,
    "longcat_flash": {
        "num_hidden_layers": None,
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 40,
        "n_routed_experts": 8,
        "zero_expert_num": 4,
        "moe_topk": 3,
        "head_dim": 8,
        **LATENT_ATTENTION,
    },
    "dbrx": {
        **dict.fromkeys(_COMMON),
        "vocab_size": 160,
        "pad_token_id": 0,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "ffn_config": {
            "ffn_hidden_size": 40,
            "moe_num_experts": 8,
            "moe_top_k": 2,
            "hidden_size": 64,
        },
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "step3p7": {
        **dict.fromkeys(_COMMON),
        "text_config": {
            **_COMMON,
            "intermediate_size": 48,
            "moe_intermediate_size": 40,
            "share_expert_dim": 40,
            "n_routed_experts": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "swiglu_limits": [0.0, 0.0, 0.3],
            "sliding_window": 64,
        },
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    },
}
FAMILIES = {**DECORATED, **UNDECORATED}


def config_of(family: str, **changes: Any) -> Any:
    """The config of a family; ``changes`` override single keys."""
    if family in MORE_FAMILIES:
        return small_config(family, **changes)
    options = {**_COMMON, **FAMILIES[family], **changes}
    return AutoConfig.for_model(family, **{k: v for k, v in options.items() if v is not None})


def random_model(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A model with random weights, in evaluation mode and with transformers' eager experts."""
    config = config_of(family, **changes)
    auto = auto_class_of(type(config))
    torch.manual_seed(seed)  # vectors keep a part of the class's own, random initial values
    model: PreTrainedModel = auto.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.15)
            else:
                parameter.add_(noise.to(parameter.dtype) * 0.2)
        for name, buffer in model.named_buffers():
            if "bias" in name:
                # Loading puts back what a class writes there itself.
                own = buffer.clone()
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
                buffer.copy_(torch.where(own == 0, buffer, own))
    if any(is_decorated(module) for module in model.modules()):
        model.set_experts_implementation("eager")
    return model


def tokens(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    """Token ids ``[batch, length]`` of the tiny vocabulary, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 160, (batch, length), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``[batch, length, vocabulary]`` in float32."""
    out: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return out.float()


def save_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "120KB",
) -> Path:
    """Saves a model the way its publisher would: source names, several files.

    Args:
        model: The model; it is cast in place when ``dtype`` is given.
        folder: Where to save; created when absent.
        dtype: The dtype of the files, the model's own by default.
        max_shard_size: Small enough by default to give several files.

    Returns:
        The folder.
    """
    if dtype is not None:
        nn.Module.to(model, dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def reference_compute(adapter: ExpertsAdapter, load: Callable[[int], dict[str, Tensor]]) -> Compute:
    """Experts in plain torch from canonical weights.

    Args:
        adapter: The experts module to imitate.
        load: Gives the canonical tensors of one expert.

    Returns:
        A function to give to ``adapter.install``.
    """

    def compute(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = hidden.new_zeros(*top_k_index.shape, hidden.shape[-1])
        for expert in top_k_index.unique().tolist():
            if expert >= adapter.num_experts:
                continue
            part = load(expert)
            row, place = (top_k_index == expert).nonzero(as_tuple=True)
            projected = [
                functional.linear(hidden[row], part[name], part.get(f"{name}_bias"))
                for name in ("gate", "up")
                if name in part
            ]
            active = adapter.activate(torch.cat(projected, dim=-1))
            result = functional.linear(active, part["down"], part.get("down_bias"))
            weighted = adapter.finish(result) * top_k_weights[row, place, None]
            out[row, place] = weighted.to(out.dtype)
        return out.sum(dim=1)

    return compute
