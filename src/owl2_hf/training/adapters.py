"""PEFT adapters: named sets of target modules, and loading that checks that an adapter fits.

Every preset is a regular expression that matches only layers of the language model. Plain names
("q_proj") and PEFT's "all-linear" work as well, but also match layers of the vision encoder and the
connector.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..conversion import load_non_lora
from ..modeling.adapters_mplug_owl2 import NON_LORA_FILE, read_adapter, read_settings
from ..modeling.adapters_mplug_owl2 import check_adapter as _check_adapter

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from .recipe import AdapterRecipe

_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_VISUAL_ATTENTION = ("visual_q_proj", "visual_k_proj", "visual_v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
# The connectors of both kinds of model; PEFT uses the one that exists.
_CONNECTORS = ["visual_abstractor", "h_reducer"]


@dataclass(frozen=True)
class LoraPreset:
    """The linear layers in each decoder layer that an adapter changes.

    Args:
        leaves: Names of the layers. Names that a model does not have are ignored; only mPLUG-Owl2.1
            has `visual_q_proj`.
        about: What it is for, and where it comes from.
    """

    leaves: tuple[str, ...]
    about: str

    @property
    def target_modules(self) -> str:
        """Return a regular expression for PEFT, which matches it against full module names."""
        return rf"(.*\.)?language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(self.leaves)})"


LORA_PRESETS: dict[str, LoraPreset] = {
    "language": LoraPreset(
        (*_TEXT_ATTENTION, *_MLP),
        "Every linear layer of LLaMA itself; visual tokens keep their own keys and values. LoRA's "
        "usual targets (QLoRA, section 4: adapters on all linear layers).",
    ),
    "visual-branch": LoraPreset(
        _VISUAL_ATTENTION,
        "What visual tokens have for themselves: their keys and values (mPLUG-Owl2, equations 3 "
        "and 4), in mPLUG-Owl2.1 their queries too. Text without images stays as it was.",
    ),
    "attention": LoraPreset(
        (*_TEXT_ATTENTION, *_VISUAL_ATTENTION),
        "All projections of self-attention, for both modalities (LoRA, section 4.2: attention "
        "weights alone).",
    ),
    "all-linear": LoraPreset(
        (*_TEXT_ATTENTION, *_VISUAL_ATTENTION, *_MLP),
        "Every linear layer of the decoder but the head, as the original's --lora_enable chooses "
        "them (mPLUG-Owl2, train.py, find_all_linear_names).",
    ),
    "q-align": LoraPreset(
        ("q_proj", "visual_v_proj"),
        "Queries and the values of visual tokens, as Q-Align and DeQA-Score fine-tune (q_proj and "
        "v_proj.multiway.1).",
    ),
}


def lora_config(
    preset: str = "language",
    *,
    r: int = 128,
    lora_alpha: int = 256,
    lora_dropout: float = 0.05,
    train_connector: bool = False,
    **kwargs: Any,
) -> "LoraConfig":
    """Return a PEFT `LoraConfig` for a model of this family.

    The defaults are those of finetune_lora.sh and train.py in the original code.

    Args:
        preset: A name in `LORA_PRESETS`.
        r: Rank of the adapter.
        lora_alpha: The update is scaled by `lora_alpha / r`.
        lora_dropout: Dropout probability of the adapter's input, in training.
        train_connector: Also train the connector. It is saved in full with the adapter.
        kwargs: More fields of `LoraConfig`, for instance `use_dora` or `use_rslora`.

    Raises:
        ValueError: If there is no such preset. `get_peft_model` also raises ValueError, if the
            model has none of the target modules.
    """
    from peft import LoraConfig

    if preset not in LORA_PRESETS:
        raise ValueError(f"Expected a LoRA preset of {', '.join(LORA_PRESETS)}, got {preset!r}.")
    if "target_modules" in kwargs:
        raise ValueError(
            "A preset sets target_modules: leave them out, or create your own peft.LoraConfig."
        )
    if train_connector:
        kwargs["modules_to_save"] = [*(kwargs.get("modules_to_save") or []), *_CONNECTORS]
    return LoraConfig(
        target_modules=LORA_PRESETS[preset].target_modules,
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        **{"task_type": "CAUSAL_LM", **kwargs},
    )


def add_adapter(model: nn.Module, adapter: "AdapterRecipe", is_quantized: bool) -> "PeftModel":
    """Add a new adapter to a model, as a recipe describes it.

    Args:
        is_quantized: bitsandbytes quantised the model: its other weights become float32.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    if is_quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, lora_config(**asdict(adapter)))


def load_adapter(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", **kwargs: Any
) -> "PeftModel":
    """Load an adapter as `PeftModel.from_pretrained` does, and check that all of it is loaded.

    Args:
        model: The base model, or a `PeftModel` to add an adapter to.
        folder: Folder with adapter_config.json and the adapter's weights. A converted fine-tune may
            also have non_lora_trainables.safetensors, which is loaded into the base model.
        kwargs: Arguments of `PeftModel.from_pretrained`, for example `is_trainable`.

    Raises:
        ValueError: If the adapter does not fit the model, or is in the original code's format.
    """
    from peft import PeftModel

    if read_settings(folder, {}) is None:
        raise ValueError(
            f"{folder} contains no adapter: expected a folder with adapter_config.json."
        )
    # Raises an error that names a broken file, which PEFT might not notice.
    read_adapter(folder, {})
    if (Path(folder) / NON_LORA_FILE).is_file():
        load_non_lora(model, folder)
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), adapter_name, **kwargs)
    else:
        model = PeftModel.from_pretrained(model, folder, adapter_name, **kwargs)
    check_adapter(model, folder, adapter_name)
    return model


def check_adapter(model: "PeftModel", folder: str | Path, adapter_name: str = "default") -> None:
    """Check that PEFT loaded all of the adapter in `folder`. PEFT itself only warns.

    Raises:
        ValueError: If the adapter has a tensor that the model lacks, or the model expects one that
            the adapter lacks.
    """
    _check_adapter(folder, model, adapter_name, read_adapter(folder, {}))
