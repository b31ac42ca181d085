"""The files around the weights as the original's code reads them: config.json, tokenizer,
preprocessing.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..modeling.configuration_mplug_owl2 import DOCOWL_MODEL_TYPE, QWEN_FIXED, MplugOwl2Config
from ..processing import MplugOwl2Processor
from ..processing.tokenization_mplug_owl2 import QWEN_VOCABULARY
from .reading import ConversionError

# Release of transformers that the original's code is written for.
_TRANSFORMERS_VERSION = "4.31.0"
# The settings that it reads; others have no effect there.
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
_QWEN_TEXT = [
    "bos_token_id",
    "eos_token_id",
    "hidden_size",
    "initializer_range",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "pad_token_id",
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
# Fixed in DocOwl's vision encoder, whose configuration has no such settings.
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
    """The flat form of the original: the decoder's fields at the top, the vision side in
    `visual_config`.

    Raises:
        ConversionError: If the original's code has no word for something in it.
    """
    if config.output_vocab_size is None:
        raise ConversionError(
            "the original's code needs output_vocab_size, got None: set it in config.json to "
            "the number of tokens."
        )
    text, has_abstractor = config.text_config.to_dict(), config.connector_type == "abstractor"
    release = {"transformers_version": _TRANSFORMERS_VERSION}
    flat = {
        **{key: value for key, value in config.to_diff_dict().items() if key not in _OURS},
        **(_qwen_fields(text) if config.is_owl21 else _llama_fields(text)),
        **release,
        **({} if has_abstractor else _DOCOWL),
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "vocab_size": config.output_vocab_size,
        "visual_config": _visual_config(config)
        if has_abstractor
        else _docowl_visual_config(config),
    }
    _check_nothing_lost(flat, config)
    return flat


_DOCOWL = {"architectures": ["MPLUGDocOwlLlamaForCausalLM"], "model_type": DOCOWL_MODEL_TYPE}


def _llama_fields(text: dict[str, Any]) -> dict[str, Any]:
    rope = text.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", "default")
    return {
        **{key: text[key] for key in _TEXT if key in text},
        "architectures": ["MPLUGOwl2LlamaForCausalLM"],
        "model_type": "mplug_owl2",
        "rope_scaling": None
        if rope_type == "default"
        else {"type": rope_type, "factor": rope.get("factor")},
        "rope_theta": rope.get("rope_theta", 10000.0),
    }


def _qwen_fields(text: dict[str, Any]) -> dict[str, Any]:
    ntk_length, log_n_length = text.get("rope_dynamic_ntk_length"), text.get("log_n_length")
    return {
        **{key: text[key] for key in _QWEN_TEXT if key in text},
        **QWEN_FIXED,
        "architectures": ["MPLUGOwl2QWenForCausalLM"],
        "attn_dropout_prob": text["attention_dropout"],
        "intermediate_size": 2 * text["intermediate_size"],
        "kv_channels": text["head_dim"],
        "layer_norm_epsilon": text["rms_norm_eps"],
        "model_type": "mplug_owl2_1",
        "no_bias": not text["mlp_bias"],
        "rotary_emb_base": (text.get("rope_parameters") or {}).get("rope_theta", 10000.0),
        "seq_length": ntk_length or log_n_length or text["max_position_embeddings"],
        "use_dynamic_ntk": ntk_length is not None,
        "use_logn_attn": log_n_length is not None,
    }


def _visual_config(config: MplugOwl2Config) -> dict[str, Any]:
    vision, abstractor = config.vision_config.to_dict(), config.connector_config.to_dict()
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
    vision, reducer = config.vision_config.to_dict(), config.connector_config.to_dict()
    return {
        "visual_model": _component(
            "mplug_owl_vision_model",
            {key: vision[key] for key in _VISION if key not in _FIXED_IN_DOCOWL},
        ),
        "visual_hreducer": _component(
            "mplug_docowl_hreducer",
            {
                **{key: reducer[key] for key in _H_REDUCER},
                "conv_shape": f"1x{reducer['kernel_width']}",
            },
        ),
    }


def _component(model_type: str, values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "model_type": model_type, "transformers_version": _TRANSFORMERS_VERSION}


def _parts(config: MplugOwl2Config) -> tuple[Any, Any, Any]:
    return config.text_config, config.vision_config, config.connector_config


def _check_nothing_lost(flat: dict[str, Any], config: MplugOwl2Config) -> None:
    """What comes back from the original's form must be what went in."""
    try:
        back = MplugOwl2Config.from_dict(json.loads(json.dumps(flat)))
    except (ValueError, StrictDataclassError) as error:
        reason = str(error.__cause__ or error)
        raise ConversionError(
            f"the original's code does not support this configuration: {reason}"
        ) from None
    pairs = zip((config, *_parts(config)), (back, *_parts(back)), strict=True)
    for ours, theirs in pairs:
        before, after = ours.to_dict(), theirs.to_dict()
        for key in type(ours).__dataclass_fields__:
            ignored = key in ("architectures", "dtype", "transformers_version") or key.endswith(
                "_config"
            )
            if not ignored and before.get(key) != after.get(key):
                raise ConversionError(
                    f"the original's code does not support {key} {before.get(key)!r}, only "
                    f"{after.get(key)!r}."
                )


def save_original_processor(processor: MplugOwl2Processor, vocabulary: Path, folder: Path) -> None:
    """The vocabulary and the settings of tokenizer and images, as the original's folders have them.

    Args:
        vocabulary: The tokenizer.model or qwen.tiktoken; a tokenizer.json where there is none.
    """
    if vocabulary.suffix == ".tiktoken":
        shutil.copyfile(vocabulary, folder / QWEN_VOCABULARY)
        settings = {"tokenizer_config.json": _qwen_tokenizer_config(processor)}
    else:
        shutil.copyfile(vocabulary, folder / f"tokenizer{vocabulary.suffix}")
        settings = _llama_tokenizer_configs(processor)
    # Upstream: DocOwl has no such file, its settings are in its code.
    if processor.image_processor.image_aspect_ratio != "anchors":
        settings["preprocessor_config.json"] = _preprocessor_config(processor)
    for name, values in settings.items():
        (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _qwen_tokenizer_config(processor: MplugOwl2Processor) -> dict[str, Any]:
    # Upstream: the class is in tokenization_qwen.py, which Qwen's folders contain.
    return {
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        "clean_up_tokenization_spaces": False,
        "model_max_length": processor.tokenizer.model_max_length,
        "tokenizer_class": "QWenTokenizer",
    }


def _llama_tokenizer_configs(processor: MplugOwl2Processor) -> dict[str, dict[str, Any]]:
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
    return {
        "tokenizer_config.json": tokenizer,
        "special_tokens_map.json": {**tokens, "pad_token": "<unk>"},
    }


def _preprocessor_config(processor: MplugOwl2Processor) -> dict[str, Any]:
    images = processor.image_processor
    side = images.size["height"]
    return {
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
