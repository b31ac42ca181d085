"""Validate requests: OpenAI's chat fields, and the fields of score requests.

What would change the answer and is not supported is refused, not ignored: for chat tools, several
answers, log probabilities, sound, videos, `chat_template_kwargs`, and most of transformers' own
`generation_config`, which reach into the server.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

MAX_STOP_STRINGS, MAX_STOP_LENGTH = 4, 64  # each is compared with the whole vocabulary
MAX_IMAGES = 256  # in a request for scores
MAX_LEVELS = 32
ROLES = {"developer": "system"}  # OpenAI's newer name


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageURL(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = (
        None  # ignored: an image always gets the model's own resolution
    )


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageURL


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Limit = Annotated[int, Field(ge=1)]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)]
    name: str | None = None
    # Clients send these back when they repeat an answer in the history.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class ResponseFormat(_Strict):
    type: Literal["text"]


class ClientConfig(_Strict):
    """What `transformers chat` asks for beside OpenAI's fields."""

    do_sample: bool | None = None
    max_new_tokens: Limit | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=3)] | None = None
    transformers_version: Any = None


def _from_json(config: Any) -> Any:
    return json.loads(config) if isinstance(config, str) else config


class ChatRequest(_Strict):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    stream: bool | None = None
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = (
        None  # 1 + this is the repetition penalty
    )
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None,
        BeforeValidator(_as_list),
    ] = None
    generation_config: Annotated[ClientConfig | None, BeforeValidator(_from_json)] = None  # in JSON
    # Accepted only with the values that change nothing.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    # They have no effect on the answer.
    metadata: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    stream_options: Any = None
    user: Any = None

    @property
    def image_urls(self) -> list[str]:
        """URLs of all images, in order."""
        return [part.image_url.url for part in self._parts() if isinstance(part, ImagePart)]

    @property
    def num_characters(self) -> int:
        return sum(len(part.text) for part in self._parts() if isinstance(part, TextPart))

    def conversation(self, pictures: list[Any]) -> list[dict[str, Any]]:
        """The messages as a chat template takes them, with `pictures` at the places of the URLs."""
        rest = iter(pictures)
        return [
            {
                "role": ROLES.get(message.role, message.role),
                "content": [
                    {"type": "text", "text": part.text}
                    if isinstance(part, TextPart)
                    else {"type": "image", "image": next(rest)}
                    for part in message.content
                ],
            }
            for message in self.messages
        ]

    def _parts(self) -> list[TextPart | ImagePart]:
        return [part for message in self.messages for part in message.content]


Level = Annotated[str, Field(max_length=64, pattern=r"\S")]


class ScoreOptions(_Strict):
    """What may stand beside the images of `POST /v1/score`."""

    model: str | None = None
    preset: Annotated[str, Field(max_length=100)] | None = None
    task: Annotated[str, Field(max_length=100)] = "quality"
    levels: Annotated[list[Level], Field(min_length=2, max_length=MAX_LEVELS)] | None = None


class ScoreRequest(ScoreOptions):
    """The body of `POST /v1/score`, in JSON."""

    images: Annotated[list[str], Field(min_length=1, max_length=MAX_IMAGES)]  # URLs


Body = TypeVar("Body", bound=_Strict)


def parse(kind: type[Body], body: Any) -> Body:
    """The body of a request.

    Raises:
        ValueError: If a field is unknown, not supported, of a wrong type or out of range. The
            message names it.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        fields = [
            f"{'.'.join(map(str, one['loc']))[:100]}: {one['msg'][:200]}" for one in found[:3]
        ]
        raise ValueError("; ".join([*fields, *(["..."] if len(found) > 3 else [])])) from None


def parse_request(body: dict[str, Any]) -> ChatRequest:
    """As `parse`, of the body of `POST /v1/chat/completions`."""
    return parse(ChatRequest, body)
