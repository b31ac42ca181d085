"""The page: a tab to chat, one to score images, one to see what the model attends to."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from html import escape, unescape
from typing import Any

import gradio as gr
from transformers.utils import logging

from ..default import default_pictures
from ..limits import url_of
from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..processing.image_processing_mplug_owl2 import FORMATS, MAX_FILE_BYTES
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from ..scoring import PRESETS, Preset, Score, Scorer, custom_preset
from ..scoring.presets import own_preset
from .chat import problem, to_messages
from .worker import DemoSettings, ModelWorker

logger = logging.get_logger(__name__)

FAILED = "the model failed; the server's log says why."
PICTURES = [f".{name.lower()}" for name in (*FORMATS, "jpg", "tif")]
SCALES = {"the preset's": None, "1-5": (1.0, 5.0), "0-1": (0.0, 1.0)}
OWN_PRESET = "the model's own"
# For a model whose vocabulary lacks the level words, such as the bundled one.
OWN_QUESTION, OWN_LEVELS = "USER: <|image|>Is this an animal? ASSISTANT:", "yes, no"
UPLOAD_SECONDS = 24 * 3600  # how long an upload is kept
CLEANING_SECONDS = 3600
IDLE_SECONDS = 1.5  # at shutdown, to wait for the model to stop
TERMINATED = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
LAUNCH_OPTIONS: dict[str, Any] = {
    "max_file_size": MAX_FILE_BYTES,
    "footer_links": [],
    "run_history": False,
    "quiet": True,
}


def build_page(
    model: MplugOwl2ForConditionalGeneration,
    processor: MplugOwl2Processor,
    name: str,
    settings: DemoSettings | None = None,
    on_device: Callable[[Any], Any] = lambda function: function,
) -> gr.Blocks:
    """The page of a model; `show` opens it, or its own `launch(**LAUNCH_OPTIONS)`.

    Args:
        model: An `MplugOwl2ForConditionalGeneration`, on the device where it is to run.
        processor: Its processor.
        name: What the page calls it.
        on_device: Decorates each function that runs the model, as `spaces.GPU` does where a GPU is
            lent for one call.

    Raises:
        ValueError: If it is another family's model.
    """
    worker = ModelWorker(model, processor, name, settings)
    with gr.Blocks(
        title=f"{name} - mPLUG-Owl2",
        analytics_enabled=False,
        delete_cache=(CLEANING_SECONDS, UPLOAD_SECONDS),
    ) as page:
        gr.Markdown(f"# mPLUG-Owl2\nThe model is `{name}`.")
        with gr.Tab("Chat"):
            _add_chat(worker, on_device)
        with gr.Tab("Score"):
            _add_scores(worker, on_device)
        with gr.Tab("Attention"):
            _add_analysis(worker, on_device)
    page.worker = worker
    return page


def _reason(error: Exception) -> str:
    """What a visitor is told: a mistake of theirs in its words, everything else goes to the log
    alone.
    """
    if isinstance(error, ValueError):
        return str(error)
    logger.error("the page failed", exc_info=error)
    return FAILED


@contextmanager
def _told_to_visitor() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Gradio shows the text as HTML.
        raise gr.Error(escape(_reason(error)), duration=None, print_exception=False) from None


def _show_plainly(chatbot: gr.Chatbot) -> gr.Chatbot:
    """The same, with text as it is where gradio would take `<i>` and `<s>` for HTML.

    No subclass: beside the file of one, gradio writes a stub.
    """
    read, show = chatbot.preprocess, chatbot.postprocess

    def preprocess(payload: Any) -> Any:
        messages = read(payload)
        for part in (
            part for message in messages for part in message["content"] if part["type"] == "text"
        ):
            part["text"] = unescape(part["text"])
        return messages

    def postprocess(value: Any) -> Any:
        shown = show(value)
        for part in (
            part for message in shown.root for part in message.content if part.type == "text"
        ):
            part.text = escape(part.text, quote=False)
        return shown

    chatbot.preprocess, chatbot.postprocess = preprocess, postprocess
    return chatbot


def _add_chat(worker: ModelWorker, on_device: Callable[[Any], Any]) -> None:
    def chat(
        question: dict[str, Any],
        history: list[dict[str, Any]],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> Iterator[str | dict[str, Any]]:
        """Answer a question about images."""
        try:
            yield from worker.answer(
                to_messages(history, question), int(max_new_tokens), temperature, top_p
            )
        except Exception as error:
            yield problem(_reason(error))

    limit = worker.settings.max_new_tokens
    with gr.Accordion("Settings", open=False):
        sliders = [
            gr.Slider(1, limit, min(256, limit), step=1, label="Longest answer, in tokens"),
            gr.Slider(0, 2, 0, step=0.05, label="Temperature: 0 always takes the likeliest token"),
            gr.Slider(
                0.05, 1, 1, step=0.05, label="Top p: share of the probability to sample from"
            ),
        ]
    examples = [
        [{"text": "What is this?", "files": [str(path)]}]
        for path in list(default_pictures().values())[:3]
    ]
    gr.ChatInterface(
        on_device(chat),
        multimodal=True,
        chatbot=_show_plainly(
            gr.Chatbot(height="60vh", render_markdown=False, buttons=[], label="Chat")
        ),
        textbox=gr.MultimodalTextbox(
            file_count="multiple",
            file_types=PICTURES,
            placeholder="Ask, with images or without",
            stop_btn=True,
        ),
        additional_inputs=sliders,
        examples=examples,
        cache_examples=False,
        concurrency_limit=1,
        analytics_enabled=False,
        api_name="chat",
    )


def _add_scores(worker: ModelWorker, on_device: Callable[[Any], Any]) -> None:
    def score(
        pictures: list[tuple[str, str | None]] | None,
        preset: str,
        task: str,
        scale: str,
        prompt: str,
        levels: str,
    ) -> Iterator[dict[str, Any]]:
        """Score images by the probabilities of level words."""
        with _told_to_visitor():
            if not pictures:
                raise ValueError("expected at least one image, got none: upload one.")
            chosen = custom_preset(
                presets[preset],
                task,
                prompt.strip() or None,
                levels.split(",") if levels.strip() else None,
            )
            rows: list[list[Any]] = []
            words: list[str] = [
                level if isinstance(level, str) else level[0] for level in chosen.levels
            ]
            for name, found in worker.score(
                [path for path, _ in pictures], chosen, task, SCALES[scale]
            ):
                rows.append(_row(name, found, len(words)))
                yield {"headers": ["image", "score", "std", *words, "problem"], "data": rows}

    presets, first = _presets(worker)
    try:
        Scorer(worker.model, worker.processor, presets[first])
        prompt, levels = "", ""
    except ValueError:
        prompt, levels = OWN_QUESTION, OWN_LEVELS
    with gr.Row():
        pictures = gr.Gallery(
            type="filepath", file_types=PICTURES, sources=["upload"], label="Images", height=300
        )
        with gr.Column():
            with gr.Row():
                preset = gr.Dropdown(list(presets), value=first, label="Preset", min_width=100)
                tasks = _tasks(presets[first])
                task = gr.Dropdown(tasks, value=tasks[0], label="Task", min_width=100)
                scale = gr.Dropdown(
                    list(SCALES), value=next(iter(SCALES)), label="Scale", min_width=100
                )
            with gr.Accordion("Prompt and levels of your own", open=bool(levels)):
                own_prompt = gr.Textbox(
                    prompt, label="Prompt, with <|image|> at the place of the image"
                )
                own_levels = gr.Textbox(
                    levels, label="Level words, best first and separated by commas"
                )
    with gr.Row():
        start, stop = gr.Button("Score", variant="primary"), gr.Button("Stop")
    table = gr.Dataframe(
        headers=["image", "score", "std"], label="Scores", interactive=False, buttons=["copy"]
    )
    preset.change(
        lambda name: gr.Dropdown(_tasks(presets[name]), value=_tasks(presets[name])[0]),
        preset,
        task,
        api_visibility="private",
    )
    inputs = [pictures, preset, task, scale, own_prompt, own_levels]
    scoring = start.click(on_device(score), inputs, table, concurrency_limit=1, api_name="score")
    stop.click(None, cancels=scoring, api_visibility="private")


def _presets(worker: ModelWorker) -> tuple[dict[str, Preset], str]:
    """What a visitor may choose from, by name, and the name of the model's own."""
    own = own_preset(worker.model)
    if own is None:
        return PRESETS, next(iter(PRESETS))
    name = next((name for name, preset in PRESETS.items() if preset == own), OWN_PRESET)
    return {name: own, **PRESETS}, name


def _tasks(preset: Preset) -> list[str]:
    return [task for task in preset.prompts if task != "video"]


def _row(name: str, found: Score | ValueError, num_levels: int) -> list[Any]:
    if isinstance(found, ValueError):
        return [name, *[None] * (2 + num_levels), str(found).removeprefix(f"{name}: ")]
    return [name, *(round(value, 4) for value in (found.score, found.std, *found.probs)), ""]


def _add_analysis(worker: ModelWorker, on_device: Callable[[Any], Any]) -> None:
    def analyze(question: dict[str, Any]) -> tuple[str, Any, Any, list[tuple[Any, str]]]:
        """See what the model attends to while it answers."""
        with _told_to_visitor():
            lines, figures = worker.analyze(question.get("files") or [], question.get("text") or "")
        attention, norms = figures.pop("attention"), figures.pop("norms")
        return (
            "\n".join(lines),
            attention,
            norms,
            [(maps, name.replace("_", " ")) for name, maps in figures.items()],
        )

    gr.Markdown(
        "The answer's attention on text and on visual tokens in each layer, and what each "
        "learnable query attends to. Upload a second, unrelated image to compare."
    )
    question = gr.MultimodalTextbox(
        {"text": "What is this?", "files": []},
        file_count="multiple",
        file_types=PICTURES,
        show_label=False,
        placeholder="Ask about an image",
    )
    summary = gr.Textbox(
        label="What the model answers, and its attention on visual tokens",
        lines=3,
        buttons=["copy"],
    )
    figure = {
        "format": "png",
        "interactive": False,
        "show_label": False,
        "buttons": ["download", "fullscreen"],
    }
    with gr.Row():
        attention = gr.Image(**figure)
        maps = gr.Gallery(**figure, columns=1, object_fit="contain", height="auto")
    norms = gr.Image(**figure)
    question.submit(
        on_device(analyze),
        question,
        [summary, attention, norms, maps],
        concurrency_limit=1,
        api_name="analyze",
    )


def show(
    page: gr.Blocks, sock: socket.socket, share: bool, on_ready: Callable[[str], None]
) -> None:
    """Show the page until SIGTERM or SIGINT; what is under way is cut off.

    Args:
        sock: Bound to the address; it makes way for the page.
        share: Whether to ask Gradio's servers for a public address, too.
        on_ready: Called with each address as soon as it can be opened.
    """
    host, port = sock.getsockname()[:2]
    sock.close()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    code = INTERRUPTED
    try:
        page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            **LAUNCH_OPTIONS,
        )
        for url in (url_of(host, port), page.share_url):
            if url is not None:
                on_ready(url)
        threading.Event().wait()
    except SystemExit:
        code = TERMINATED
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        _close(page, code)


def _close(page: gr.Blocks, code: int) -> None:
    is_idle = page.worker.close(IDLE_SECONDS)
    with suppress(OSError):
        page.close(verbose=False)
    if not is_idle:
        # Python cannot shut down cleanly while a thread is still running the model.
        sys.stdout.flush()
        os._exit(code)
