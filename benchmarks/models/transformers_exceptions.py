"""What the names of a type's fields do not tell: changes to small configurations, and inputs that can't be guessed."""

from __future__ import annotations

from typing import Any

EFFICIENT = {"width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 640}
EFFICIENT |= {"in_channels": [32, 16, 24, 40, 80, 112, 192], "out_channels": [16, 24, 40, 80, 112, 192, 320]}

# What a type's constructor must be given.
GIVEN: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 3, "num_time_features": 2},
    "informer": {"prediction_length": 3, "num_time_features": 2},
    "time_series_transformer": {"prediction_length": 3, "num_time_features": 2},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
}
TILES = {"image_grid_pinpoints": [[48, 96], [96, 48]]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
WINDOWS = {"image_size": 96, "window_size": 3}
CODEC = {"num_filters": 2, "depths": [1] * 7}
HYBRID = {
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}
SEGMENT = {"prompt_encoder_config": {"image_embedding_size": 6}, "vision_config": {"num_pos_feats": 32}}
IDS, SEEN = ["ids", [2, 7], 79], ["ones", [2, 7]]
TEXT: dict[str, Any] = {"input_ids": IDS, "attention_mask": SEEN}
GRID = ["values", [2, 3], [1, 4, 6, 1, 4, 6]]
# Changes to a small configuration, wherever it stands; a dict changes the sub-configuration of that name.
CONFIGS: dict[str, dict[str, Any]] = {
    "efficientnet": EFFICIENT,
    "align_vision_model": EFFICIENT,
    "hiera": {"image_size": [64, 64]},
    "levit": {"image_size": 224, "patch_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lw_detr": {"image_size": 64},
    "lw_detr_vit": {"image_size": 64},
    "mobilevit": {"hidden_sizes": [24, 32, 40]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blip-2": {"image_token_index": 100},
    "llava_next": TILES,
    "llava_next_video": TILES,
    "llava_onevision": TILES,
    "mamba2": {"head_dim": 32, "n_groups": 2},
    "nemotron_h": {"n_groups": 2},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 32},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "align": {"projection_dim": 160},
    "bros": {"dim_bbox_sinusoid_emb_2d": 192, "dim_bbox_projection": 16},
    "clap_audio_model": {"spec_size": 256, "patch_embeds_hidden_size": 32, "hidden_size": 256},
    "autoformer": {"label_length": 2},
    "chameleon": {"vocabulary_map": {"<image>": 100, "IMGIMGAZ": 40}},
    "emu3": {
        "vocabulary_map": {"<image>": 100, "<|extra_200|>": 41, "<|visual token 000000|>": 42},
        "pad_token_id": 0,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 6, "n_group": 1, "topk_group": 1},
    "esm": {"pad_token_id": 1, "mask_token_id": 32},
    "donut-swin": WINDOWS,
    "maskformer-swin": WINDOWS,
    "depth_pro": {"intermediate_hook_ids": [1, 0]},
    "clvp_encoder": {"hidden_size": 128, "projection_dim": 128},
    "clvp_decoder": {"hidden_size": 128},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "glm5_next_text": {"index_topk": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "hrm_text": {"num_hidden_layers": 16},
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100},
    "superpoint": {"keypoint_decoder_dim": 65},
    "sam": SEGMENT,
    "sam_hq": SEGMENT,
    "sam3_tracker": {"vision_config": {"backbone_feature_sizes": [[24, 24], [12, 12], [6, 6]]}},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "lilt": {"hidden_size": 96},
    "pp_lcnet_v4": {"stem_channels": [3, 48, 96], "stage_out_channels": [96, 96, 192, 384]},
    "pvt": {"num_encoder_blocks": 4, "image_size": 64},
    "zamba": {**HYBRID, "num_hidden_layers": 4},
    "zamba2": {**HYBRID, "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3], "mamba_headdim": 32},
    "xlnet": {"d_head": 16},
    "sam2_hiera_det_model": {
        "hidden_size": 16,
        "embed_dim_per_stage": [16, 32, 64, 128],
        "image_size": [64, 64],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "sam2": {"prompt_encoder_config": {"image_size": 64, "patch_size": 16}},
    "edgetam_vision_model": {"backbone_channel_list": [1024, 512, 256, 64]},
    "mistral4": {"head_dim": 32},
    "mistral_large4_text": {"kv_source_layers": [0, 1, 2, 3, 4], "no_rope_layers": [1, 1, 1, 0, 1]},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "reformer": {"axial_pos_embds_dim": [16, 48], "is_decoder": True, "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "efficientloftr": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "perceiver": {"d_latents": 64, "num_latents": 16, "num_self_attends_per_block": 2},
    "granite_docling_vision": {"image_size": 64},
    "fastspeech2_conformer_with_hifigan": {"vocoder_config": {"model_in_dim": 80}},
    "seggpt": {
        "num_hidden_layers": 5,
        "intermediate_hidden_state_indices": [1, 2, 3, 4],
        "merge_index": 0,
        "image_size": [96, 48],
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "kosmos-2": {"latent_query_num": 5},
    "pp_doclayout_v2": {"encoder_in_channels": [64, 128, 256], "x4_feat_dim": 16},
    "pp_doclayout_v3": {"encoder_in_channels": [64, 128, 256], "x4_feat_dim": 16},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 90, "vision_end_token_id": 91},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "vibevoice_acoustic_tokenizer": CODEC,
    "vibevoice_acoustic_tokenizer_encoder": CODEC,
    "vibevoice_acoustic_tokenizer_decoder": CODEC,
    "diffusion_gemma_text": {"num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 40},
}
SERIES = {
    "past_values": ["noise", [2, 10]],
    "past_time_features": ["noise", [2, 10, 2]],
    "past_observed_mask": ["ones", [2, 10]],
    "future_values": ["noise", [2, 3]],
    "future_time_features": ["noise", [2, 3, 2]],
}
PACKED = {"pixel_values": ["noise", [1, 3, 8, 576]], "target_sizes": ["values", [2, 2], [6, 6, 6, 6]]}
# Arguments of forward, as `transformers.tensor` reads them.
INPUTS: dict[str, dict[str, Any]] = {
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "patchtst": {"past_values": ["noise", [2, 32, 1]]},
    "patchtsmixer": {"past_values": ["noise", [2, 32, 1]]},
    "blt": {**TEXT, "use_cache": False},
    "clap": {**TEXT, "input_features": ["noise", [2, 1, 1024, 64]], "is_longer": ["mask", [2, 1]]},
    "dia": {**TEXT, "decoder_input_ids": ["ids", [2, 5, 9], 79]},
    "decision_transformer": {
        "states": ["noise", [2, 7, 17]],
        "actions": ["noise", [2, 7, 4]],
        "rewards": ["noise", [2, 7, 1]],
        "returns_to_go": ["noise", [2, 7, 1]],
        "timesteps": IDS,
        "attention_mask": SEEN,
    },
    "idefics": {
        **TEXT,
        "pixel_values": ["noise", [2, 1, 3, 48, 48]],
        "image_attention_mask": ["ones", [2, 7, 1]],
    },
    "fun_asr_nano_encoder": {
        "input_features": ["noise", [2, 32, 560]],
        "input_features_mask": ["ones", [2, 32]],
    },
    "granite_speech5_encoder": {"input_features": ["noise", [2, 64, 320]]},
    "granite_speech5_ctc": {"input_features": ["noise", [2, 64, 320]]},
    "gemma4_audio": {"input_features": ["noise", [2, 64, 16]], "attention_mask": ["mask", [2, 64]]},
    "gemma4_vision": {
        "pixel_values": ["noise", [2, 36, 192]],
        "pixel_position_ids": ["values", [2, 36, 2], [n for i in range(72) for n in (i % 6, i // 6 % 6)]],
    },
    "kimi_k25_vision": {"pixel_values": ["noise", [48, 3, 8, 8]], "grid_thw": GRID},
    "lxmert": {
        **TEXT,
        "visual_feats": ["noise", [2, 3, 64]],
        "visual_pos": ["noise", [2, 3, 4]],
    },
    "muse_spark_audio": {"input_values": ["noise", [2, 3840]]},
    "pix2struct": {
        "flattened_patches": ["uniform", [2, 9, 66]],
        "attention_mask": ["ones", [2, 9]],
        "decoder_input_ids": ["ids", [2, 5], 79],
    },
    "video_llama_3_vision": {
        "pixel_values": ["noise", [48, 192]],
        "grid_thw": GRID,
        "merge_sizes": ["values", [2], [1, 1]],
    },
    "xlstm": {**TEXT, "use_cache": False},
    "musicgen": {**TEXT, "decoder_input_ids": ["ids", [8, 5], 79]},
    "musicgen_melody": {**TEXT, "decoder_input_ids": ["ids", [8, 5], 79]},
    "blip_2_qformer": {
        "query_embeds": ["noise", [2, 5, 64]],
        "encoder_hidden_states": ["noise", [2, 7, 64]],
    },
    "minicpm_ocr_vision": PACKED,
    "minicpmv4_7_vision": PACKED,
    "vibevoice_acoustic_tokenizer_encoder": {"hidden_states": ["noise", [2, 1, 6400]]},
    "xcodec": {"input_values": ["noise", [2, 1, 3200]]},
    "timesfm": {"past_values": ["noise", [2, 64]]},
    "timesfm2_5": {"past_values": ["noise", [2, 64]]},
    "perceiver": {"inputs": IDS, "attention_mask": SEEN},
    "kosmos-2": {
        "input_ids": ["ids", [2, 12], 79],
        "attention_mask": ["ones", [2, 12]],
        "pixel_values": ["noise", [2, 3, 48, 48]],
        "image_embeds_position_mask": ["values", [2, 12], [0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0] * 2],
    },
    "seggpt": {
        key: ["noise", [2, 3, 48, 48]] for key in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    },
    "kyutai_speech_to_text": {"input_ids": ["ids", [2, 7, 33], 40], "attention_mask": SEEN},
    "oneformer": {"pixel_values": ["noise", [2, 3, 64, 64]], "task_inputs": ["ids", [2, 77], 79]},
}
