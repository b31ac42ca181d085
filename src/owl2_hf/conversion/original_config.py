"""The files around the weights as the original's code reads them: config.json, tokenizer, preprocessing."""

import json
import shutil
from pathlib import Path
from typing import Any

from ..modeling.configuration_mplug_owl2 import DOCOWL_MODEL_TYPE, MplugOwl2Config
from ..processing import MplugOwl2Processor
from .reading import ConversionError

# Release of transformers that the original's code is written for.
_TRANSFORMERS_VERSION = "4.31.0"
# The settings that it knows; what is not here has no effect there.
_TEXT = [
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "pretraining_tp",
    "rms_norm_eps",
    "use_cache",
]
_VISION = [
    "attention_dropout",
    "hidden_act",
    "hidden_size",
    "image_size",
    "initializer_range",
    "intermediate_size",
    "layer_norm_eps",
    "num_attention_heads",
    "num_channels",
    "num_hidden_layers",
    "patch_size",
    "use_cls_token",
    "use_post_layernorm",
]
_ABSTRACTOR = [
    "encoder_hidden_size",
    "grid_size",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_norm_eps",
    "num_attention_heads",
    "num_hidden_layers",
    "num_learnable_queries",
    "use_cls_token",
]
_H_REDUCER = ["hidden_size", "initializer_range", "layer_norm_eps"]
# What DocOwl's vision encoder always does; its configuration has no word for it.
_FIXED_IN_DOCOWL = ("use_cls_token", "use_post_layernorm")
_OURS = {
    "vision_config",
    "abstractor_config",
    "h_reducer_config",
    "connector_type",
    "text_config",
    "image_token_id",
    "output_vocab_size",
    "auto_map",
    "dtype",
}


def original_config(config: MplugOwl2Config) -> dict[str, Any]:
    """The flat form of the original: LLaMA's fields at the top, the vision side in `visual_config`.

    Raises:
        ConversionError: The original's code has no word for something in it.
    """
    text, has_abstractor = config.text_config.to_dict(), config.connector_type == "abstractor"
    rope = text.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", "default")
    release = {"transformers_version": _TRANSFORMERS_VERSION}
    flat = {
        **{key: value for key, value in config.to_diff_dict().items() if key not in _OURS},
        **{key: text[key] for key in _TEXT if key in text},
        **release,
        "architectures": ["MPLUGOwl2LlamaForCausalLM" if has_abstractor else "MPLUGDocOwlLlamaForCausalLM"],
        "model_type": MplugOwl2Config.model_type if has_abstractor else DOCOWL_MODEL_TYPE,
        "rope_scaling": None if rope_type == "default" else {"type": rope_type, "factor": rope.get("factor")},
        "rope_theta": rope.get("rope_theta", 10000.0),
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "vocab_size": config.output_vocab_size,
        "visual_config": _visual_config(config) if has_abstractor else _docowl_visual_config(config),
    }
    _check_nothing_lost(flat, config)
    return flat


def _visual_config(config: MplugOwl2Config) -> dict[str, Any]:
    vision, abstractor = config.vision_config.to_dict(), config.abstractor_config.to_dict()
    return {
        "visual_model": _component("mplug_owl_vision_model", {key: vision[key] for key in _VISION}),
        "visual_abstractor": _component(
            "mplug_owl_visual_abstract",
            {
                **{key: abstractor[key] for key in _ABSTRACTOR},
                "add_v2t_pos_emb": False,
                "attention_probs_dropout_prob": abstractor["attention_dropout"],
            },
        ),
    }


def _docowl_visual_config(config: MplugOwl2Config) -> dict[str, Any]:
    vision, reducer = config.vision_config.to_dict(), config.h_reducer_config.to_dict()
    return {
        "visual_model": _component(
            "mplug_owl_vision_model", {key: vision[key] for key in _VISION if key not in _FIXED_IN_DOCOWL}
        ),
        "visual_hreducer": _component(
            "mplug_docowl_hreducer",
            {**{key: reducer[key] for key in _H_REDUCER}, "conv_shape": f"1x{reducer['kernel_width']}"},
        ),
    }


def _component(model_type: str, values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "model_type": model_type, "transformers_version": _TRANSFORMERS_VERSION}


def _parts(config: MplugOwl2Config):
    return config.text_config, config.vision_config, config.connector_config


def _check_nothing_lost(flat: dict[str, Any], config: MplugOwl2Config) -> None:
    """What comes back from the original's form must be what went in."""
    back = MplugOwl2Config.from_dict(json.loads(json.dumps(flat)))
    pairs = zip((config, *_parts(config)), (back, *_parts(back)), strict=True)
    for ours, theirs in pairs:
        before, after = ours.to_dict(), theirs.to_dict()
        for key in type(ours).__dataclass_fields__:
            ignored = key in ("architectures", "dtype", "transformers_version") or key.endswith("_config")
            if not ignored and before.get(key) != after.get(key):
                raise ConversionError(
                    f"the original's code has no {key} {before.get(key)!r}: it would read {after.get(key)!r}."
                )


def save_original_processor(processor: MplugOwl2Processor, vocabulary: Path, folder: Path) -> None:
    """tokenizer.model and the settings of tokenizer and pictures, as the original's folders have them.

    Args:
        vocabulary: The tokenizer.model.
    """
    shutil.copyfile(vocabulary, folder / "tokenizer.model")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = {
        **tokens,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": processor.legacy,
        "model_max_length": processor.tokenizer.model_max_length,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    images = processor.image_processor
    side = images.size["height"]
    preprocessor = {
        "crop_size": side,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(images.image_mean),
        "image_std": list(images.image_std),
        "resample": int(images.resample),
        "size": side,
    }
    files = {"tokenizer_config.json": tokenizer, "special_tokens_map.json": {**tokens, "pad_token": "<unk>"}}
    if images.image_aspect_ratio != "anchors":  # Upstream: DocOwl's settings are arguments of its code.
        files["preprocessor_config.json"] = preprocessor
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
