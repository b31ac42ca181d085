"""Processor of mPLUG-Owl2: chat template, image placeholders, modality indicators.

Each `<|image|>` in a prompt is replaced with the positions of one image: the learnable queries and
the end-of-image vector. For DocOwl 1.5, which cuts images into crops, it is replaced with the name
and the positions of each crop.

This is one file because the Hub finds a processor by its file name.
"""

import bisect
import dataclasses
import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.image_processing_base import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import (
    MultiModalData,
    ProcessingKwargs,
    ProcessorMixin,
    TextKwargs,
    Unpack,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, cached_file, logging

from .image_processing_mplug_owl2 import MplugOwl2ImageProcessor, flatten_images, is_many
from .tokenization_mplug_owl2 import ESCAPE, NO_PREFIX, TOKENIZER_FILES, load_tokenizer, read_json

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
{{- bos_token -}}
{%- for message in messages -%}
    {%- set content = render(message.content) -%}
    {%- if message.role == 'system' -%}
        {{- content ~ ' ' if content -}}
    {%- elif message.role == 'user' -%}
        {{- 'USER: ' ~ content ~ ' ' if content else 'USER:' -}}
    {%- elif message.role == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}
            {{- ' ' ~ content ~ eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- raise_exception('A role must be system, user or assistant, got ' ~ message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""
logger = logging.get_logger(__name__)

# Options of `from_pretrained` that say where the files are and how to read them.
_LOADING_OPTIONS = (
    "backend",
    "code_revision",
    "proxies",
    "subfolder",
    "torch_dtype",
    "dtype",
    "trust_remote_code",
    "use_fast",
)
# transformers 5.20 moves the masks of answers past the placeholders of the images in front of them.
MASKS_FOLLOW_IMAGES = "placeholder_ends" in inspect.getsource(ProcessorMixin)
# For tokenizers that add no BOS token to a text, even if they have one.
PLAIN_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("{{- bos_token -}}\n", "")
# Upstream: mPLUG-Owl2.1 joins turns by the same characters, which are text to its tokenizer.
QWEN_CHAT_TEMPLATE = PLAIN_CHAT_TEMPLATE.replace("eos_token", "'</s>'")


class Decoded(str):
    """Text of a prompt and its answer. What is cut off behind `ASSISTANT:` is an `Answer`."""

    def __getitem__(self, key: Any) -> Any:
        text = super().__getitem__(key)
        is_answer = (
            isinstance(key, slice)
            and text.startswith(" ")
            and str(self)[: key.start].endswith("ASSISTANT:")
        )
        return Answer(text[1:]) if is_answer else text

    def __reduce__(self) -> Any:
        return str, (str(self),)


class Answer(Decoded):
    """An answer without the space in front, which it has again where a raw prompt is put in front
    of it.
    """

    def __radd__(self, prompt: Any) -> Any:
        return f"{prompt} {self}" if prompt.endswith("ASSISTANT:") else f"{prompt}{self}"


class MplugOwl2Processor(ProcessorMixin):
    """Processor of mPLUG-Owl2: a tokenizer and an image processor.

    In a raw prompt, `<|image|>` stands for an image, and `<s>`, `</s>` and `<unk>` are control
    tokens. In the text of a chat message, all of them are plain text, and images are separate
    parts. A video is a part with a list of frames, which are inserted in order where one image
    would go.

    Args:
        num_image_tokens: Positions of one image, or of one crop: the number of visual tokens that
            the connector makes.
        legacy: Put a space in front of every text between control tokens, as for checkpoints
            without this flag. `False`: no space after `<s>`, `</s>` and `<unk>`.

    Raises:
        ValueError: If images and placeholders do not match, or an image cannot be used. The message
            says which.
    """

    return_mm_token_type_ids = True

    def __init__(
        self,
        image_processor: MplugOwl2ImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | dict[str, str] | None = None,
        num_image_tokens: int = 65,
        image_token: str = "<|image|>",
        legacy: bool = True,
        **kwargs: Any,
    ):
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.legacy = legacy
        if tokenizer is None:
            raise ValueError("expected a tokenizer, got none: a processor needs its tokenizer.")
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer has no token {image_token!r}: add it with "
                f"tokenizer.add_special_tokens({{'image_token': {image_token!r}}}), or set "
                "image_token to a token that it has."
            )
        super().__init__(
            image_processor,
            tokenizer,
            chat_template=chat_template or _default_template(tokenizer),
            **kwargs,
        )
        self.auto_map = {
            "AutoProcessor": f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        }
        if not legacy and not self._drops_noncharacters():
            raise ValueError(
                "legacy=False needs a tokenizer whose normalizer deletes U+FDD0 and U+FDD1; "
                "this one does not. Use the tokenizer of a converted checkpoint."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a processor from a folder or the Hub.

        Differs from transformers: a checkpoint in the original's layout, which has no processor
        files, works as well.

        Unknown options are ignored with a warning.
        """
        folder = _original_folder(pretrained_model_name_or_path, kwargs)
        # The tokenizer would pass it to the configuration, which has no such field.
        num_image_tokens = kwargs.pop("num_image_tokens", None)
        if folder is not None:
            processor = cls.from_original(folder, num_image_tokens=num_image_tokens)
        else:
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            processor.num_image_tokens = num_image_tokens or processor.num_image_tokens
        parts = (processor, processor.image_processor, processor.tokenizer)
        known = (*_LOADING_OPTIONS, *inspect.signature(super().from_pretrained).parameters)
        for name in kwargs.keys() - set(known):
            if not name.startswith("_") and not any(hasattr(part, name) for part in parts):
                logger.warning(
                    f"{cls.__name__}.from_pretrained ignores the unknown option {name!r}."
                )
        return processor

    @classmethod
    def from_original(
        cls,
        source: str | Path,
        tokenizer: str | Path | None = None,
        num_image_tokens: int | None = None,
        image_size: int | None = None,
        num_text_tokens: int | None = None,
        added_tokens: Sequence[str] = (),
    ) -> "MplugOwl2Processor":
        """Make the processor of a checkpoint in the original's layout.

        Args:
            source: Folder of the checkpoint, with config.json and, optionally,
                preprocessor_config.json.
            tokenizer: File or folder to read the tokenizer from. Default: `source`.
            num_image_tokens, image_size: Positions of an image, and its side in pixels. Default:
                read from config.json.
            num_text_tokens: Rows of the embedding weights, if config.json may not give them
                (mPLUG-Owl2.1).
            added_tokens: Tokens after LLaMA's that the weights have rows for, if there is no
                added_tokens.json.

        Raises:
            ValueError: If there is no tokenizer, or it is neither a LLaMA nor a Qwen tokenizer.
        """
        source = Path(source)
        values, settings = (
            read_json(source / CONFIG_NAME),
            read_json(source / "preprocessor_config.json"),
        )
        legacy = read_json(source / "tokenizer_config.json").get("legacy")
        num_text_tokens = num_text_tokens or values.get("vocab_size")
        loaded, legacy = load_tokenizer(tokenizer or source, legacy, num_text_tokens, added_tokens)
        visual_config = values.get("visual_config", {})
        vision = visual_config.get("visual_model", {})
        side = image_size or vision.get("image_size", 448)
        if (reducer := visual_config.get("visual_hreducer")) is not None:
            mode = "anchors"
            kernel_width = int(str(reducer.get("conv_shape", "1x4")).rpartition("x")[2])
            num_queries = (side // vision.get("patch_size", 14)) ** 2 // kernel_width
        else:
            # Training writes how images became square into the model's configuration.
            mode = "pad" if values.get("image_aspect_ratio") == "pad" else "resize"
            num_queries = visual_config.get("visual_abstractor", {}).get(
                "num_learnable_queries", 64
            )
        names = ("image_mean", "image_std", "resample")
        kept: dict[str, Any] = {name: settings[name] for name in names if name in settings}
        _check_preprocessing(source / "preprocessor_config.json", kept)
        image_processor = MplugOwl2ImageProcessor(
            size={"height": side, "width": side}, image_aspect_ratio=mode, **kept
        )
        template = CHAT_TEMPLATE if loaded.eos_token == "</s>" else QWEN_CHAT_TEMPLATE
        num_image_tokens = num_image_tokens or num_queries + 1
        return cls(
            image_processor, loaded, template, num_image_tokens=num_image_tokens, legacy=legacy
        )

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mm_token_type_ids"]

    @property
    def unused_input_names(self) -> list[str]:
        return ["crop_grid"]

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """Prompts (B) and their images (N) -> the model's inputs.

        Args:
            images: One image, a flat list for all prompts in order, or a list for each prompt.
            text: One prompt or several, with one `<|image|>` for each image, whatever crops it is
                cut into. `<s>` in front, as chat templates write it, is the one that the tokenizer
                would write. Without special tokens a text that begins with a space goes on where
                another ended, and gets no further space in front.
        """
        for name in (kwargs.get("text_kwargs") or {}).keys() - TextKwargs.__annotations__.keys():
            logger.warning_once(
                f"{type(self).__name__} ignores the unknown option {name!r} in text_kwargs."
            )
        settings: dict[str, Any] = {**(kwargs.get("text_kwargs") or {}), **kwargs}
        has_special = settings.get("add_special_tokens", True)
        if text is not None:
            text = [self._as_going_on(one, has_special) for one in _to_prompts(text)]
        if "return_mm_token_type_ids" not in (kwargs.get("text_kwargs") or {}):
            kwargs.setdefault("return_mm_token_type_ids", True)
        inputs = super().__call__(images=images, text=text, **kwargs)
        if (
            not MASKS_FOLLOW_IMAGES
            and {"offset_mapping", "text_replacement_offsets"} <= inputs.keys()
        ):
            inputs["offset_mapping"] = list(
                map(_unexpand, inputs["offset_mapping"], inputs["text_replacement_offsets"])
            )
        return inputs

    def _as_going_on(self, text: str, has_special: bool) -> str:
        """A text such that the tokenizer makes the same ids of it, whether a chat is handed on
        whole or in parts.
        """
        if has_special:
            bos = self.tokenizer.bos_token
            is_doubled = bos is not None and text.startswith(bos) and _writes_bos(self.tokenizer)
            return text.removeprefix(bos) if is_doubled else text
        is_llama = self.tokenizer.bos_token is not None and self._drops_noncharacters()
        return NO_PREFIX + text if is_llama and text.startswith(" ") else text

    def replace_image_token(
        self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any
    ) -> str:
        """Return the text that replaces one `<|image|>`.

        It holds placeholders, and for DocOwl the name of each crop.
        """
        run = self.image_token * self.num_image_tokens
        grids = image_inputs.get("crop_grid")
        if grids is None:
            return run
        add_global, add_tags = (
            getattr(self.image_processor, name) if kwargs.get(name) is None else kwargs[name]
            for name in ("add_global_image", "add_text_crop_tags")
        )
        # Upstream: with several images each place gets the names of all their crops; here those of
        # its own.
        rows, columns = map(int, grids[image_idx])
        tags = ["<global_img>"] if add_global else []
        tags += [
            f"<crop_img_row{row}_col{column}>" for row in range(rows) for column in range(columns)
        ]
        return "".join((tag if add_tags else "") + run for tag in tags)

    def prepare_inputs_layout(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return prompts as a list, and images as one list for each prompt.

        Without a prompt, return images as one list.
        """
        if videos is not None:
            raise ValueError(
                "Pass a video as a list of its frames: as images, or in a chat part of type "
                "'video'."
            )
        if audio is not None:
            raise ValueError("Audio is not supported: pass text and images.")
        if text is not None:
            text = _to_prompts(text)
        if images is not None:
            images = self._to_lists(images, text)
        return images if images and any(images) else None, text, None, None

    def _to_lists(self, images: Any, text: list[str] | None) -> list[list[Any]]:
        """Nested lists belong to one prompt each; a flat list is dealt out to the prompts in
        order.
        """
        images = list(images) if is_many(images) else [images]
        if text is None:
            return [flatten_images(images)]
        if any(map(is_many, images)):
            if len(images) != len(text):
                raise ValueError(
                    self._count_error(
                        f"Got lists of images for {len(images)} prompts, but {len(text)}"
                    )
                )
            return [[] if own is None else flatten_images(own) for own in images]
        counts = [prompt.count(self.image_token) for prompt in text]
        if len(images) != sum(counts):
            got = f"The text has {sum(counts)} {self.image_token} but {len(images)} images"
            raise ValueError(self._count_error(got))
        rest = iter(images)
        return [[next(rest) for _ in range(count)] for count in counts]

    def validate_inputs(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> None:
        if text is None and images is None:
            raise ValueError("Expected text, images or both, got neither.")
        for index, prompt in enumerate(text or []):
            expected, got = prompt.count(self.image_token), len(images[index]) if images else 0
            if expected != got:
                where = "The text" if len(text) == 1 else f"Prompt {index} of the batch"
                raise ValueError(
                    self._count_error(f"{where} has {expected} {self.image_token} but {got} images")
                )

    def _count_error(self, got: str) -> str:
        return f"{got}: {self.image_token} tokens in the prompts and images must be equally many."

    def _process_images(self, images: list[list[Any]], **kwargs: Any) -> Any:
        flat = flatten_images(images)
        processed = self.image_processor(flat, **kwargs)
        return processed, [
            self.replace_image_token(processed, index, **kwargs) for index in range(len(flat))
        ]

    def get_text_with_replacements(
        self,
        text: Any,
        images_replacements: Any = (),
        videos_replacements: Any = (),
        audio_replacements: Any = (),
    ) -> tuple[list[str], list[list[dict[str, Any]]]]:
        """Insert the replacements of images.

        Differs from transformers: without `legacy`, texts after control tokens also get
        `NO_PREFIX`.
        """
        if self.legacy:
            return super().get_text_with_replacements(text, list(images_replacements))
        images, pattern = (
            iter(images_replacements),
            re.compile("|".join(map(re.escape, self._control_tokens()))),
        )
        expanded, all_offsets = [], []
        for prompt in text:
            pieces: list[str] = []
            offsets: list[dict[str, Any]] = []
            last = shift = 0
            for match in pattern.finditer(prompt):
                is_image = match[0] == self.image_token
                is_first = not match.start() and match[0] == self.tokenizer.bos_token
                replacement = (
                    next(images) if is_image else match[0] + ("" if is_first else NO_PREFIX)
                )
                start, end = match.span()
                new_span = (start + shift, start + shift + len(replacement))
                offsets.append(
                    {
                        "type": "image" if is_image else "text",
                        "span": (start, end),
                        "new_span": new_span,
                        "text": match[0],
                        "replacement": replacement,
                    }
                )
                pieces += [prompt[last:start], replacement]
                last, shift = end, new_span[1] - end
            expanded.append("".join([*pieces, prompt[last:]]))
            all_offsets.append(offsets)
        return expanded, all_offsets

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> Any:
        """Decode generated ids.

        Differs from transformers: an answer that a pipeline cuts off after `ASSISTANT:` has no
        leading space.
        """
        texts = super().post_process_image_text_to_text(
            generated_outputs, skip_special_tokens, **kwargs
        )
        return Decoded(texts) if isinstance(texts, str) else [Decoded(text) for text in texts]

    def create_mm_token_type_ids(self, input_ids: Iterable[Any]) -> list[list[int]]:
        """Return the modality indicators: 1 at visual tokens, 0 elsewhere."""
        rows = (row if isinstance(row, list) else row.tolist() for row in input_ids)
        return [[int(token == self.image_token_id) for token in row] for row in rows]

    def apply_chat_template(
        self, conversation: Any, *args: Any, sanitize_control_tokens: bool = True, **kwargs: Any
    ) -> Any:
        """Turn chat messages into a prompt, or into model inputs with `tokenize=True`.

        Differs from transformers: control tokens in the text of a message are plain text, and
        `video` parts may be lists of frames.

        `sanitize_control_tokens` is always on.

        Raises:
            ValueError: If a message or part is invalid, the template rejects it, or the template
                does not support `tools` or `documents`.
        """
        given = {**dict(zip(("chat_template", "tools", "documents"), args, strict=False)), **kwargs}
        template = given.get("chat_template") or self.chat_template
        for name in ("tools", "documents"):
            if given.get(name) and name not in str(template):
                raise ValueError(
                    f"The chat template does not support {name}: leave them out, or put them "
                    "into a message."
                )
        if kwargs.get("return_assistant_tokens_mask") and not MASKS_FOLLOW_IMAGES:
            wanted = {"return_text_replacement_offsets": True}
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), **wanted}
        conversation = getattr(conversation, "messages", conversation)
        if not conversation:
            raise ValueError("The conversation is empty: pass at least one message.")
        first = conversation[0]
        is_batch = isinstance(first, (list, tuple)) or hasattr(first, "messages")
        chats = (
            [getattr(chat, "messages", chat) for chat in conversation]
            if is_batch
            else [conversation]
        )
        chats = [self._plain(_as_data(chat)) for chat in chats]
        if (images := (kwargs.get("processor_kwargs") or {}).get("images")) is not None:
            kwargs["processor_kwargs"] = _fill_places(chats, images, kwargs["processor_kwargs"])
        try:
            return super().apply_chat_template(chats if is_batch else chats[0], *args, **kwargs)
        except Exception as error:
            if not type(error).__module__.startswith("jinja2."):
                raise
            raise ValueError(f"The chat template raised an error: {error}") from error

    def _plain(self, conversation: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation with its text escaped and its videos as images; the original stays as it
        is.
        """
        if not conversation:
            raise ValueError("The conversation is empty: pass at least one message.")
        messages = []
        for message in conversation:
            role = message.get("role") if isinstance(message, dict) else type(message).__name__
            if role not in ("system", "user", "assistant"):
                raise ValueError(
                    "A message must be a dict with role 'system', 'user' or 'assistant', got "
                    f"{role!r}."
                )
            content = message.get("content")
            if isinstance(content, str) or (content is None and role == "assistant"):
                content = self._escape(content or "")
            elif isinstance(content, (list, tuple)):
                content = [plain for part in content for plain in self._plain_part(part)]
            else:
                got = type(content).__name__
                raise ValueError(
                    f"The content of a message must be a string or a list of parts, got {got}."
                )
            messages.append({**message, "content": content})
        return messages

    def _plain_part(self, part: dict[str, Any]) -> list[dict[str, Any]]:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            return [{"type": "text", "text": self._escape(part["text"])}]
        if kind == "image_url":
            url = part.get("image_url")
            part = {"url": url.get("url") if isinstance(url, dict) else url}
        elif kind not in ("image", "video"):
            raise ValueError(
                f"A part must be of type 'text' with a string, 'image' or 'video', got {kind!r}."
            )
        given = [
            (key, part[key])
            for key in ("image", "video", "url", "path", "base64")
            if part.get(key) is not None
        ]
        if not given:
            return [{"type": "image"}]  # a placeholder, for an image that is passed separately
        key, value = given[0]
        is_list = is_many(value)
        if is_list != (kind == "video") or (is_list and len(value) == 0):
            expected = "a list of at least one frame" if kind == "video" else "a single image"
            raise ValueError(
                f"A part of type {kind!r} must hold {expected}, got {type(value).__name__}."
            )
        return (
            [{"type": "image", "image": frame} for frame in value]
            if is_list
            else [{"type": "image", key: value}]
        )

    def _control_tokens(self) -> list[str]:
        return [
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special
        ]

    def _escape(self, text: str) -> str:
        """The text with `ESCAPE` in control tokens, also in the beginning of one that the next part
        could complete.
        """
        text = text.replace(ESCAPE, "").replace(NO_PREFIX, "")
        tokens = self._control_tokens()

        def escape(match: re.Match[str]) -> str:
            start = match.start()
            is_token = any(token.startswith(text[start : start + len(token)]) for token in tokens)
            return match[0] + ESCAPE if is_token else match[0]

        escaped = re.sub("|".join({re.escape(token[0]) for token in tokens}), escape, text)
        if escaped != text and not self._drops_noncharacters():
            raise ValueError(
                "A message contains the name of a control token, which this tokenizer would "
                "read as the token itself. Use the tokenizer of a converted checkpoint, whose "
                "normalizer deletes U+FDD0."
            )
        return escaped

    def _drops_noncharacters(self) -> bool:
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        return normalizer is not None and normalizer.normalize_str(f"{NO_PREFIX}a{ESCAPE}b") == "ab"

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Any] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders and crops of each image of (height, width); its size matters where it is cut
        by its shape.
        """
        if image_sizes is None:
            return MultiModalData()
        crops = [self.image_processor.num_crops(*size, **kwargs) for size in image_sizes]
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens * num for num in crops], num_image_patches=crops
        )


def _as_data(value: Any) -> Any:
    """Messages and their parts as dicts and lists, whatever objects they are; keys without a value
    are left out.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif callable(getattr(value, "model_dump", None)):  # pydantic
        value = value.model_dump()
    if isinstance(value, Mapping):
        return {key: _as_data(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_as_data(item) for item in value]
    return value


def _default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that begins as the tokenizer begins a text."""
    return CHAT_TEMPLATE if _writes_bos(tokenizer) else PLAIN_CHAT_TEMPLATE


def _writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins a text with its token for that."""
    return tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _check_preprocessing(path: Path, settings: dict[str, Any]) -> None:
    for key in ("image_mean", "image_std"):
        value = settings.get(key, [0.5, 0.5, 0.5])
        is_sound = (
            isinstance(value, list)
            and len(value) == 3
            and all(type(x) in (int, float) for x in value)
        )
        if not is_sound or not all(
            math.isfinite(x) and (x > 0 or key == "image_mean") for x in value
        ):
            raise ValueError(f"{path}: expected three numbers in {key}, got {str(value)[:60]}.")
    if settings.get("resample", 3) not in range(6):
        raise ValueError(
            f"{path}: expected a resample from 0 to 5, got {str(settings['resample'])[:60]}."
        )


def _original_folder(name: str | Path, kwargs: dict[str, Any]) -> Path | None:
    """Folder of a checkpoint in the original's layout, from the disk or the Hub; `None` for any
    other checkpoint.
    """
    names = ("cache_dir", "force_download", "token", "revision", "subfolder", "local_files_only")
    hub: dict[str, Any] = {name: kwargs[name] for name in names if name in kwargs}
    hub.update(
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    if cached_file(name, PROCESSOR_NAME, **hub) is not None:
        return None
    config = cached_file(name, CONFIG_NAME, **hub)
    if config is None or "visual_config" not in read_json(Path(config)):
        return None
    for file in (*TOKENIZER_FILES, "tokenizer_config.json", "preprocessor_config.json"):
        cached_file(name, file, **hub)
    return Path(config).parent


def _unexpand(offsets: Iterable[Any], replacements: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Spans of tokens in the expanded prompt -> in the prompt as it was, with one placeholder for
    each image.
    """
    ends = [replacement["new_span"][1] for replacement in replacements]
    limits = [replacement["span"][1] for replacement in replacements]
    gains = [0, *(end - limit for end, limit in zip(ends, limits, strict=True))]
    spans, last = [], -1
    for start, end in offsets:
        image = bisect.bisect_right(ends, start)  # the next one
        # All tokens of an image get the span of its placeholder, so that spans stay sorted for
        # transformers' binary search.
        limit = limits[image] if image < len(limits) else int(end)
        first, behind = (min(int(at) - gains[image], limit) for at in (start, end))
        # Padding and `<s>` have no width: they are placed at the end of the span before them.
        spans.append((last, last) if start == end else (first, behind))
        last = spans[-1][1]
    return spans


def _fill_places(
    chats: list[list[dict[str, Any]]], images: Any, processor_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Put images that came beside the messages into the parts that only hold their places.

    Returns:
        What is left of `processor_kwargs`; all of it if the template places images in some other
        way.
    """
    parts = [
        part
        for chat in chats
        for message in chat
        for part in message["content"]
        if isinstance(part, dict)
    ]
    places = [part for part in parts if part == {"type": "image"}]
    images = flatten_images(list(images) if is_many(images) else [images])
    if len(places) != len(images):
        return processor_kwargs
    for place, image in zip(places, images, strict=True):
        place["image"] = image
    return {name: value for name, value in processor_kwargs.items() if name != "images"}


def _to_prompts(text: Any) -> list[str]:
    prompts = list(text) if isinstance(text, (list, tuple)) else [text]
    if not prompts:
        raise ValueError("Expected a prompt or a list of at least one, got none.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"Prompt {index} must be a string, got {type(prompt).__name__}.")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Prompt {index} is not valid Unicode at character {error.start}: {error.reason}."
            ) from None
    return prompts


MplugOwl2Processor.register_for_auto_class("AutoProcessor")

__all__ = ["MplugOwl2Processor"]
