"""Differences between the supported releases of transformers, 5.17 to 5.24 and later.

The other files are written for the newest release. Where an older one differs, they take the name
from here. Each difference names the release that made it, and is found by looking for the feature,
never by comparing version numbers. The processor, whose files import nothing of the model's, has
one of its own: `MASKS_FOLLOW_IMAGES`.

The second half guards against the next release: what a model is called with and does not know is
never swallowed.

B: batch, L: positions, N: images of the whole batch, Q + 1: visual tokens of one image, D: width.

This is one file because all differences between releases belong together.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import parse
from torch import Tensor
from transformers import masking_utils, modeling_outputs
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.integrations import peft
from transformers.utils import TransformersKwargs, logging

logger = logging.get_logger(__name__)

# Oldest and newest release of transformers that the tests passed with.
TESTED = ("5.17.0", "5.24.0")

# 5.24 calls the cache of keys and values `cache`, in arguments and in outputs; before that it was `past_key_values`.
IS_CACHE_RENAMED = "cache" in inspect.signature(masking_utils.create_causal_mask).parameters
CACHE = "cache" if IS_CACHE_RENAMED else "past_key_values"
TWO_CACHES = "Pass cache or past_key_values, not both: they are two names of the same argument."


def named_cache(cache: Cache | None) -> dict[str, Cache | None]:
    """The cache as the keyword argument that this release of transformers knows."""
    return {CACHE: cache}


def rename_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a method of transformers, with the cache under the name that this
    release knows.

    Raises:
        ValueError: If it was given under both names.
    """
    if kwargs.get("cache") is not None and kwargs.get("past_key_values") is not None:
        raise ValueError(TWO_CACHES)
    names = dict.fromkeys(("cache", "past_key_values"), CACHE)
    return {names.get(name, name): value for name, value in kwargs.items()}


def takes_past_key_values(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of `forward`: `past_key_values`, the name of the cache before 5.24, is taken as
    `cache`.

    Raises:
        ValueError: If both names were given.
    """

    @functools.wraps(forward)
    def renamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (past := kwargs.pop("past_key_values", None)) is not None:
            if kwargs.get("cache") is not None:
                raise ValueError(TWO_CACHES)
            kwargs["cache"] = past
        return forward(self, *args, **kwargs)

    # `generate` reads the names of arguments from this signature.
    signature = inspect.signature(forward)
    parameters = [
        p.replace(name=CACHE) if p.name == "cache" else p for p in signature.parameters.values()
    ]
    renamed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return renamed


def create_causal_mask(*, cache: Cache | None, **kwargs: Any) -> Any:
    """`transformers.masking_utils.create_causal_mask` of 5.24.

    Before 5.24 continuous batching hands over masks that are ready, and its paged cache is none
    that masks know.
    """
    if not IS_CACHE_RENAMED and not isinstance(cache, Cache):
        cache = None
    return masking_utils.create_causal_mask(**kwargs, **named_cache(cache))


def update_cache(
    cache: Any, key: Tensor, value: Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Add the keys and values of a layer to the cache.

    Before 5.24 the paged cache of continuous batching is updated by the attention function, which
    finds it in `kwargs`.

    Args:
        key, value: (B, heads, L, head_dim).
        kwargs: Arguments of the attention function; changed in place for a paged cache.

    Returns:
        Keys and values of all positions, (B, heads, past + L, head_dim).
    """
    if isinstance(cache, Cache):
        return cache.update(key, value, layer_idx)
    if IS_CACHE_RENAMED:
        return cache.update(key, value, layer_idx, kwargs=kwargs)
    kwargs["cache"] = cache
    return key, value


if IS_CACHE_RENAMED or TYPE_CHECKING:
    BaseModelOutputWithPast = modeling_outputs.BaseModelOutputWithPast
    CausalLMOutputWithPast = modeling_outputs.CausalLMOutputWithPast
    SequenceClassifierOutputWithPast = modeling_outputs.SequenceClassifierOutputWithPast
else:

    def _past_key_values(self: modeling_outputs.ModelOutput) -> Cache | None:
        return self.past_key_values

    @dataclass
    class BaseModelOutputWithPast(modeling_outputs.BaseModelOutputWithPast):
        """Args: as in transformers. The cache is also available as `cache`."""

        cache = property(_past_key_values)

    @dataclass
    class CausalLMOutputWithPast(modeling_outputs.CausalLMOutputWithPast):
        """Args: as in transformers. The cache is also available as `cache`."""

        cache = property(_past_key_values)

    @dataclass
    class SequenceClassifierOutputWithPast(modeling_outputs.SequenceClassifierOutputWithPast):
        """Args: as in transformers. The cache is also available as `cache`."""

        cache = property(_past_key_values)


# 5.20 builds the parts of a composed configuration from `sub_configs_defaults`.
if TYPE_CHECKING or hasattr(transformers.configuration_utils, "SubConfigSpec"):
    ComposedConfig = PreTrainedConfig
    SubConfigSpec = transformers.configuration_utils.SubConfigSpec
else:

    @dataclass
    class SubConfigSpec:
        """Args: config_class: class of the part. optional: it may be `None`."""

        config_class: type[PreTrainedConfig]
        optional: bool = False

    class ComposedConfig(PreTrainedConfig):
        """A configuration whose parts `sub_configs_defaults` describes, as from 5.20 on."""

        def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None:
            specs = cls.sub_configs_defaults
            cls.sub_configs = {name: spec.config_class for name, spec in specs.items()}
            super().__init_subclass__(*args, **kwargs)

        def __post_init__(self, **kwargs: Any) -> None:
            for name, spec in self.sub_configs_defaults.items():
                given = getattr(self, name)
                if not isinstance(given, PreTrainedConfig) and not (
                    given is None and spec.optional
                ):
                    setattr(self, name, spec.config_class(**(given or {})))
            super().__post_init__(**kwargs)


# 5.24 asks for PEFT 0.22, but calls nothing of it that PEFT 0.20 lacks: the code is that of 5.23, which asked for 0.20.
OLDEST_PEFT = "0.20.0"


class AdapterMethods:
    """The adapter methods of transformers, with PEFT from `OLDEST_PEFT` on."""


def _with_released_peft(name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(peft.PeftAdapterMixin, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = peft.MIN_PEFT_VERSION
        peft.MIN_PEFT_VERSION = min(asked, OLDEST_PEFT, key=parse)
        try:
            return getattr(super(AdapterMethods, self), name)(*args, **kwargs)
        finally:
            peft.MIN_PEFT_VERSION = asked

    return method


for _name in (
    "load_adapter",
    "add_adapter",
    "set_adapter",
    "disable_adapters",
    "enable_adapters",
    "active_adapters",
    "get_adapter_state_dict",
    "delete_adapter",
):
    setattr(AdapterMethods, _name, _with_released_peft(_name))


class ImagesInGeneration(GenerationMixin):
    """`generate` that encodes the images of a prompt once and gives each part of the prompt its
    own.

    5.18 encodes them before the first step, 5.23 also cuts them up for chunked prefill. Before that
    it is done here.
    """

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Repeat each prompt `expand_size` times, with its images."""
        if not hasattr(GenerationMixin, "_expand_multimodal_outputs"):
            encoded = model_kwargs.pop("mm_encoder_outputs", None) or {}
            if (pixel_values := model_kwargs.pop("pixel_values", None)) is not None:
                encoded = {"image": self.get_image_features(pixel_values, return_dict=True)}
            if encoded:
                model_kwargs["mm_encoder_outputs"] = encoded
            if (
                encoded
                and expand_size > 1
                and (indicators := model_kwargs.get("mm_token_type_ids")) is not None
            ):
                encoded["image"].pooler_output = _expand(
                    encoded["image"].pooler_output, indicators, expand_size
                )
        return super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )


def _expand(features: Tensor, mm_token_type_ids: Tensor, expand_size: int) -> Tensor:
    """(N, Q + 1, D) features of the images -> (N * expand_size, Q + 1, D), a prompt's images behind
    each other.
    """
    features = torch.stack(list(features))
    counts = (mm_token_type_ids.sum(-1) // features.shape[1]).tolist()  # images of each prompt
    if sum(counts) != len(features):
        return features  # the model then raises an error with the numbers
    return torch.cat([images.repeat(expand_size, 1, 1) for images in features.split(counts)])


def visual_tokens(image_outputs: Any) -> Tensor:
    """Output of `get_image_features`, one tensor or one for each image -> (N * (Q + 1), D)."""
    features = image_outputs.pooler_output
    return features.flatten(0, 1) if isinstance(features, Tensor) else torch.cat(list(features))


def take_chunk(tokens: Tensor, mm_token_type_ids: Tensor, start: int, end: int) -> Tensor | None:
    """The visual tokens of a part of the prompt; for chunked prefill before 5.23, which hands over
    all of them.

    Args:
        tokens: (N * (Q + 1), D) of the whole prompt.
        mm_token_type_ids: (B, L) modality indicators of the whole prompt.
        start, end: The positions of the part.

    Returns:
        (1, V, D) for the V visual tokens of the part, `None` if it has none.

    Raises:
        ValueError: If the tokens are not those of the whole prompt, so that nothing tells which are
            the part's.
    """
    is_visual = mm_token_type_ids.bool()
    if int(is_visual.sum()) != len(tokens):
        raise ValueError(
            f"Chunked prefill has {len(tokens)} visual tokens for {int(is_visual.sum())} positions "
            "of the whole conversation. This release of transformers cannot continue a "
            "conversation with images in chunks: leave prefill_chunk_size out, or install "
            "transformers 5.23 or newer."
        )
    # (B, L), which token stands at a visual position.
    rows = is_visual.flatten().cumsum(0).view_as(is_visual) - 1
    rows = rows[:, start:end][is_visual[:, start:end]]
    return tokens[rows].unsqueeze(0) if len(rows) else None


# The guard. Arguments that transformers itself passes to attention functions, losses and output
# recording.
_PASSED_DOWN = frozenset(TransformersKwargs.__annotations__) | {
    "return_dict",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "shift_labels",  # Trainer, with sequence parallelism
    "debug_io",
    "debug_io_dir",
    "prune_layers",
}


def known_arguments(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of `forward`: nothing that the model does not know is swallowed.

    `past_key_values`, the name of the cache before transformers 5.24, is taken as `cache`; from
    5.24 on with a warning, as by transformers' own models. Of all other arguments that `forward`
    does not name:

    - what transformers passes down is passed on (`TransformersKwargs`, flash attention's
      arguments);
    - `None` is left out;
    - a cache or a tensor is an error: the answer would have depended on it;
    - anything else is ignored with one warning.

    With a paged cache everything passes: continuous batching has arguments of its own for its
    attention functions.
    """
    known = frozenset(inspect.signature(forward).parameters) | _PASSED_DOWN

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache")
        if cache is None or isinstance(cache, Cache):
            for name in [name for name in kwargs if name not in known]:
                _refuse_unknown(type(self).__name__, name, kwargs.pop(name))
        return forward(self, *args, **kwargs)

    taken = takes_past_key_values(checked)
    if not IS_CACHE_RENAMED:
        return taken

    @functools.wraps(taken)
    def warned(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None and not torch.compiler.is_compiling():
            message = f"`past_key_values` is deprecated for `{type(self).__name__}.forward`. Use `cache` instead."
            warnings.warn(message, FutureWarning, stacklevel=2)
        return taken(self, *args, **kwargs)

    return warned


def _refuse_unknown(model: str, name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, (Cache, Tensor)):
        if not torch.compiler.is_compiling():
            logger.warning_once(f"{model} ignores the unknown argument {name!r}.")
        return
    kind = "cache" if isinstance(value, Cache) else "tensor"
    raise ValueError(
        f"{model} got the unknown argument {name!r}, a {kind}; ignoring it would give a wrong "
        f"answer. If you did not pass it, transformers {transformers.__version__} did. Install a "
        f"tested transformers, {TESTED[0]} to {TESTED[1]}, or a newer owl2_hf."
    )


def check_step(model_inputs: dict[str, Any]) -> None:
    """A decoding step reads one token, so without a cache it would read nothing else.

    Raises:
        ValueError: If there is no cache.
    """
    if model_inputs.get(CACHE) is None:
        raise ValueError(
            f"generate reached a decoding step without a {CACHE}: transformers "
            f"{transformers.__version__} did not pass it. Install a tested transformers, "
            f"{TESTED[0]} to {TESTED[1]}, or a newer owl2_hf."
        )


def check_positions(attention_mask: Any, num_new: int, cache: Any) -> None:
    """A mask that covers more positions than there are means that a cache was lost on the way.

    The lengths are shapes, so nothing waits for the device. A static cache knows its length on the
    device alone; its 2-D masks are not looked at.

    Args:
        attention_mask: (B, past + L); masks of another form are ready to use and not looked at.
        num_new: L, the positions of this step.

    Raises:
        ValueError: If the mask covers more than past + L positions.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return
    past = 0
    if cache is not None:
        if not isinstance(cache, Cache) or cache.is_compileable:
            return
        past = cache.get_seq_length()
    if attention_mask.shape[1] > past + num_new:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} positions, but there are {past} in "
            f"the cache and {num_new} new ones: expected at most {past + num_new}. If you passed "
            f"a cache, transformers {transformers.__version__} did not pass it on (tested: "
            f"{TESTED[0]} to {TESTED[1]})."
        )
