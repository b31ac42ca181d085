"""Prompts and pictures for mPLUG-Owl2: chat template, placeholders, modality indicators.

One `<|image|>` of a prompt becomes the positions of one picture: the learnable queries and the end-of-image vector.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

# Noncharacters of Unicode, which no text holds. The tokenizer's normaliser acts on them after control tokens are found:
# it deletes ESCAPE, so that "<" + ESCAPE + "s>" is the text "<s>" and never the control token; and a text that starts
# with NO_PREFIX gets no leading space. Offsets and assistant masks stay right, which transformers' own
# `sanitize_control_tokens` cannot give.
ESCAPE = "\ufdd0"
NO_PREFIX = "\ufdd1"

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- elif part.type == 'image' -%}
                {{- image_token | default('<|image|>') -}}
            {%- else -%}
                {{- raise_exception('A part must be text or image, got ' ~ part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- set content = render(message.content) -%}
    {%- if message.role == 'system' -%}
        {{- content ~ ' ' -}}
    {%- elif message.role == 'user' -%}
        {{- 'USER: ' ~ content ~ ' ' if content else 'USER:' -}}
    {%- elif message.role == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}
            {{- ' ' ~ content ~ eos_token -}}
        {%- endgeneration -%}
        {{- after_turn | default('') if not loop.last or add_generation_prompt -}}
    {%- else -%}
        {{- raise_exception('A role must be system, user or assistant, got ' ~ message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""


class MplugOwl2ProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": False}}


class MplugOwl2Processor(ProcessorMixin):
    """Tokenizer and image processor in one.

    In a raw prompt `<|image|>` stands for a picture and `<s>`, `</s>`, `<unk>` are control tokens. Inside the text of a chat
    message all of them are text; pictures are parts of their own. A video is a part with a list of frames, which take the
    place of one picture one after another.

    Args:
        num_image_tokens: Positions of one picture: the model's learnable queries and one.
        legacy: Every text between control tokens starts with a space of its own, as in checkpoints without the flag.
            `False`: not behind `<s>`, `</s>` and `<unk>`.

    Raises:
        ValueError: Pictures and placeholders do not match, or a picture cannot be used; the message says which.
    """

    valid_processor_kwargs = MplugOwl2ProcessorKwargs
    return_mm_token_type_ids = True

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        num_image_tokens: int = 65,
        image_token: str = "<|image|>",
        legacy: bool = True,
        **kwargs,
    ):
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.legacy = legacy
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer has no token {image_token!r}: add it with "
                f"tokenizer.add_special_tokens({{'image_token': {image_token!r}}}), or name another as image_token."
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mm_token_type_ids"]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.num_image_tokens

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if videos is not None:
            raise ValueError("Give a video as its frames: as pictures, or as a chat part of type 'video' with a list.")
        if isinstance(images, (list, tuple)) and not _leaves(images):
            images = None
        if isinstance(text, (list, tuple)) and not text:
            raise ValueError("No text came: give a prompt, or a list of at least one.")
        images, text, videos, audio = super().prepare_inputs_layout(
            images=images, text=text, videos=videos, audio=audio, **kwargs
        )
        if text is not None and not self.legacy:
            text = [self._without_prefixes(sample) if isinstance(sample, str) else sample for sample in text]
        return images, text, videos, audio

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs) -> None:
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if text is None or not isinstance(images, (list, tuple)) or not isinstance(images[0], (list, tuple)):
            return
        if len(images) != len(text):
            raise ValueError(f"Got lists of pictures for {len(images)} prompts, but {len(text)} prompts.")
        for index, (own, prompt) in enumerate(zip(images, text, strict=True)):
            if (expected := prompt.count(self.image_token)) != len(_leaves(own)):
                raise ValueError(
                    f"Prompt {index} of the batch has {expected} {self.image_token} but {len(_leaves(own))} pictures."
                )

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """As in transformers, with the text of every message taken as text, and lists of frames as `video` parts."""
        if not conversation:
            raise ValueError("The conversation is empty: give at least one message.")
        if kwargs.get("tokenize") and not self.legacy:
            kwargs["after_turn"] = NO_PREFIX  # a prompt that stays a string gets it when it is tokenized
        is_batch = not isinstance(conversation[0], dict) and not hasattr(conversation[0], "role")
        if is_batch:
            conversation = [[self._plain(message) for message in messages] for messages in conversation]
        else:
            conversation = [self._plain(message) for message in conversation]
        return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)

    def _plain(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its text escaped and its videos as pictures; the original stays as it is."""
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"A role must be 'system', 'user' or 'assistant', got {message.get('role')!r}.")
        content = message.get("content") or ""
        if isinstance(content, str):
            return {**message, "content": self._escape(content)}
        return {**message, "content": [part for one in content for part in self._plain_part(one)]}

    def _plain_part(self, part: dict[str, Any]) -> list[dict[str, Any]]:
        kind = part.get("type")
        if kind == "text":
            return [{**part, "text": self._escape(part["text"])}]
        if kind == "video":
            frames = part.get("video")
            if not isinstance(frames, (list, tuple)) or not frames:
                raise ValueError(f"A video must be a list of its frames, got {type(frames).__name__}.")
            return [{"type": "image", "image": frame} for frame in frames]
        if kind not in ("image", "image_url"):
            raise ValueError(f"A part must be of type 'text', 'image' or 'video', got {kind!r}.")
        # transformers looks for strings and images under these names; a path may be a Path.
        return [{key: str(value) if isinstance(value, Path) else value for key, value in part.items()}]

    def _escape(self, text: str) -> str:
        text = text.replace(ESCAPE, "").replace(NO_PREFIX, "")
        escaped = text
        for token in {self.image_token, *self.tokenizer.all_special_tokens}:
            escaped = escaped.replace(token, token[0] + ESCAPE + token[1:])
        if escaped != text and not self._drops_escapes():
            raise ValueError(
                "A message holds the name of a control token as text, which this tokenizer cannot keep apart: its "
                "normalizer must delete U+FDD0, as that of a converted checkpoint does."
            )
        return escaped

    def _drops_escapes(self) -> bool:
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        return normalizer is not None and ESCAPE not in normalizer.normalize_str(f"a{ESCAPE}b")

    def _without_prefixes(self, text: str) -> str:
        for token in (self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.unk_token):
            if token is not None:
                text = text.replace(token, token + NO_PREFIX).replace(token + NO_PREFIX * 2, token + NO_PREFIX)
        return text

    def _get_num_multimodal_tokens(self, image_sizes: Sequence | None = None, **kwargs) -> MultiModalData:
        """Placeholders and crops of each picture; its size does not matter."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)


def _leaves(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        return [leaf for image in images for leaf in _leaves(image)]
    return [images]


MplugOwl2Processor.register_for_auto_class("AutoProcessor")

__all__ = ["MplugOwl2Processor"]
