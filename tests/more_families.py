"""More tiny configs: families that only the core tests run.

A config is ``USUAL``, as far as the family's class has these keys, and what is written here. Those
with a ``text_config`` are multimodal; vision and audio are as small as their classes allow.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

USUAL: dict[str, Any] = {
    "vocab_size": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 40,
    "shared_intermediate_size": 40,
    "shared_expert_intermediate_size": 40,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 8),
    "moe_num_experts": 8,
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "n_group", "topk_group"), 1),
    # Linear attention, and indexers of sparse attention.
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 6,  # fewer than the tests' tokens
}
LATENT_ATTENTION = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_INDEXERS = {"indexer_types": ["full", "shared", "full"]}
_ROPE_OF_IMAGES = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 500000.0,
        "mrope_section": [3, 3, 2],
    }
}
_INKLING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
}
_QWEN4 = {
    "num_hidden_layers": 4,
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_GEMMA4 = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "enable_moe_block": True,
    "vocab_size_per_layer_input": 160,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
}
_MINIMAX_M3 = {**_DENSE_FIRST, "dense_intermediate_size": 48, "intermediate_size": 40}
_SMALL_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_SMALL_PIXTRAL = {"model_type": "pixtral", **_SMALL_VISION, "head_dim": 16}
_SMALL_TOWER = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
}
_SMALL_SAM = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "global_attn_indexes": [0],
    "output_channels": 16,
    "downsample_channels": [16, 32],
    "mlp_dim": 32,
    "image_size": 64,
}
_SMALL_AUDIO = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "output_dim": 64,
    "downsample_hidden_size": 8,
}

# Keys set to None are left out of the config.
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "aria_text": {},
    "axk1": {**LATENT_ATTENTION, **_DENSE_FIRST, "n_group": 4, "topk_group": 2},
    "axk2": {**LATENT_ATTENTION, **_DENSE_FIRST, "gated_norm_rank": 8},
    "bailing_hybrid": {**LATENT_ATTENTION, **_DENSE_FIRST, **_LINEAR, "num_mtp_layers": 0},
    "beam": {**_DENSE_FIRST, **_WINDOWS},
    "cohere2_moe": {**_DENSE_FIRST, **_WINDOWS, "prefix_dense_intermediate_size": 48},
    "deepseek_v32": {**LATENT_ATTENTION, **_DENSE_FIRST},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "q_lora_rank": 24,
        "o_lora_rank": 8,
        "o_groups": 2,
        "hc_mult": 2,
        "layer_types": [
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "partial_rotary_factor": 0.5,
        "num_nextn_predict_layers": 0,
    },
    "dots1": _WINDOWS,
    "dots3_note_text": {
        **LATENT_ATTENTION,
        **_DENSE_FIRST,
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "shared_experts_intermediate_size": 40,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "exaone_moe": {**_DENSE_FIRST, **_WINDOWS},
    "flex_olmo": {},
    "flint": {**_WINDOWS, "mlp_only_layers": [0]},
    "gemma4_text": _GEMMA4,
    "glm4_moe_lite": {**LATENT_ATTENTION, **_DENSE_FIRST},
    "glm_moe_dsa": {**LATENT_ATTENTION, **_DENSE_FIRST, **_INDEXERS},
    "granitemoe_swa": _WINDOWS,
    "granitemoehybrid": {
        **_LINEAR,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "granitemoeshared": {},
    "hy_v3": _DENSE_FIRST,
    "hy_v4": {**LATENT_ATTENTION, **_DENSE_FIRST, **_INDEXERS, "hc_mult": 2},
    "inkling_text": {
        **_DENSE_FIRST,
        **_INKLING,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
    "inkling2_text": {
        **_INKLING,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
        "unpadded_vocab_size": 160,
        "n_layers_per_attn_res_block": 2,
    },
    "jetmoe": {"kv_channels": 16, "head_dim": None, "num_attention_heads": None},
    "kimi_linear": {**LATENT_ATTENTION, **_DENSE_FIRST, **_LINEAR, "q_lora_rank": None},
    "kolibri1": _WINDOWS,
    "laguna": {**_DENSE_FIRST, **_WINDOWS, "num_attention_heads_per_layer": [4, 4, 4]},
    "mellum": {**_DENSE_FIRST, **_WINDOWS},
    "mimo_v2_flash": {**_DENSE_FIRST, **_WINDOWS, "v_head_dim": 8},
    "minimax": {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
    "minimax_m3_vl_text": {
        **_MINIMAX_M3,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "rotary_dim": 8,
    },
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
    "qwen4_exp_text": _QWEN4,
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "deepseek_ocr2": {
        "text_config": {
            "model_type": "deepseek_ocr2_text",
            **_DENSE_FIRST,
            "num_key_value_heads": 4,
        },
        "vision_config": {
            "sam_config": _SMALL_SAM,
            "encoder_config": {**_SMALL_VISION, "num_key_value_heads": 2},
        },
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "model_type": "ernie4_5_vl_moe_text",
            **_DENSE_FIRST,
            **_ROPE_OF_IMAGES,
            "moe_intermediate_size": [40, 24],
        },
        "vision_config": _SMALL_TOWER,
    },
    "gemma4": {
        "text_config": {"model_type": "gemma4_text", **_GEMMA4},
        "vision_config": {
            **_SMALL_VISION,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "position_embedding_size": 16,
        },
    },
    "glm4v_moe": {
        "text_config": {
            "model_type": "glm4v_moe_text",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500000.0,
                "mrope_section": [2, 1, 1],
            },
        },
        "vision_config": _SMALL_TOWER,
    },
    "glm5_next": {
        "text_config": {
            "model_type": "glm5_next_text",
            **LATENT_ATTENTION,
            **_DENSE_FIRST,
            "qk_rope_head_dim": 0,
            "hc_mult": 2,
            "index_topk": 8,
            "index_kpool": 4,
            "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
        },
        "vision_config": {**_SMALL_TOWER, "projection_intermediate_size": 32},
    },
    "llama4": {
        "text_config": {
            "model_type": "llama4_text",
            "num_hidden_layers": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
            "intermediate_size_mlp": 48,
        },
        "vision_config": {
            **_SMALL_VISION,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
    "mistral3": {  # Mistral Small 4
        "text_config": {"model_type": "mistral4", **LATENT_ATTENTION},
        "vision_config": _SMALL_PIXTRAL,
    },
    "mistral_large4": {
        "text_config": {"model_type": "mistral_large4_text", **LATENT_ATTENTION, **_DENSE_FIRST},
        "vision_config": _SMALL_PIXTRAL,
    },
    "muse_spark": {
        "text_config": {
            "model_type": "muse_spark_text",
            **_DENSE_FIRST,
            **_WINDOWS,
            "moe_hidden_size": 32,
        },
        "vision_config": {
            **_SMALL_VISION,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "max_position_embeddings": 16,
        },
        "audio_config": {
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1, 1, 1, 1],
            "out_hidden_size": 64,
        },
        "projector_hidden_size": 32,
        "out_hidden_size": 48,
    },
    "qwen3_5_moe": {  # its text part alone is loaded
        "text_config": {"model_type": "qwen3_5_moe_text", "num_hidden_layers": 4},
        "vision_config": {**_SMALL_TOWER, "num_position_embeddings": 16},
    },
    "qwen3_omni_moe_thinker": {
        "text_config": {
            "model_type": "qwen3_omni_moe_text",
            **_ROPE_OF_IMAGES,
            "sliding_window": None,
        },
        "vision_config": {
            **_SMALL_TOWER,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        "audio_config": _SMALL_AUDIO,
        "vision_start_token_id": 150,
        "audio_start_token_id": 151,
    },
    "qwen3_vl_moe": {
        "text_config": {"model_type": "qwen3_vl_moe_text", **_ROPE_OF_IMAGES},
        "vision_config": {
            **_SMALL_TOWER,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "unlimited_ocr": {
        "text_config": {
            "model_type": "unlimited_ocr_text",
            **_DENSE_FIRST,
            "num_key_value_heads": 4,
        },
        "vision_config": {"sam_config": _SMALL_SAM, "encoder_config": _SMALL_VISION},
    },
}


def small_config(family: str, **changes: Any) -> Any:
    """The config of one of ``MORE_FAMILIES``; ``changes`` override single keys."""
    options = {**MORE_FAMILIES[family], **changes}
    if "text_config" in options:
        text = options["text_config"]
        options["text_config"] = _with_usual(text["model_type"], text)
    else:
        options = _with_usual(family, options)
    return AutoConfig.for_model(family, **options)


def _with_usual(model_type: str, options: dict[str, Any]) -> dict[str, Any]:
    config_class: Any = CONFIG_MAPPING[model_type]
    known = {key for base in config_class.__mro__ for key in vars(base).get("__annotations__", {})}
    known |= {"pad_token_id", "bos_token_id", "eos_token_id", *config_class.attribute_map}
    everything = {**{key: USUAL[key] for key in USUAL.keys() & known}, **options}
    return {key: value for key, value in everything.items() if value is not None}
