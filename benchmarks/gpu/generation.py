"""Answers: `owl2-hf describe`, a batch of 32 chats, and the server with 32 clients at a time.

The model has the published shape and random weights, and every image is a JPEG file of 1600 x 1200
pixels. Each token of an answer is a word, and none ends it, so that all answers have their full
length. The server, its clients and the model share one process. It needs the extra `serve`.
"""

import base64
import http.client
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from transformers import pipeline

from owl2_hf.cli import asking
from owl2_hf.limits import bind

from .frame import Setting, Step, time_of
from .processors import TOKENIZER, Loaded, load, make_files

QUESTION = "Describe this image in detail."
NUM_CHATS = NUM_CLIENTS = 32
SCORES_OF_A_CLIENT = 4
ROUNDS = 3


def num_tokens(setting: Setting) -> int:
    """Tokens of an answer."""
    return 4 if setting.tiny else 32


def check_length(answer: str, expected: int) -> None:
    if (found := len(answer.split())) != expected:
        raise RuntimeError(f"expected {expected} words, got {found}: {answer!r}")


def speed(answer: Callable[[int], object], num_answers: int, setting: Setting) -> dict[str, Any]:
    """What answers of one token and of several take.

    Args:
        answer: Makes `num_answers` answers of so many tokens at a time.
    """
    count = num_tokens(setting)
    first, whole = (
        time_of(lambda length=length: answer(length), setting, ROUNDS, 1)
        for length in (1, 1 + count)
    )
    # What follows the first token is decoding alone.
    shown = {
        "seconds to the first token": first,
        "tokens per second": num_answers * count / (whole - first),
    }
    return {
        "answers": num_answers,
        "tokens of an answer": 1 + count,
        "seconds of the whole": whole,
        "shown": shown,
    }


def describe(setting: Setting) -> dict[str, Any]:
    """The command, from the image file to the text, with a model that is loaded."""
    loaded = load(setting)

    def answer(length: int, file: Path) -> None:
        given = mock.patch.object(asking, "load", lambda name: (loaded.model, loaded.processor))
        with given, redirect_stdout(StringIO()) as shown:
            asking.describe(
                image=str(file),
                question=QUESTION,
                model=None,
                max_new_tokens=length,
                device=str(setting.device),
                as_json=False,
                debug=True,
            )
        check_length(shown.getvalue(), length)

    with TemporaryDirectory() as folder:
        [file] = make_files(Path(folder) / "files", 1, setting)
        return {"tokenizer": TOKENIZER, **speed(lambda length: answer(length, file), 1, setting)}


def batch(setting: Setting) -> dict[str, Any]:
    """Chats through `pipeline("image-text-to-text")`, in one batch."""
    loaded = load(setting)
    pipe = pipeline(
        "image-text-to-text",
        model=loaded.model,
        processor=loaded.processor,
        device=setting.device,
    )

    def answer(length: int, files: list[Path]) -> None:
        chats = [
            [{"role": "user", "content": [{"type": "image", "path": str(file)}, text]}]
            for file in files
        ]
        options = {"do_sample": False, "max_new_tokens": length}
        answers = pipe(
            text=chats, batch_size=NUM_CHATS, return_full_text=False, generate_kwargs=options
        )
        for [one] in answers:
            check_length(one["generated_text"], length)

    text = {"type": "text", "text": QUESTION}
    with TemporaryDirectory() as folder:
        files = make_files(Path(folder) / "files", NUM_CHATS, setting)
        return speed(lambda length: answer(length, files), NUM_CHATS, setting)


@contextmanager
def serving(loaded: Loaded) -> Iterator[str]:
    """Host and port of the server, on a thread of its own, with the settings of `owl2-hf serve`."""
    import uvicorn

    from owl2_hf.serving import build_app

    with bind("127.0.0.1", 0) as sock:
        app = build_app("random", loaded.model, loaded.processor)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the server did not start.")
                time.sleep(0.01)
            yield "{}:{}".format(*sock.getsockname())
        finally:
            server.should_exit = True
            thread.join()


@dataclass(frozen=True)
class Answered:
    """Seconds to the first piece of text and to the end, and tokens of the answer."""

    first: float
    whole: float
    tokens: int


def post(place: str, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(place, timeout=300)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", path, json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{path} answered with status {response.status}: {response.read()!r}")
    return response


def chat(place: str, image: str, length: int) -> Answered:
    """One streamed answer."""
    parts = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": QUESTION},
    ]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": length,
        "temperature": 0,
        "stream": True,
    }
    start, first, text, tokens = time.perf_counter(), 0.0, "", 0
    for line in post(place, "/v1/chat/completions", body):
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event.get("choices", ()):
            text += choice["delta"].get("content") or ""
        first = first or (time.perf_counter() - start if text else 0.0)
    check_length(text, length)
    return Answered(first, time.perf_counter() - start, tokens)


def score(place: str, image: str) -> None:
    found = json.loads(post(place, "/v1/score", {"images": [image]}).read())
    if len(found["data"]) != 1:
        raise RuntimeError(f"expected one score, got {found}")


def at_once(run: Callable[[], Any], count: int) -> tuple[list[Any], float]:
    """What each of `count` clients gets, and the seconds of all."""
    start = time.perf_counter()
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        found = [future.result() for future in [pool.submit(run) for _ in range(count)]]
    return found, time.perf_counter() - start


def served(setting: Setting) -> dict[str, Any]:
    """Streamed chats of one client, then of 32; then scores."""
    length = num_tokens(setting)
    with TemporaryDirectory() as folder:
        [file] = make_files(Path(folder) / "files", 1, setting)
        image = "data:image/jpeg;base64," + base64.b64encode(file.read_bytes()).decode()
    found: dict[str, Any] = {"tokens of an answer": length, "shown": {}}
    with serving(load(setting)) as place:
        chat(place, image, length)
        for num_clients in (1, NUM_CLIENTS):
            answers, taken = at_once(lambda: chat(place, image, length), num_clients)
            firsts = [one.first for one in answers]
            numbers = {
                "requests per second": num_clients / taken,
                "tokens per second": sum(one.tokens for one in answers) / taken,
                "seconds to the first token, median": statistics.median(firsts),
                "seconds to the first token, largest": max(firsts),
            }
            kind = f"{num_clients} at a time"
            found["shown"] |= {f"chats, {kind}: {name}": one for name, one in numbers.items()}
        score(place, image)
        count = NUM_CLIENTS * (1 if setting.tiny else SCORES_OF_A_CLIENT)
        _, taken = at_once(lambda: score(place, image), count)
        found["shown"][f"scores, {NUM_CLIENTS} at a time: requests per second"] = count / taken
    return found


def lacks_server(setting: Setting) -> str | None:
    try:
        from owl2_hf import serving  # noqa: F401
    except ValueError as error:
        return str(error)
    return None


STEPS = [
    Step("owl2-hf describe", describe, minutes=0.2),
    Step(f"pipeline, {NUM_CHATS} chats", batch, minutes=0.4),
    Step(f"server, {NUM_CLIENTS} clients", served, minutes=0.8, needs=lacks_server),
]
