"""Components of the model: which ones train, at which learning rate, and a table of them.

Sources: mPLUG-Owl2 (arXiv:2311.04257) for the two stages; BEiT (arXiv:2106.08254) for layer-wise
decay of the learning rate.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Component -> pattern in the names of its parameters; the first match counts.
COMPONENTS: dict[str, str] = {
    "adapters": r"\.lora_|\.(ia3|hada|lokr|oft|boft|vera)_|\.trainable_tokens_",
    "vision_tower": r"\bvision_tower\.",
    "connector": r"\b(visual_abstractor|h_reducer)\.",
    "visual_branch": r"\blanguage_model\.layers\.\d+\..*\bvisual_",
    "embeddings": r"\blanguage_model\.embed_tokens\.",
    "lm_head": r"\blm_head\.",
    "language_model": r"\blanguage_model\.",
}
_ALL = tuple(COMPONENTS)[1:]
# PEFT's copy of a module that trains completely, and the unused original.
_COPY, _ORIGINAL = ".modules_to_save.", ".original_module."
# What trains, besides adapters, which always train.
TRAINABLE: dict[str, tuple[str, ...]] = {
    # Stage 1 of the paper: everything that sees images.
    "pretrain": ("vision_tower", "connector", "visual_branch"),
    # Stage 2 of the paper.
    "instruct": _ALL,
    # scripts/finetune.sh of the original: all but the vision encoder.
    "frozen-vision": tuple(name for name in _ALL if name != "vision_tower"),
    "visual-branch": ("connector", "visual_branch"),
    "connector": ("connector",),
    # LoRA: nothing of the model itself.
    "adapters": (),
}


def component_of(name: str) -> str:
    """The component that a parameter of this name belongs to; `other` for one of no model of the
    family.
    """
    return next((part for part, pattern in COMPONENTS.items() if re.search(pattern, name)), "other")


def freeze_all_but(model: nn.Module, trains: str | Sequence[str]) -> None:
    """Let a preset's components train, and adapters, and freeze the rest.

    Args:
        trains: A name in `TRAINABLE`, or names in `COMPONENTS`.

    Raises:
        ValueError: If there is no such preset or component, or the model has no parameter of it.
    """
    wanted = _components(trains)
    found: set[str] = set()
    for name, parameter in model.named_parameters():
        part = component_of(name)
        found.add(part)
        if part != "adapters" and _COPY not in name:
            # Quantised weights are integers: they cannot train.
            is_wanted = part in wanted and _ORIGINAL not in name
            parameter.requires_grad_(is_wanted and parameter.is_floating_point())
    # A preset of all parts may name parts that the model lacks; other presets may not.
    optional = (
        {"embeddings", "lm_head", "visual_branch"} if set(wanted) >= {"language_model"} else set()
    )
    if missing := [part for part in wanted if part not in found | optional]:
        raise ValueError(
            f"trains={trains!r} names {', '.join(missing)}, but this model has no such parameters."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"trains={trains!r} trains no parameter: add an adapter, or choose other parts of "
            f"{', '.join(_ALL)}."
        )


def _components(trains: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(trains, str):
        if trains not in TRAINABLE:
            raise ValueError(
                f"expected trains to be one of {', '.join(TRAINABLE)}, or parts, got {trains!r}."
            )
        return TRAINABLE[trains]
    if unknown := [part for part in trains if part not in _ALL]:
        raise ValueError(
            f"expected parts of {', '.join(_ALL)} to train, got {', '.join(map(repr, unknown))}."
        )
    return tuple(trains)


@dataclass(frozen=True)
class Parameters:
    """Parameters of one component: how many train, how many do not, and the learning rates of the
    former.
    """

    component: str
    trainable: int
    frozen: int
    learning_rates: tuple[float, ...] = ()


def count_parameters(
    model: nn.Module, groups: Iterable[Mapping[str, Any]] = ()
) -> list[Parameters]:
    """The components of a model with their parameters; a module that trains as PEFT's copy counts
    once, as the copy.

    Args:
        groups: Of an optimizer, for the learning rates that really apply.
    """
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    trainable, frozen = (
        dict.fromkeys([*COMPONENTS, "other"], 0),
        dict.fromkeys([*COMPONENTS, "other"], 0),
    )
    used: dict[str, set[float]] = {}
    named = dict(model.named_parameters())
    copied = {name.partition(_COPY)[0] for name in named if _COPY in name}
    for name, parameter in named.items():
        if _ORIGINAL in name and name.partition(_ORIGINAL)[0] in copied:
            continue
        part = component_of(name)
        count = trainable if parameter.requires_grad else frozen
        count[part] += _num_elements(parameter)
        if id(parameter) in rates and parameter.requires_grad:
            used.setdefault(part, set()).add(rates[id(parameter)])
    return [
        Parameters(part, trainable[part], frozen[part], tuple(sorted(used.get(part, ()))))
        for part in trainable
        if trainable[part] or frozen[part]
    ]


def _num_elements(parameter: Tensor) -> int:
    """Values of a parameter; 4-bit weights hold two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def format_table(rows: Sequence[Parameters]) -> str:
    """The table as text."""
    total = Parameters("total", sum(row.trainable for row in rows), sum(row.frozen for row in rows))
    lines = [f"{'component':16}{'trainable':>16}{'frozen':>16}  learning rate"]
    for row in [*rows, total]:
        rates = row.learning_rates
        shown = (
            ""
            if not rates
            else f"{rates[0]:.3g}"
            if len(rates) == 1
            else f"{rates[0]:.3g} to {rates[-1]:.3g}"
        )
        lines.append(f"{row.component:16}{row.trainable:>16,}{row.frozen:>16,}  {shown}".rstrip())
    share = total.trainable / max(total.trainable + total.frozen, 1)
    return "\n".join([*lines, f"{share:.2%} of the parameters train"])


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    learning_rates: Mapping[str, float],
    vision_layer_decay: float | None,
    weight_decay: float,
    decayed: Iterable[str],
) -> list[dict[str, Any]]:
    """Groups for an optimizer, one for each component, learning rate and weight decay.

    Args:
        learning_rate: Of all components but those in
        learning_rates: component -> its own.
        vision_layer_decay: The vision encoder's layer i of L trains with its rate times `decay **
            (L - i)`, i from 0, its embeddings with `decay ** (L + 1)`.
        decayed: Names of the parameters that weight decay applies to.

    Raises:
        ValueError: If a component with a learning rate of its own has no parameter that trains.
    """
    names = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    parts = {component_of(name) for name in names}
    if idle := [part for part in learning_rates if part not in parts]:
        raise ValueError(
            f"learning_rates names {', '.join(idle)}, which does not train: expected some of "
            f"{', '.join(sorted(parts))}."
        )
    num_layers = 1 + max(
        (_layer(name) or 0 for name in names if component_of(name) == "vision_tower"), default=-1
    )
    with_decay = set(decayed)
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, parameter in names.items():
        part = component_of(name)
        rate = learning_rates.get(part, learning_rate)
        if part == "vision_tower" and vision_layer_decay is not None:
            rate *= vision_layer_decay ** _depth_from_top(name, num_layers)
        key = (part, rate, weight_decay if name in with_decay else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "component": part}
        for (part, rate, decay), parameters in groups.items()
    ]


def _layer(name: str) -> int | None:
    match = re.search(r"\blayers\.(\d+)\.", name)
    return None if match is None else int(match.group(1))


def _depth_from_top(name: str, num_layers: int) -> int:
    """0 behind the last layer, 1 in it, and so on; L + 1 in the embeddings."""
    if (layer := _layer(name)) is not None:
        return num_layers - layer
    return num_layers + 1 if "embeddings." in name else 0
