"""Loading, distributing and saving: what this family adds to transformers.

Missing weights, unused weights and broken files raise an error. Quantisation does not change the
vision encoder and connector. An adapter that cannot be loaded in full raises an error.

This is one file because every way to load a model passes the same checks.
"""

import copy
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.generation import GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    logging,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from .adapters_mplug_owl2 import (
    check_adapter_keys,
    find_adapter,
    find_file,
    hub_kwargs,
    place_adapter,
    read_adapter,
    read_non_lora,
    read_settings,
    whole_dora_names,
)
from .compatibility_mplug_owl2 import AdapterMethods
from .configuration_mplug_owl2 import MplugOwl2Config

# This import also registers the original's layout with transformers.
from .conversion_mplug_owl2 import (
    owner_of,
)
from .cpu_kernels_mplug_owl2 import use_int8_kernel
from .weight_files_mplug_owl2 import check_archive, read_weight_map, read_weights

logger = logging.get_logger(__name__)

# Modules that quantisation skips by default: they are small compared with the decoder, and later
# layers cannot restore lost image details. The names are plain, with and without the prefix
# "model.", because vLLM compares the names in config.json literally, while transformers reads
# patterns.
_VISION_SIDE = ("vision_tower", "visual_abstractor", "h_reducer")
UNQUANTIZED = [*_VISION_SIDE, *(f"model.{name}" for name in _VISION_SIDE), "lm_head", "score"]

# Generation settings that the original's folders may have -> their types.
_GENERATION: dict[str, tuple[type, ...]] = {
    "bos_token_id": (int,),
    "eos_token_id": (int,),
    "pad_token_id": (int,),
    "max_length": (int,),
    "max_new_tokens": (int,),
    "do_sample": (bool,),
    "repetition_penalty": (int, float),
}
_SAMPLING: dict[str, tuple[type, ...]] = {
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
}

# Pattern of a name that the model lacks -> where such a tensor comes from.
_BELONGS_TO = {
    r"\blora_": "it belongs to an adapter, load that with load_adapter",
    r"^score\.": "it is the head of MplugOwl2ForSequenceClassification",
    r"\bhr_compressor\b": "it belongs to DocOwl2, which is not supported",
    r"\b(h_reducer|vision2text)\b": "it belongs to DocOwl 1.5's connector, but config.json has another connector",
    r"\bvisual_abstractor\b": "it belongs to a visual abstractor that config.json does not describe",
    r"\blayers\.\d+\.": "config.json has fewer layers, or layers without it",
    "": "it may be the head of another task, which needs another class",
}


class MplugOwl2LoadableModel(AdapterMethods, PreTrainedModel):
    """Base class that loads, distributes and saves the models of this family."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model from a folder or the Hub.

        Differs from transformers: checkpoints in the original's layout load as well. So do
        adapters, whose base model is loaded first. Quantisation does not change the vision encoder,
        the connector and the head, unless its configuration names other modules to skip.

        Raises:
            ValueError: If a weight file is broken, the checkpoint lacks parameters (transformers
                would initialise them at random), it has tensors that the model does not use, shapes
                differ from those of the configuration, or an adapter does not fit. A missing head
                is not an error. With `output_loading_info`, missing and unused tensors are reported
                there and are not errors.
        """
        adapter = find_adapter(pretrained_model_name_or_path, kwargs)
        if adapter is not None:
            kwargs.pop("adapter_kwargs", None)
            adapter_name = kwargs.pop("adapter_name", None)
            loaded = cls.from_pretrained(
                adapter.base, *args, output_loading_info=output_loading_info, **kwargs
            )
            model = loaded[0] if output_loading_info else loaded
            model.load_adapter(str(adapter.source), adapter_name, adapter_kwargs=adapter.hub)
            return loaded
        hub, settings = hub_kwargs(kwargs), None
        _check_index(pretrained_model_name_or_path, hub)
        is_original = _is_original(pretrained_model_name_or_path, hub)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = spare_vision_side(kwargs["quantization_config"])
        if is_original and kwargs.get("generation_config") is None:
            settings = _read_json(pretrained_model_name_or_path, GENERATION_CONFIG_NAME, hub)
            # A placeholder, which is completed when the configuration is loaded.
            kwargs["generation_config"] = GenerationConfig()
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except Exception as error:
            _check_files(pretrained_model_name_or_path, hub)
            if "ignore_mismatched_sizes" not in str(error):
                raise
            if is_original and (kwargs.get("tp_plan") or kwargs.get("distributed_config")):
                raise ValueError(
                    f"{pretrained_model_name_or_path} is in the original's layout, which tensor "
                    "parallelism does not support. Convert it with `owl2-hf convert`."
                ) from error
            raise ValueError(
                f"{pretrained_model_name_or_path}: the weights have other shapes than "
                "config.json describes, see the report above. Correct config.json. For "
                "mPLUG-Owl2.1, `owl2-hf convert` reads vocab_size from the weights."
            ) from error
        use_int8_kernel(model)
        is_told = (
            output_loading_info
            or pretrained_model_name_or_path is None
            or kwargs.get("state_dict") is not None
        )
        if not is_told:
            _check_keys(
                pretrained_model_name_or_path, model, info["missing_keys"], info["unexpected_keys"]
            )
        if settings is not None and model.can_generate():
            model.generation_config = _generation_config(
                model.config, settings, pretrained_model_name_or_path, hub
            )
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Put the tensors of weight files into a model.

        Differs from transformers: a record that claims to be longer than its file is an error
        before it is read.
        """
        for file in checkpoint_files or ():
            # transformers checks the header of safetensors
            if not str(file).endswith(".safetensors"):
                check_archive(Path(file))
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, *args, **kwargs
        )

    def load_adapter(
        self, peft_model_id: str | None = None, adapter_name: str | None = None, **kwargs: Any
    ) -> Any:
        """Load an adapter, and other weights that were trained with a converted adapter.

        Raises:
            ValueError: If the adapter has a tensor that the model lacks, or the model expects one
                that the adapter lacks. The adapter is then not added.
        """
        saved, others = kwargs.get("adapter_state_dict"), {}
        if peft_model_id is not None:
            hub = hub_kwargs({**kwargs, **(kwargs.get("adapter_kwargs") or {})})
            # raises an error for an adapter in the original's layout
            read_settings(peft_model_id, hub)
            if saved is None:
                saved = read_adapter(peft_model_id, hub, kwargs.get("use_safetensors"))
                kwargs["adapter_state_dict"] = whole_dora_names(saved)
            others = read_non_lora(peft_model_id, hub)
            check_adapter_keys(peft_model_id, [], others.keys() - self.state_dict().keys())
        before = {
            name: tensor.clone() for name, tensor in self.state_dict().items() if name in others
        }
        self.load_state_dict(others, strict=False)
        adapter_name = adapter_name or "default"
        is_new = adapter_name not in getattr(self, "peft_config", {})
        try:
            info = super().load_adapter(peft_model_id, adapter_name, **kwargs)
            place_adapter(peft_model_id, self, adapter_name, saved or {})
        except Exception as error:
            if is_new and adapter_name in getattr(self, "peft_config", {}):
                self.delete_adapter(adapter_name)
            self.load_state_dict(before, strict=False)
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(
                f"The adapter {peft_model_id} has tensors of other shapes than this model, see "
                "the report above. Load the model that it was trained on."
            ) from error
        if peft_model_id is not None:
            self._adapter_place = str(peft_model_id), hub  # to find a scorer's preset
        return info

    @classmethod
    def maybe_distribute_model(
        cls, model: "MplugOwl2LoadableModel", distributed_config: Any, mesh_manager: Any
    ) -> Any:
        """Distribute the model. Attention heads that do not divide evenly stay in each process."""
        text, size = (
            model.config.get_text_config(),
            getattr(distributed_config, "tp_size", None) or 1,
        )
        if text.num_attention_heads % size or text.num_key_value_heads % size:
            model._tp_plan = {
                rule: style for rule, style in model.tp_plan.items() if ".self_attn." not in rule
            }
            logger.warning_once(
                f"{text.num_attention_heads} attention and {text.num_key_value_heads} key-value "
                f"heads cannot be divided evenly among {size} tensor-parallel processes, so each "
                "process computes the whole attention. Choose a tp_size that divides both "
                "numbers to split it, too."
            )
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args: Any,
        save_original_format: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the model, by default in this package's layout, also if loaded from the original's.

        Raises:
            ValueError: If the original's layout is requested for a model without a head.
        """
        if save_original_format and not hasattr(self, self.base_model_prefix):
            raise ValueError(
                f"{type(self).__name__} has no language-model head, which the original's layout "
                "needs: save MplugOwl2ForConditionalGeneration, or leave save_original_format "
                "out."
            )
        if save_original_format:
            self._weight_conversions = (
                # so that transformers uses the whole mapping, not only the part that loading used
                None
            )
        super().save_pretrained(
            save_directory, *args, save_original_format=save_original_format, **kwargs
        )


def _is_original(source: str | Path | None, hub: dict[str, Any]) -> bool:
    return "visual_config" in _read_json(source, CONFIG_NAME, hub)


def _generation_config(
    config: MplugOwl2Config, given: dict[str, Any], source: str | Path | None, hub: dict[str, Any]
) -> GenerationConfig:
    """As a converted folder has it: mostly the ids that end and pad."""
    settings = original_generation_config(config, given)
    vocabulary = (
        find_file(source, "qwen.tiktoken", hub)
        if source is not None and config.is_owl21 and settings.eos_token_id is None
        else None
    )
    if vocabulary is not None:
        # Upstream: no configuration names the EOS token. Its id follows those of the vocabulary.
        pieces = vocabulary.read_bytes().split(b"\n")
        settings.eos_token_id = settings.pad_token_id = sum(1 for piece in pieces if piece.strip())
    return settings


def _read_json(source: str | Path | None, name: str, hub: dict[str, Any]) -> dict[str, Any]:
    """A file's settings; none where there is no such file, or nothing to read in it."""
    path = None if source is None else find_file(source, name, hub)
    if path is None:
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        logger.warning(f"{path} is not valid JSON ({error}) and is ignored.")
        return {}
    return values if isinstance(values, dict) else {}


def original_generation_config(config: MplugOwl2Config, given: dict[str, Any]) -> GenerationConfig:
    """How a model in the original's layout generates.

    Args:
        config: `MplugOwl2Config` of the model.
        given: Its generation_config.json, which is taken as far as it is known and sound:
            transformers refuses to save settings that have no effect.
    """
    text = config.text_config
    values: dict[str, Any] = {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        # Qwen has no padding token, and its id 0 is text.
        "pad_token_id": text.eos_token_id if config.is_owl21 else 0,
    }
    known = {**_GENERATION, **(_SAMPLING if given.get("do_sample") is True else {})}
    for name, kinds in known.items():
        if (value := given.get(name)) is not None and type(value) in kinds:
            values[name] = value
    ids = given.get("eos_token_id")
    if isinstance(ids, list) and ids and all(type(value) is int for value in ids):
        values["eos_token_id"] = ids
    return GenerationConfig(**values)


def spare_vision_side(
    quantization_config: QuantizationConfigMixin | dict[str, Any],
) -> QuantizationConfigMixin:
    """The same quantisation, with `UNQUANTIZED` where it says neither what it leaves alone nor what
    it takes.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    # torchao's FqnToConfig: "_default" applies to all modules that it does not name.
    taken = getattr(getattr(quantization_config, "quant_type", None), "fqn_to_config", {"_default"})
    if "_default" not in taken:
        return quantization_config
    for name in ("modules_to_not_convert", "llm_int8_skip_modules"):
        if getattr(quantization_config, name, "") is None:
            quantization_config = copy.copy(quantization_config)
            setattr(quantization_config, name, list(UNQUANTIZED))
    return quantization_config


def _check_index(source: str | Path | None, hub: dict[str, Any]) -> None:
    """Entries of a local index stay in its folder; transformers would follow them anywhere.

    Raises:
        ValueError: If one does not, or the index is none.
    """
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        path = Path(str(source)) / (hub.get("subfolder") or "") / name
        if not path.is_file():
            continue
        for entry in {str(value) for value in read_weight_map(path).values()}:
            if entry != Path(entry).name or "\\" in entry:
                raise ValueError(
                    f"{path} names {entry!r}: expected a weight file in the same folder."
                )


def _check_files(source: str | Path | None, hub: dict[str, Any]) -> None:
    """Look for a broken weight file, where loading has failed: the errors of its readers do not
    name it.

    Raises:
        ValueError: If there is one.
    """
    if source is None:
        return
    hub = {**hub, "local_files_only": True}
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if (path := find_file(source, name, hub)) is None:
            continue
        names = (
            {str(entry) for entry in read_weight_map(path).values()}
            if path.suffix == ".json"
            else {name}
        )
        for file in filter(None, (find_file(source, name, hub) for name in sorted(names))):
            read_weights(file)


def _check_keys(
    source: str | Path | None,
    model: PreTrainedModel,
    missing: Collection[str],
    unexpected: Collection[str],
) -> None:
    """Each parameter below the head is in the checkpoint, and each tensor of the checkpoint in the
    model.
    """
    is_base = not hasattr(model, model.base_model_prefix)
    lost = sorted(
        key for key in missing if is_base or key.startswith(f"{model.base_model_prefix}.")
    )
    kind = "mPLUG-Owl2.1" if model.config.is_owl21 else "mPLUG-Owl2"
    for key in sorted(unexpected):
        owner = owner_of(key)
        if lost and owner not in (None, kind):
            raise ValueError(
                f"{source} has weights of {owner} (such as {key!r}), but its config.json is for "
                f"{kind}: correct config.json."
            )
    if lost and model.config.is_owl21 and getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{source} lacks {len(lost)} parameters of this model, the first is {lost[0]}: "
            "mPLUG-Owl2.1 in the original's layout cannot be quantised while loading. Convert "
            "it with `owl2-hf convert`."
        )
    if lost:
        raise ValueError(
            f"{source} lacks {len(lost)} parameters of this model, the first is {lost[0]}: the "
            "checkpoint is incomplete, or its configuration does not match."
        )
    if unexpected:
        first = min(unexpected)
        raise ValueError(
            f"{source} has {len(unexpected)} tensors that {type(model).__name__} does not have, "
            f"the first is {first!r}: {_what_it_may_be(first)}. To load the model without them, "
            "pass output_loading_info=True."
        )


def _what_it_may_be(key: str) -> str:
    return next(words for pattern, words in _BELONGS_TO.items() if re.search(pattern, key))
