"""transformers' application with one model in it, and the process that serves it.

transformers' own server loads whatever model a request names, and knows only the model classes that
come with it; it opens files of the server as images, ignores fields that it does not support, and
generates to the end for clients that have gone. Its application, streaming and answers are used
here, around a handler that does none of this.

One file because a request passes all of it, from top to bottom.
"""

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from ..limits import Context, open_pictures, url_of
from ..modeling import MplugOwl2ForConditionalGeneration
from ..processing.image_processing_mplug_owl2 import MAX_IMAGE_PIXELS
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from ..scoring import PRESETS, Preset
from .gate import Gate, error_body
from .pictures import is_http, read_pictures
from .requests import ChatRequest, ClientConfig, parse_request
from .scores import FAILED as SCORING_FAILED
from .scores import ScoreHandler
from .stopping import StopFilter, find_stop
from .threads import in_thread

logger = logging.get_logger(__name__)

FAILED = "generation failed; the server's log says why."
MAX_DOWNLOADS = 4  # requests that download at the same time
SHUTDOWN_SECONDS = 2  # for answers that are running when a signal comes
INTERRUPTED = 130  # exit code of the command after Ctrl-C
IDLE_SECONDS = 1.5  # after that, for the model to stop


@dataclass(frozen=True)
class ServerSettings:
    """Limits of a server.

    Args:
        max_image_pixels: Pixels of all images of one request together.
        max_new_tokens: Longest answer, in tokens; requests may ask for less.
        max_body_bytes: Largest body of a request.
        batch_size: Most images that one forward pass scores.
        allow_image_urls: Whether images are also fetched from http(s) URLs on public addresses.
        api_key: What clients must send, if not `None`.
    """

    max_image_pixels: int = MAX_IMAGE_PIXELS
    max_new_tokens: int = 1024
    max_body_bytes: int = 32 * 2**20
    batch_size: int = 8
    allow_image_urls: bool = False
    api_key: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_image_pixels", "max_new_tokens", "max_body_bytes", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError(
                "the API key is empty: set one, or leave it out to accept every client."
            )


class PinnedModel(ModelManager):
    """The one model that there is; no request loads or unloads another."""

    def __init__(
        self, name: str, model: MplugOwl2ForConditionalGeneration, processor: MplugOwl2Processor
    ) -> None:
        super().__init__()
        self.name, self.model, self.processor = name, model, processor
        self.card = {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "owl2_hf",
        }

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return self.model, self.processor

    def list_models(self, *args: Any) -> list[dict[str, Any]]:
        return [self.card]

    get_gen_models = list_models  # its name before transformers 5.24


class Generator(GenerateManager):
    """Generates for one request after the other, on a thread of its own; leaves out the text of
    stop strings.
    """

    async def generate_non_streaming(
        self,
        model: MplugOwl2ForConditionalGeneration,
        processor: MplugOwl2Processor,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
    ) -> Any:
        text, *rest = await super().generate_non_streaming(
            model, processor, inputs, gen_config, request_id
        )
        return text[: find_stop(text, gen_config.stop_strings or [])], *rest

    def generate_streaming(
        self,
        model: MplugOwl2ForConditionalGeneration,
        processor: MplugOwl2Processor,
        inputs: Any,
        gen_config: GenerationConfig,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        queue, streamer = super().generate_streaming(
            model, processor, inputs, gen_config, *args, **kwargs
        )
        return StopFilter(queue, gen_config.stop_strings or []), streamer

    def async_submit(
        self, fn: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> asyncio.Future[Any]:
        # shield: the thread always sets the result, and a cancelled future would raise an error.
        future = super().async_submit(fn, *args, **kwargs)
        # Marks errors as retrieved, so that asyncio logs nothing if nobody waits any more.
        future.add_done_callback(lambda done: done.exception())
        return asyncio.shield(future)

    async def is_idle(self, seconds: float) -> bool:
        """Wait until everything that was submitted has ended; `False` if it has not."""
        try:
            await asyncio.wait_for(self.async_submit(lambda: None), seconds)
        except asyncio.TimeoutError:
            return False
        return True


class Run:
    """What one request generates with: stands for the model in transformers' handlers."""

    def __init__(
        self,
        model: MplugOwl2ForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        seed: int | None,
    ) -> None:
        self.model, self.config, self.tokenizer, self.seed = model, model.config, tokenizer, seed
        self.is_cancelled = threading.Event()

    def generate(self, **kwargs: Any) -> torch.Tensor:
        """As the model's `generate`, seeded here and not when the request came; ends where nobody
        waits for it.

        Raises:
            RuntimeError: If something went wrong, which the log says and the client need not know.
        """
        if self.is_cancelled.is_set():
            raise RuntimeError("the client disconnected.")
        if self.seed is not None:
            torch.manual_seed(self.seed)
        try:
            return self.model.generate(
                **{**kwargs, "tokenizer": self.tokenizer, "stopping_criteria": [self._stops]}
            )
        except Exception as error:
            if "streamer" in kwargs and kwargs["streamer"]._cancelled.is_set():
                raise
            logger.error("generation failed", exc_info=error)
            raise RuntimeError(FAILED) from error

    def _stops(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.is_cancelled.is_set(), device=input_ids.device)


class ChatHandler(ChatCompletionHandler):
    """`POST /v1/chat/completions` for the pinned model."""

    def __init__(
        self, pinned: PinnedModel, state: GenerationState, settings: ServerSettings
    ) -> None:
        super().__init__(pinned, state)
        self.name, self.model, self.processor, self.settings = (
            pinned.name,
            pinned.model,
            pinned.processor,
            settings,
        )
        self.generator = Generator()
        self.downloads = asyncio.Semaphore(MAX_DOWNLOADS)
        self.turn = asyncio.Lock()  # only one request's images in memory at a time
        self.context = Context(self.model, self.processor)
        self.num_outputs = (
            self.model.config.output_vocab_size or self.model.config.get_text_config().vocab_size
        )

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        try:
            request = parse_request(body)
            self._check(request)
            async with self.downloads if any(map(is_http, request.image_urls)) else nullcontext():
                files = await in_thread(
                    read_pictures, request.image_urls, self.settings.allow_image_urls
                )
            async with self.turn:
                inputs = await in_thread(self._prepare, request, files)
            config = self._configure(request, inputs["input_ids"].shape[1])
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        run = Run(self.model, self.processor.tokenizer, request.seed)
        arguments = (
            request_id,
            run,
            self.processor,
            self.name,
            inputs.to(self.model.device),
            config,
            self.generator,
        )
        if request.stream:
            response = self._streaming(*arguments)
            response.body_iterator = _finish(response.body_iterator)
            return response
        try:
            return await self._non_streaming(*arguments)
        finally:
            run.is_cancelled.set()

    def check_name(self, model: str | None) -> None:
        """Refuse a request that names another model."""
        if model not in (None, self.name):
            raise HTTPException(
                404, f"unknown model {ascii(model)[:200]}: this server has {self.name!r}."
            )

    def _check(self, request: ChatRequest) -> None:
        """What can be said before images are opened and text is cut into tokens."""
        self.check_name(request.model)
        if request.logit_bias and max(map(int, request.logit_bias)) >= self.num_outputs:
            raise ValueError(f"logit_bias: token ids must be below {self.num_outputs}.")
        self.context.check(len(request.image_urls), request.num_characters)

    def _prepare(self, request: ChatRequest, files: list[bytes]) -> Any:
        pictures = open_pictures(files, self.settings.max_image_pixels)
        return self.processor.apply_chat_template(
            request.conversation(pictures),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def _configure(self, request: ChatRequest, num_prompt_tokens: int) -> Any:
        """The generation config, for an answer that fits the context."""
        room = self.context.room(num_prompt_tokens)
        names = {"temperature", "top_p", "frequency_penalty", "logit_bias", "stop"}
        wanted = {name: value for name, value in request.model_dump(include=names).items() if value}
        config = self._build_generation_config(wanted, self.model.generation_config)
        client = request.generation_config or ClientConfig()
        values = client.model_dump(
            exclude={"max_new_tokens", "transformers_version"}, exclude_none=True
        )
        if values.get("temperature") == 0:
            values["do_sample"] = bool(values.pop("temperature"))
        config.update(**values)
        asked = request.max_completion_tokens or request.max_tokens or client.max_new_tokens
        config.max_new_tokens = min(asked or room, self.settings.max_new_tokens, room)
        if request.temperature is not None or request.top_p is not None:
            config.do_sample = request.temperature != 0
        return config


async def _finish(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events of a stream with an error in OpenAI's shape and with OpenAI's last line."""
    async with aclosing(events) as open_events:  # type: ignore[type-var]
        async for event in open_events:
            yield event.replace(
                f'{{"error": "{FAILED}"}}', json.dumps(error_body(500, FAILED, "internal_error"))
            )
    yield "data: [DONE]\n\n"


class ServedModel(Gate):
    """A gate with a model behind it."""

    def __init__(self, app: FastAPI, settings: ServerSettings, generator: Generator) -> None:
        super().__init__(app, settings.api_key, settings.max_body_bytes)
        self.generator = generator


def build_app(
    name: str,
    model: MplugOwl2ForConditionalGeneration,
    processor: MplugOwl2Processor,
    settings: ServerSettings | None = None,
    preset: Preset | None = None,
) -> ServedModel:
    """The ASGI application that serves a model.

    Args:
        name: What requests call it.
        model: An `MplugOwl2ForConditionalGeneration`, on the device where it is to run.
        processor: Its processor.
        preset: How it scores where a request does not say; as OneAlign does if not given.

    Raises:
        ValueError: If it is another family's model.
    """
    if not isinstance(model, MplugOwl2ForConditionalGeneration):
        raise ValueError(
            f"{name}: expected an MplugOwl2ForConditionalGeneration, got {type(model).__name__}."
        )
    settings = settings or ServerSettings()
    pinned, state = PinnedModel(name, model, processor), GenerationState()
    handler = ChatHandler(pinned, state, settings)
    scores = ScoreHandler(handler, preset or PRESETS["one-align"])
    app = build_server(pinned, handler, None, None, None, None, state)

    @app.get("/v1/models/{model:path}")
    def retrieve_model(model: str) -> dict[str, Any]:
        handler.check_name(model)
        return pinned.card

    @app.post("/v1/score")
    async def score(request: Request) -> dict[str, Any]:
        return await scores.handle_request(request)

    # transformers' own /load_model would load any model that a request names.
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", None) != "/load_model"
    ]

    @app.post("/load_model")
    def load_model(body: dict[str, Any]) -> Response:
        """What `transformers chat` asks first; the one model is there."""
        if not isinstance(wanted := body.get("model"), str):
            raise HTTPException(400, "model: expected the name of the model.")
        event = {"status": "ready", "model": name, "cached": True}
        if wanted != name:
            message = f"unknown model {ascii(wanted)[:200]}: this server has {name!r}."
            event = {"status": "error", "model": wanted, "message": message}
        return Response(f"data: {json.dumps(event)}\n\n", media_type="text/event-stream")

    _shape_errors(app)
    return ServedModel(app, settings, handler.generator)


def _shape_errors(app: FastAPI) -> None:
    codes = {400: "invalid_request", 404: "model_not_found"}

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse(
            error_body(error.status_code, str(error.detail), codes.get(error.status_code)),
            error.status_code,
        )

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        message = "expected a JSON object with Content-Type: application/json."
        return JSONResponse(error_body(400, message, "invalid_json"), 400)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        message = str(error)
        if message not in (FAILED, SCORING_FAILED):
            message = "the server failed; its log says why."
        return JSONResponse(error_body(500, message, "internal_error"), 500)


class _Server(uvicorn.Server):
    is_idle = True

    def __init__(
        self, config: uvicorn.Config, generator: Generator, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.generator, self.on_ready = generator, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self.is_idle = await self.generator.is_idle(IDLE_SECONDS)


def serve(app: ServedModel, sock: socket.socket, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; answers that take longer are cut off.

    Args:
        on_ready: Called with the URL as soon as requests are taken.
    """
    url = f"{url_of(*sock.getsockname()[:2])}/v1"
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    server = _Server(config, app.generator, lambda: on_ready(url))
    try:
        server.run(sockets=[sock])
    except KeyboardInterrupt:
        if server.is_idle:
            raise
        # Python cannot shut down cleanly while a thread is still running the model.
        os._exit(INTERRUPTED)
