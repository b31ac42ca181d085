"""`owl2-hf serve`: a running process and OpenAI's own client; its parts where a process cannot show
them.
"""

import asyncio
import base64
import http.client
import io
import json
import logging
import os
import random
import re
import select
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import owl2_hf
from owl2_hf.cli import app

try:
    from owl2_hf import serving
    from owl2_hf.serving import gate, pictures, stopping
    from owl2_hf.serving.requests import parse_request
    from owl2_hf.serving.server import ChatHandler, GenerationState, PinnedModel
except ValueError as missing:
    pytest.skip(str(missing), allow_module_level=True)
openai = pytest.importorskip("openai")

KEY = "a key"
MAX_BODY_BYTES = 300_000
MAX_PIXELS = 500 * 500
ENDLESS = {"2": -100}  # the end-of-sequence token never comes


def launch(*arguments, **environment):
    command = [sys.executable, "-m", "owl2_hf", "serve", "--port", "0", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def url_of(process):
    """URL of a server, as soon as it is ready."""
    line = process.stdout.readline()
    assert line.startswith("serving default at http://127.0.0.1:"), line + process.stderr.read()
    assert line.endswith("/v1\n")
    return line.split()[-1]


@pytest.fixture(scope="module")
def server():
    process = launch(
        *[
            "--max-image-pixels",
            MAX_PIXELS,
            "--max-body-bytes",
            MAX_BODY_BYTES,
            "--max-new-tokens",
            500,
        ],
        OWL2_HF_API_KEY=KEY,
    )
    yield url_of(process)
    assert process.poll() is None, "the server has gone down"
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server, api_key=KEY, max_retries=0, timeout=60)


def data_url(picture):
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        picture = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def message(text, *urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def bundled_picture(name):
    return data_url(owl2_hf.default_pictures()[name].read_bytes())


def ask(client, text, *urls, **options):
    answer = client.chat.completions.create(
        model="default", messages=message(text, *urls), **options
    )
    return answer.choices[0].message.content


def post(url, body, headers=None, path="/v1/chat/completions"):
    """Status and JSON of an answer to raw bytes, or to an iterator of them, which is sent in
    chunks.
    """
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=30)
    headers = {
        "Authorization": f"Bearer {KEY}",
        "Content-Type": "application/json",
        **(headers or {}),
    }
    try:
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


QUESTIONS = [
    ("What is this?", "emoji-banana"),
    ("What is this?", "emoji-strawberry"),
    ("What is this?", "emoji-tiger-face"),
    ("What is this?", "emoji-wide-cat-face"),
    ("What color is the shape?", "shapes-0"),
    ("What kind of thing is a banana?", None),
    ("Is a tiger an animal?", None),
    ("Is red a shape?", None),
]


def test_it_answers_as_the_model_does_without_a_server(client):
    model, processor = owl2_hf.load_default()
    for text, name in QUESTIONS[3:6]:
        picture = (
            [{"type": "image", "image": str(owl2_hf.default_pictures()[name])}] if name else []
        )
        chat = [{"role": "user", "content": [*picture, {"type": "text", "text": text}]}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]
        expected = processor.decode(output, skip_special_tokens=True)
        assert ask(client, text, *([bundled_picture(name)] if name else [])) == expected


def test_eight_clients_at_once_get_their_own_answers(client):
    def answer(question, stream):
        text, name = question
        urls = [bundled_picture(name)] if name else []
        if not stream:
            return ask(client, text, *urls)
        events = client.chat.completions.create(
            model="default", messages=message(text, *urls), stream=True
        )
        return "".join(event.choices[0].delta.content or "" for event in events)

    alone = [answer(question, stream=False) for question in QUESTIONS]
    assert len(set(alone)) >= 5
    with ThreadPoolExecutor(8) as pool:
        for streams in ([False] * 8, [True] * 8, [True, False] * 4):
            assert list(pool.map(answer, QUESTIONS, streams)) == alone


def test_the_stream_ends_as_openai_s_does(server, client):
    body = {
        "messages": message("What is this?", bundled_picture("emoji-banana")),
        "stream": True,
        "max_tokens": 1,
    }
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server).netloc, timeout=30)
    connection.request(
        "POST",
        "/v1/chat/completions",
        json.dumps(body),
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    events = connection.getresponse().read().decode().strip().split("\n\n")
    connection.close()
    assert events[-1] == "data: [DONE]"
    last = json.loads(events[-2].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["usage"]["completion_tokens"] == 1


def test_models_lists_the_one_model(client):
    assert [model.id for model in client.models.list()] == ["default"]
    assert client.models.retrieve("default").id == "default"
    with pytest.raises(openai.NotFoundError, match="unknown model 'other'"):
        client.models.retrieve("other")


def test_no_other_model_is_loaded(client, server):
    with pytest.raises(
        openai.NotFoundError, match="unknown model 'org/other': this server has 'default'"
    ) as error:
        client.chat.completions.create(model="org/other", messages=message("Hi"))
    assert error.value.code == "model_not_found"
    for path in ("/reset", "/v1/responses", "/v1/audio/transcriptions", "/docs", "/openapi.json"):
        status, body = post(server, b"{}", path=path)
        assert (status, body["error"]["code"]) == (404, "not_found")


def test_answers_are_as_long_as_asked_and_allowed(client):
    def count(**options):
        answer = client.chat.completions.create(
            model="default", messages=message("What is this?"), logit_bias=ENDLESS, **options
        )
        assert answer.choices[0].finish_reason == "length"
        return answer.usage.completion_tokens

    assert count(max_tokens=5) == 5
    assert count(max_completion_tokens=6) == 6
    assert count() == count(max_tokens=10**9) == 500


def test_an_answer_ends_where_the_context_does(client):
    words = "red " * 1_900
    answer = client.chat.completions.create(
        model="default", messages=message(words), logit_bias=ENDLESS
    )
    assert answer.usage.total_tokens == 2048
    with pytest.raises(
        openai.BadRequestError,
        match=r"the context of the model, got a prompt of \d+; shorten the prompt",
    ):
        ask(client, words + "red " * 200)
    with pytest.raises(
        openai.BadRequestError, match="the messages are longer than the context of 2048 tokens"
    ):
        ask(client, "red " * 60_000)


def test_sampling_follows_the_seed(client):
    options = {"temperature": 2.0, "max_tokens": 24, "logit_bias": ENDLESS}
    first, again, other = (ask(client, "What is this?", seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other
    greedy = ask(client, "What is this?", max_tokens=24, logit_bias=ENDLESS)
    assert ask(client, "What is this?", **{**options, "temperature": 0}) == greedy != first


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_answer_and_are_no_part_of_it(client, stream):
    def answer(**options):
        options |= {"max_tokens": 60, "logit_bias": ENDLESS, "stream": stream}
        found = client.chat.completions.create(
            model="default", messages=message("What is this?"), **options
        )
        if not stream:
            return found.choices[0].message.content, found.usage.completion_tokens
        events = list(found)
        return "".join(e.choices[0].delta.content or "" for e in events), events[
            -1
        ].usage.completion_tokens

    whole, num_tokens = answer()
    stop = whole[9:13]
    part, num_part = answer(stop=[stop])
    assert part == whole[: whole.index(stop)]
    assert num_part < num_tokens


def test_a_client_that_goes_stops_its_generation(client):
    def seconds(action):
        begin = time.monotonic()
        action()
        return time.monotonic() - begin

    def long(**options):
        return client.chat.completions.create(
            model="default", messages=message("What is this?"), logit_bias=ENDLESS, **options
        )

    whole = seconds(long)

    def leave_streams():
        for _ in range(4):
            stream = long(stream=True)
            next(iter(stream))
            stream.close()
        ask(client, "Is red a shape?")

    def leave_without_streaming():
        for _ in range(4):
            with pytest.raises(openai.APITimeoutError):
                long(timeout=0.1)
        ask(client, "Is red a shape?")

    # Four long answers to the end take four times as long.
    assert seconds(leave_streams) < 2 * whole + 1
    assert seconds(leave_without_streaming) < 2 * whole + 1


def test_the_python_of_the_documentation_runs(server, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "photo.png").write_bytes(owl2_hf.default_pictures()["emoji-banana"].read_bytes())
    monkeypatch.chdir(tmp_path)
    own = code.replace("http://127.0.0.1:8000/v1", server).replace(
        "your key, or any text without --api-key", KEY
    )
    assert own.count(server) == own.count(f'"{KEY}"') == 1
    exec(own, {})
    assert capsys.readouterr().out == "banana"


@pytest.mark.parametrize("key", ["wrong", KEY + "x", "ключ"])
def test_a_wrong_key_is_401(server, key):
    status, body = post(server, b"{}", {"Authorization": f"Bearer {key}".encode()})
    assert status == 401
    assert body["error"]["code"] == "invalid_api_key"


def test_the_client_sees_a_wrong_key(server):
    with pytest.raises(openai.AuthenticationError, match="expected the server's API key"):
        openai.OpenAI(base_url=server, api_key="wrong", max_retries=0).models.list()


def test_an_oversized_body_is_413(client, server):
    with pytest.raises(openai.APIStatusError, match="must be at most 300,000 bytes") as error:
        ask(client, "x" * 20_000_000)
    assert error.value.status_code == 413
    # Chunks, without a content length.
    status, body = post(server, (b" " * 10_000 for _ in range(100)))
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    assert ask(client, "Is red a shape?") == "no"


def test_too_many_pixels_are_400(client):
    bomb = data_url(Image.new("1", (8_000, 8_000)))
    with pytest.raises(
        openai.BadRequestError,
        match="image 1 of 1: it has 8000 x 8000 pixels, the limit is 250,000",
    ):
        ask(client, "What is this?", bomb)
    half = data_url(Image.new("RGB", (400, 400)))
    with pytest.raises(
        openai.BadRequestError, match="image 2 of 2: it has 400 x 400 pixels, the limit is 90,000"
    ):
        ask(client, "What is this?", half, half)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (data_url(b"no image"), "image 1 of 1: it is not an image in one of the formats"),
        (bundled_picture("emoji-banana")[:422], "it is damaged"),
        ("data:image/png;base64,???", "is not valid base64"),
        ("data:text/html;base64,AAAA", "expected a data URL such as"),
        (
            str(owl2_hf.default_pictures()["emoji-banana"]),
            "paths and bare base64 are not supported",
        ),
        (
            owl2_hf.default_pictures()["emoji-banana"].as_uri(),
            "paths and bare base64 are not supported",
        ),
        (
            bundled_picture("emoji-banana").partition(",")[2],
            "paths and bare base64 are not supported",
        ),
        ("https://example.com/picture.png", "does not fetch URLs"),
        ("", "expected a data URL such as"),
    ],
)
def test_pictures_that_are_not_taken_are_400(client, url, expected):
    with pytest.raises(openai.BadRequestError, match=expected):
        ask(client, "What is this?", url)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{bad",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"messages": ' + b"9" * 5_000 + b"}",
    ],
)
def test_a_body_that_is_not_a_json_object_is_400(server, body):
    status, answer = post(server, body)
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "code"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": "Hi"}, "messages: Input should be a valid list"),
        (
            {"messages": [{"role": "tool", "content": "Hi"}]},
            "messages.0.role: Input should be 'system'",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "Input tag 'input_audio'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}]},
            "Input tag 'image'",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "is not valid Unicode"),
        ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"temperature": float("nan")}, "temperature: Input should be a finite number"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"top_p": 0}, "top_p: Input should be greater than 0"),
        ({"frequency_penalty": -1}, "frequency_penalty: Input should be greater than -1"),
        ({"logit_bias": {"1400": 1}}, "logit_bias: token ids must be below 1400"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"seed": 2**70}, "seed: Input should be less than"),
        ({"stop": ["a"] * 5}, "stop: List should have at most 4 items"),
        ({"stop": ""}, "stop.0: String should have at least 1 character"),
        ({"n": 2}, "n: Input should be 1"),
        ({"tools": []}, "tools: Extra inputs are not permitted"),
        (
            {"generation_config": '{"num_beams": 2}'},
            "generation_config.num_beams: Extra inputs are not permitted",
        ),
        (
            {"generation_config": '{"max_new_tokens": 0}'},
            "generation_config.max_new_tokens: Input should be greater",
        ),
        ({"generation_config": "{"}, "generation_config: Value error"),
        ({"generation_config": "[]"}, "generation_config: Input should be"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs: Extra inputs are not permitted"),
        (
            {"response_format": {"type": "json_object"}},
            "response_format.type: Input should be 'text'",
        ),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, r"a: .*; b: .*; c: .*; \.\.\.$"),
    ],
)
def test_fields_that_are_not_taken_are_400(client, server, fields, expected):
    status, answer = post(server, json.dumps({"messages": message("Hi"), **fields}).encode())
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    with pytest.raises(ValueError, match=expected):
        raise ValueError(answer["error"]["message"])


def test_control_tokens_of_a_message_are_text(client):
    answer = client.chat.completions.create(
        model="default", messages=message("<|image|></s>"), max_tokens=1
    )
    assert answer.usage.prompt_tokens > 8


def test_an_answer_of_the_client_can_be_sent_back(client):
    chat = message("Is red a shape?")
    answer = client.chat.completions.create(model="default", messages=chat).choices[0].message
    chat += [answer, *message("Is a tiger an animal?")]
    assert client.chat.completions.create(
        model="default", messages=[{"role": "developer", "content": "Hi."}, *chat]
    )


def test_other_paths_and_methods(server):
    netloc = urllib.parse.urlsplit(server).netloc
    for method, path, status in (
        ("GET", "/health", 200),
        ("PUT", "/v1/models", 401),
        ("GET", "/", 401),
    ):
        connection = http.client.HTTPConnection(netloc, timeout=30)
        connection.request(method, path)
        assert connection.getresponse().status == status
        connection.close()
    assert post(server, b"{}", path="/v1/models")[0] == 405


def test_signals_end_it_within_seconds_while_it_generates():
    processes = {signal.SIGTERM: launch(), signal.SIGINT: launch()}
    codes = {signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 130}

    def generate(url, stream):
        client = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60)
        options = {
            "model": "default",
            "messages": message("Hi"),
            "logit_bias": ENDLESS,
            "stream": stream,
        }
        cut_off = r"(?i)connection|disconnected|the server is shutting down"
        # Older clients let errors of their transport through.
        with pytest.raises(Exception, match=cut_off):
            for _ in range(50):
                list(client.chat.completions.create(**options))

    with ThreadPoolExecutor(4) as pool:
        urls = [url_of(process) for process in processes.values()]
        under_way = [pool.submit(generate, url, stream) for url in urls for stream in (True, False)]
        time.sleep(1)
        begin = time.monotonic()
        for number, process in processes.items():
            process.send_signal(number)
        for number, process in processes.items():
            _, log = process.communicate(timeout=20)
            assert process.returncode == codes[number], log
            assert "Traceback" not in log
        assert time.monotonic() - begin < 5
        for client in under_way:
            client.result()


NUM_REQUESTS = int(os.environ.get("OWL2_HF_SOAK", "200"))  # more for a soak of hours


def leave_early(client, url):
    stream = client.chat.completions.create(
        model="default",
        messages=message("Hi", url),
        logit_bias=ENDLESS,
        stream=True,
        max_tokens=400,
    )
    next(iter(stream))
    stream.close()


def test_a_soak_of_good_and_bad_requests_leaves_answers_and_memory_alone():
    process = launch(
        "--max-image-pixels", MAX_PIXELS, "--max-body-bytes", MAX_BODY_BYTES, OWL2_HF_API_KEY=KEY
    )
    url = url_of(process)
    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60)
    stranger = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0, timeout=60)
    urls = {name: [bundled_picture(name)] if name else [] for _, name in QUESTIONS}
    expected = [ask(client, text, *urls[name]) for text, name in QUESTIONS]
    picture = urls["emoji-banana"][0]

    def refused(status, ask_it):
        with pytest.raises(openai.APIStatusError) as error:
            ask_it()
        assert error.value.status_code == status

    bad = [
        lambda: refused(400, lambda: ask(client, "Hi", picture[:400])),
        lambda: refused(400, lambda: ask(client, "Hi", data_url(Image.new("1", (8_000, 8_000))))),
        lambda: refused(400, lambda: ask(client, "Hi", "file:///etc/passwd")),
        lambda: refused(400, lambda: ask(client, "Hi", temperature=-1)),
        lambda: refused(400, lambda: ask(client, "word " * 20_000)),
        lambda: refused(401, lambda: ask(stranger, "Hi")),
        lambda: refused(413, lambda: ask(client, "x" * MAX_BODY_BYTES)),
        lambda: leave_early(client, picture),
        lambda: post(url, b"{bad"),
        lambda: post(url, os.urandom(1000)),
    ]

    def request(number):
        draw = random.Random(number)
        if draw.random() < 0.4:
            draw.choice(bad)()
        else:
            index = draw.randrange(len(QUESTIONS))
            text, name = QUESTIONS[index]
            assert ask(client, text, *urls[name]) == expected[index]
        return resident(process.pid)

    try:
        with ThreadPoolExecutor(4) as pool:
            memory = list(pool.map(request, range(NUM_REQUESTS)))
        early, late = (
            statistics.median(part) for part in (memory[NUM_REQUESTS // 4 :][:20], memory[-20:])
        )
        logging.getLogger(__name__).info(
            "%d requests, %.0f MB, then %.0f MB", NUM_REQUESTS, early, late
        )
        assert late < 1.1 * early
        assert [ask(client, text, *urls[name]) for text, name in QUESTIONS] == expected
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def resident(pid):
    """MB of the resident set of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def run_app(built, body):
    """Status and body of an answer of the application itself, without a process around it."""
    sent = []
    received = iter([{"type": "http.request", "body": json.dumps(body).encode()}])

    async def receive():
        message = next(received, None)
        return message if message is not None else await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)

    async def run():
        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": headers,
        }
        scope |= {
            "query_string": b"",
            "http_version": "1.1",
            "scheme": "http",
            "server": ("test", 80),
            "root_path": "",
        }
        try:
            await built(scope, receive, send)
        except RuntimeError as error:  # uvicorn logs it
            assert str(error) == serving.server.FAILED

    asyncio.run(run())
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]).decode()


def test_an_error_of_the_model_is_500_without_its_text():
    model, processor = owl2_hf.load_default()
    generate = model.generate

    def broken(**kwargs):
        raise RuntimeError('a "secret" of /home/user')

    model.generate = broken
    built = serving.build_app("default", model, processor)
    status, body = run_app(built, {"messages": message("Is red a shape?")})
    assert (status, json.loads(body)["error"]["code"]) == (500, "internal_error")
    status, stream = run_app(built, {"messages": message("Is red a shape?"), "stream": True})
    failure = next(line for line in stream.splitlines() if "error" in line)
    assert json.loads(failure.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "secret" not in body + stream
    model.generate = generate
    status, body = run_app(built, {"messages": message("Is red a shape?")})
    assert json.loads(body)["choices"][0]["message"]["content"] == "no"


def test_a_request_that_the_server_cancels_is_503():
    sent = []

    async def app(scope, receive, send):
        await asyncio.sleep(3600)

    async def receive():
        return {"type": "http.request"} if not sent and not receiving else await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)

    async def run():
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        task = asyncio.ensure_future(gate.Gate(app, None, 100)(scope, receive, send))
        await asyncio.sleep(0)
        receiving.append(True)
        await asyncio.sleep(0.05)
        task.cancel()
        await task

    receiving = []
    asyncio.run(run())
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["error"]["code"] == "shutting_down"


def test_more_requests_than_may_wait_are_429(monkeypatch):
    monkeypatch.setattr(gate, "MAX_WAITING", 0)
    built = serving.build_app("default", *owl2_hf.load_default())
    status, body = run_app(built, {"messages": message("Hi")})
    assert (status, json.loads(body)["error"]["type"]) == (429, "rate_limit_error")


def test_a_body_that_does_not_arrive_is_408(monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(gate, "DRAIN_SECONDS", 0.1)
    sent = []

    async def receive():
        await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    asyncio.run(gate.Gate(None, None, 100)(scope, receive, send))
    assert sent[0]["status"] == 408


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["ab", "cd", "ef"], [], "abcdef"),
        (["ab", "cd", "ef"], ["d"], "abc"),
        (["ab", "cd", "ef"], ["bce", "bcd"], "a"),
        (["ab", "cd", "ef"], ["efg"], "abcdef"),
        (["aab"], ["ab", "aa"], ""),
        (["a", "a", "b"], ["aab"], ""),
        (["a", "a", "a", "b", "c"], ["aab"], "a"),
    ],
)
def test_stop_strings_are_found_across_pieces(pieces, stops, expected):
    async def run():
        queue = asyncio.Queue()
        for item in [*pieces, None]:
            queue.put_nowait(item)
        filtered = stopping.StopFilter(queue, stops)
        found = [await filtered.get()]
        while found[-1] is not None:
            found.append(filtered.get_nowait())
        with pytest.raises(asyncio.QueueEmpty):
            filtered.get_nowait()
        return "".join(found[:-1])

    assert asyncio.run(run()) == expected
    assert "".join(pieces)[: stopping.find_stop("".join(pieces), stops)] == expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fe80::1%1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.215.14", True),
        ("::127.0.0.1", False),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
    ],
)
def test_only_public_addresses_are_public(address, expected):
    assert pictures.is_public(address) is expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:{port}/ok", "not public"),
        ("http://localhost:{port}/ok", "not public"),
        ("http://2130706433:{port}/ok", "not public"),
        ("http://0x7f.1:{port}/ok", "not public"),
        ("http://[::1]:{port}/ok", "not public"),
        ("http://user@127.0.0.1:{port}/ok", "not public"),
        ("http:///ok", "expected an http or https URL with a host"),
        ("http://public.test:99999/ok", "Port out of range"),
        ("http://nowhere.invalid/ok", "could not be fetched"),
        ("http://public.test:{port}/missing", "status 404"),
        ("http://public.test:{port}/to-private", "not public"),
        ("http://public.test:{port}/to-file", "expected an http or https URL"),
        ("http://public.test:{port}/loop", "redirects more than 4 times"),
        ("http://public.test:{port}/large", "more than 1,000,000 bytes"),
        ("http://public.test:{port}/slow-header", "took more than 0.5 seconds"),
        ("http://public.test:{port}/slow-body", "took more than 0.5 seconds"),
        ("https://public.test:{port}/ok", "could not be fetched|took more than"),
    ],
)
def test_urls_that_are_not_fetched(web, url, expected):
    begin = time.monotonic()
    with pytest.raises(ValueError, match=expected):
        pictures.read_pictures([url.format(port=web)], allow_http=True)
    assert time.monotonic() - begin < 3


def test_a_public_url_is_fetched(web):
    url = f"http://public.test:{web}/redirect?a=b"
    assert (
        pictures.read_pictures([url, url.replace("http", "HTTP")], allow_http=True)
        == [b"the image"] * 2
    )


def test_the_downloads_of_a_request_have_one_limit(web, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_DOWNLOAD_BYTES", 17)
    url = f"http://public.test:{web}/ok"
    with pytest.raises(
        ValueError, match="image 2 of 2: the downloads of a request have more than 17 bytes"
    ):
        pictures.read_pictures([url, url], allow_http=True)


@pytest.fixture
def web(monkeypatch):
    """Port of a web server whose name `public.test` resolves to an address that counts as public.

    A second look at the name would find another address, as it does where somebody rebinds a name.
    """

    def handle(connection):
        with connection, connection.makefile("rb") as file:
            path = [*file.readline().split(), b"", b""][1].decode(errors="replace")
            while file.readline().strip():
                pass
            redirects = {
                "/redirect?a=b": "/ok",
                "/loop": "/loop",
                "/to-private": f"http://127.0.0.1:{port}/ok",
                "/to-file": "file:///etc/passwd",
            }
            if path in redirects:
                answer = f"HTTP/1.1 302 Found\r\nLocation: {redirects[path]}\r\n\r\n".encode()
            elif path == "/ok":
                answer = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nthe image"
            elif path == "/large":
                answer = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 2_000_000
            elif path.startswith("/slow"):
                answer = b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if path == "/slow-body" else b"")
            else:
                answer = b"HTTP/1.1 404 Not Found\r\n\r\n"
            try:
                connection.sendall(answer)
                while path.startswith("/slow"):
                    connection.sendall(b"x")
                    time.sleep(0.05)
            except OSError:  # the other side has hung up
                pass

    def accept():
        while True:
            try:
                threading.Thread(target=handle, args=[listener.accept()[0]], daemon=True).start()
            except OSError:
                return

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    resolve = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        if host == "public.test":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", port))]
        return resolve(host, *args, **kwargs)

    connect = pictures._connect

    def looked_up(addresses):
        return [(family, ("127.0.0.1", address[1])) for family, address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(
        pictures, "_connect", lambda found, deadline: connect(looked_up(found), deadline)
    )
    monkeypatch.setattr(pictures, "DOWNLOAD_SECONDS", 0.5)
    monkeypatch.setattr(pictures, "MAX_DOWNLOAD_BYTES", 1_000_000)
    threading.Thread(target=accept, daemon=True).start()
    yield port
    listener.close()


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch):
    looked_up, connected = [], []

    def getaddrinfo(host, port, *args, **kwargs):
        looked_up.append(host)
        address = "93.184.215.14" if len(looked_up) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(self, address):
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(ValueError, match=r"could not be fetched \(ConnectionRefusedError\)"):
        pictures.read_pictures(["http://rebinding.test/picture.png"], allow_http=True)
    assert (looked_up, connected) == (["rebinding.test"], [("93.184.215.14", 80)])


def test_a_name_with_one_private_address_is_refused(monkeypatch):
    found = [(socket.AF_INET, 1, 6, "", (address, 80)) for address in ("93.184.215.14", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    with pytest.raises(ValueError, match="not public"):
        pictures.read_pictures(["http://both.test/"], allow_http=True)


def run_cli(*arguments, **environment):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)], env=environment)


def test_the_command_names_mistakes_in_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run_cli("--port", taken.getsockname()[1])
    assert result.exit_code == 1
    assert "choose another --port" in result.stderr
    result = run_cli(tmp_path, "--port", 0)
    assert result.exit_code == 1
    assert str(tmp_path) in result.stderr
    result = run_cli("--port", 0, "--api-key", "")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "the API key is empty" in result.stderr
    assert run_cli("--max-new-tokens", 0).exit_code == 2


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        serving.ServerSettings(max_new_tokens=0)


def test_another_family_s_model_is_refused():
    with pytest.raises(
        ValueError, match="it: expected an MplugOwl2ForConditionalGeneration, got Linear"
    ):
        serving.build_app("it", torch.nn.Linear(1, 1), None)


def test_without_the_extra_the_command_says_what_to_install():
    code = """
import sys, transformers.utils.import_utils as utils
utils.is_serve_available = lambda: False
from owl2_hf.cli import app
app(["serve"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert (
        result.stderr
        == "owl2-hf: the server needs fastapi, uvicorn and openai: pip install 'owl2_hf[serve]'.\n"
    )


def test_a_request_takes_what_has_no_effect():
    body = {
        "messages": message("Hi"),
        "user": "me",
        "stream_options": {"include_usage": True},
        "n": 1,
        "stop": "a",
    }
    assert parse_request(body).stop == ["a"]


def talk(url, lines, *arguments, expected, timeout=90, **environment):
    """What `transformers chat` shows in a terminal when these lines are typed, one after each
    answer.
    """
    pty = pytest.importorskip("pty", reason="a terminal of Unix")
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "chat", "default", url, *arguments]
    main, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", **environment}
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=environment)
    os.close(other)
    shown, deadline, rest = "", time.monotonic() + timeout, list(lines)
    try:
        while time.monotonic() < deadline:
            ready, _, _ = select.select([main], [], [], 1)
            try:
                shown += os.read(main, 4096).decode(errors="replace") if ready else ""
            except OSError:  # the other end has closed
                break
            if rest and shown.count(expected) > len(lines) - len(rest):
                os.write(main, f"{rest.pop(0)}\n".encode())
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown), process.wait(5)
    finally:
        process.kill()
        process.wait()
        os.close(main)


def test_the_chat_of_transformers_finds_the_one_model_there(server):
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server).netloc, timeout=30)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    for name, status in (("default", "ready"), ("other/model", "error")):
        connection.request("POST", "/load_model", json.dumps({"model": name}), headers)
        event = json.loads(connection.getresponse().read().decode().removeprefix("data: "))
        assert event["status"] == status
    assert event["message"] == "unknown model 'other/model': this server has 'default'."
    assert post(server, b'{"model": 5}', path="/load_model")[0] == 400
    assert (
        post(server, b'{"model": "default"}', {"Authorization": ""}, path="/load_model")[0] == 401
    )


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"do_sample": True, "max_new_tokens": 7}, {"do_sample": True, "max_new_tokens": 7}),
        ({"temperature": 0, "do_sample": True}, {"do_sample": False}),
        (
            {"top_k": 3, "top_p": 0.5, "repetition_penalty": 1.5},
            {"top_k": 3, "top_p": 0.5, "repetition_penalty": 1.5},
        ),
    ],
)
def test_the_settings_of_transformers_chat_are_taken(wanted, expected):
    handler = ChatHandler(
        PinnedModel("default", *owl2_hf.load_default()), GenerationState(), serving.ServerSettings()
    )
    body = {
        "messages": message("Hi"),
        "generation_config": json.dumps({**wanted, "transformers_version": "5"}),
    }
    config = handler._configure(parse_request(body), 5)
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_chat_of_transformers_works():
    pytest.importorskip("rich")
    process = launch()
    try:
        url = url_of(process)
        lines = ["What kind of thing is a banana?", "Is a tiger an animal?", "!exit"]
        options = ["do_sample=False", "max_new_tokens=20", "--user", "tester"]
        shown, code = talk(url, lines, *options, expected="tester", HF_HUB_OFFLINE="0", HF_TOKEN="")
        assert code == 0 and "Traceback" not in shown
        assert "default was already loaded" in shown
        client = openai.OpenAI(base_url=url, api_key="none")
        assert ask(client, lines[0]).strip() in shown
    finally:
        process.kill()
        process.communicate()
