"""Generation: the inputs of each decoding step, and the limit of the context."""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compatibility_mplug_owl2 import (
    ImagesInGeneration,
    check_step,
    named_cache,
    rename_cache,
    take_chunk,
    takes_past_key_values,
    visual_tokens,
)
from .configuration_mplug_owl2 import MplugOwl2Config
from .outputs_mplug_owl2 import MplugOwl2ImageFeatures


def room_for_answer(config: MplugOwl2Config, num_prompt: int, max_new_tokens: int = 0) -> int:
    """Return how many tokens an answer to a prompt of `num_prompt` positions may have.

    Args:
        max_new_tokens: Number of tokens that must fit. 0 requires room for at least one.

    Raises:
        ValueError: If the context of the model is too short.
    """
    context = config.get_text_config().max_position_embeddings
    if num_prompt + max(max_new_tokens, 1) > context:
        asked = f" and max_new_tokens={max_new_tokens}" if max_new_tokens else ""
        mend = " or lower it" if max_new_tokens else ""
        raise ValueError(
            f"expected at most {context} tokens, the context of the model, got a prompt of "
            f"{num_prompt}{asked}; shorten the prompt (an image needs "
            f"{config.num_image_tokens}){mend}."
        )
    return context - num_prompt


class MplugOwl2Generation(ImagesInGeneration, GenerationMixin):
    """`generate` for prompts with images. A mixin of `MplugOwl2ForConditionalGeneration`."""

    config: MplugOwl2Config

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate an answer to each prompt.

        Differs from transformers: the modality indicators are computed once, from the prompt,
        before tokens are added to it.

        Raises:
            ValueError: If the prompt and the requested `max_new_tokens` are together longer than
                the context.
        """
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        prompts = [
            prompt for prompt in (input_ids, kwargs.get("inputs_embeds")) if prompt is not None
        ]
        if prompts:
            num_prompt = max(prompt.shape[1] for prompt in prompts)
            room_for_answer(self.config, num_prompt, kwargs.get("max_new_tokens") or 0)
        has_pictures = kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs")
        if has_pictures and input_ids is not None and kwargs.get("mm_token_type_ids") is None:
            kwargs["mm_token_type_ids"] = input_ids.eq(self.config.image_token_id).long()
        return super().generate(inputs, **rename_cache(kwargs))

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Generate for many prompts with continuous batching.

        Differs from transformers: only text prompts work, because continuous batching does not pass
        images.

        Raises:
            ValueError: If a prompt has image placeholders.
        """
        self._check_text_only(inputs)
        return super().generate_batch(inputs, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Start continuous batching.

        Differs from transformers: a request with image placeholders raises an error, as in
        `generate_batch`.
        """
        manager = super().init_continuous_batching(*args, **kwargs)
        add_request = manager.add_request

        def add_text_request(input_ids: list[int], *args: Any, **kwargs: Any) -> Any:
            self._check_text_only([input_ids])
            return add_request(input_ids, *args, **kwargs)

        manager.add_request = add_text_request
        return manager

    def _check_text_only(self, prompts: list[list[int]]) -> None:
        for index, prompt in enumerate(prompts):
            if self.config.image_token_id in list(prompt):
                raise ValueError(
                    f"prompt {index} has image placeholders (id {self.config.image_token_id}), "
                    "but continuous batching does not support images: use generate, which takes "
                    "batches."
                )

    def _prepare_generated_length(
        self, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> Any:
        """Complete the lengths of a generation config.

        Differs from transformers: an answer whose length nobody asked for ends with the context.
        """
        generation_config = super()._prepare_generated_length(generation_config, *args, **kwargs)
        num_ids, num_prompt = kwargs["input_ids_length"], kwargs["inputs_tensor"].shape[1]
        # max_length counts only ids, not the positions of inputs_embeds.
        room = self.config.get_text_config().max_position_embeddings - max(num_prompt - num_ids, 0)
        generation_config.max_length = min(generation_config.max_length, room)
        return generation_config

    @takes_past_key_values
    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare the inputs of one step.

        Differs from transformers: images and modality indicators are passed for the part of the
        prompt that this step reads.
        """
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **named_cache(cache),
            **kwargs,
        )
        is_prompt = (
            is_first_iteration or next_sequence_length is None or not kwargs.get("use_cache", True)
        )
        if isinstance(cache, DynamicCache) and cache.get_seq_length() == 0:
            is_prompt = True  # assisted decoding does not set is_first_iteration for its assistant
        if not is_prompt:
            check_step(model_inputs)
            # An answer is text, and the images are in the cache: decoding runs only the text
            # branch.
            return model_inputs
        ids = model_inputs.get("input_ids")
        num_new = (model_inputs["inputs_embeds"] if ids is None else ids).shape[1]
        past = 0 if cache is None else int(cache.get_seq_length())
        if mm_token_type_ids is not None:
            if mm_encoder_outputs and not is_first_iteration and cache is not None:
                tokens = visual_tokens(mm_encoder_outputs["image"])
                chunk = take_chunk(tokens, mm_token_type_ids, past, past + num_new)
                mm_encoder_outputs = (
                    None
                    if chunk is None
                    else {"image": MplugOwl2ImageFeatures(pooler_output=chunk)}
                )
            if mm_token_type_ids.shape[1] != num_new:
                # Candidate tokens of assisted decoding are text; transformers adds indicators only
                # for accepted ones.
                missing = past + num_new - mm_token_type_ids.shape[1]
                mm_token_type_ids = nn.functional.pad(mm_token_type_ids, (0, max(missing, 0)))
                mm_token_type_ids = mm_token_type_ids[:, past : past + num_new].contiguous()
            model_inputs["mm_token_type_ids"] = mm_token_type_ids
        if mm_encoder_outputs:
            model_inputs["mm_encoder_outputs"] = mm_encoder_outputs
        return model_inputs
