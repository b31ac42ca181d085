"""Requests for scores, good and bad at random, against a running server: right answers, and memory
that stays.

    python -m benchmarks.score_soak --requests 2000 --json score_soak.json

The server is a process of its own with the small bundled model; eight clients ask at once. The exit
code is 1 where an answer is wrong or memory grows by a tenth.
"""

import http.client
import json
import os
import pickle
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.parse
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

import owl2_hf

from .timing import parser, write

KEY = "a key"
LEVELS = ["high", "soft", "bad"]  # words of the small model
OPTIONS = ["--max-image-pixels", "600000", "--max-body-bytes", "300000"]
LIMIT = 1.1  # of memory at the end, over that after a quarter of the requests
JSON = {"Content-Type": "application/json"}


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, int]]:
    """URL and process id of a server that runs meanwhile."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OWL2_HF_API_KEY": KEY,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "owl2_hf", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("serving "):
            raise RuntimeError("the server did not start.")
        yield line.split()[-1], process.pid
        if process.poll() is not None:
            raise RuntimeError("the server has gone down.")
    finally:
        process.kill()
        process.communicate()


def post(
    url: str, body: bytes, headers: dict[str, str] | None = None, key: str = KEY
) -> tuple[int, Any]:
    """Status and JSON of the answer of `POST /v1/score`."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=120)
    try:
        headers = {"Authorization": f"Bearer {key}", **(JSON if headers is None else headers)}
        connection.request("POST", "/v1/score", body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def ask(url: str, files: list[bytes], **options: Any) -> tuple[int, Any]:
    """The answer to data URLs in JSON."""
    images = ["data:image/png;base64," + b64encode(file).decode() for file in files]
    return post(url, json.dumps({"images": images, **options}).encode())


def ask_by_form(url: str, files: list[bytes], **options: Any) -> tuple[int, Any]:
    """The answer to files in multipart/form-data."""
    boundary = b"boundary-of-the-parts"
    parts = [
        b'name="images"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n' + file
        for file in files
    ]
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        parts += [f'name="{name}"\r\n\r\n{one}'.encode() for one in values]
    body = b"".join(
        b"--" + boundary + b"\r\nContent-Disposition: form-data; " + part + b"\r\n"
        for part in parts
    )
    kind = "multipart/form-data; boundary=" + boundary.decode()
    return post(url, body + b"--" + boundary + b"--\r\n", {"Content-Type": kind})


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def leave_early(url: str, body: bytes) -> tuple[int, Any]:
    """Send a request and go without waiting for the answer."""
    parts = urllib.parse.urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as sock:
        head = f"POST /v1/score HTTP/1.1\r\nHost: it\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
    return 0, None


def bad_requests(url: str, file: bytes) -> list[tuple[int, Callable[[], tuple[int, Any]]]]:
    """Status -> request; 0 where nobody waits for it."""
    whole = {"images": ["data:image/png;base64," + b64encode(file).decode()], "levels": LEVELS}
    form = {"Content-Type": "multipart/form-data; boundary=abc"}
    return [
        (400, lambda: ask(url, [file, file[:60]], levels=LEVELS)),
        (400, lambda: ask_by_form(url, [b"no image"], levels=LEVELS)),
        (400, lambda: ask(url, [png(Image.new("1", (8_000, 8_000)))], levels=LEVELS)),
        (400, lambda: ask(url, 5 * [png(Image.new("1", (400, 400)))], levels=LEVELS)),
        (400, lambda: ask(url, 257 * [png(Image.new("1", (1, 1)))], levels=LEVELS)),
        (400, lambda: ask(url, [])),
        (400, lambda: ask(url, [file])),  # the small model lacks the default levels
        (400, lambda: ask(url, [file], preset="none")),
        (400, lambda: ask(url, [file], levels=LEVELS, task="video")),
        (400, lambda: ask(url, [file], levels=LEVELS, temperature=1)),
        (400, lambda: ask_by_form(url, [file], levels="high")),
        (400, lambda: post(url, b'{"images": ["file:///etc/passwd"]}')),
        (400, lambda: post(url, b"{bad")),
        (400, lambda: post(url, b"[" * 100_000)),
        (400, lambda: post(url, os.urandom(1000), form)),
        (400, lambda: post(url, pickle.dumps({"images": [file]}), {})),
        (401, lambda: post(url, b"{}", key="wrong")),
        (404, lambda: ask(url, [file], levels=LEVELS, model="other")),
        (413, lambda: post(url, b"x" * 300_001)),
        (0, lambda: leave_early(url, json.dumps(whole).encode())),
    ]


@dataclass
class Report:
    """What a soak has found; memory in MB."""

    requests: int
    images: int
    refused: int
    seconds: float
    memory_early: float
    memory_late: float

    @property
    def is_flat(self) -> bool:
        return self.memory_late < LIMIT * self.memory_early


def soak(url: str, pid: int, num_requests: int, num_clients: int = 8) -> Report:
    """Ask `num_requests` times.

    Raises:
        RuntimeError: An answer is wrong; the message says which.
    """
    files = [path.read_bytes() for path in owl2_hf.default_pictures().values()]
    bad = bad_requests(url, files[0])

    def scores(answer: tuple[int, Any]) -> list[float]:
        status, body = answer
        if status != 200:
            raise RuntimeError(f"expected scores, got {status}: {body}")
        return [found["score"] for found in body["data"]]

    expected = [scores(ask(url, [file], levels=LEVELS))[0] for file in files]

    def request(number: int) -> tuple[int, float]:
        """Images that were scored, and the server's memory."""
        draw = random.Random(number)
        if draw.random() < 0.4:
            index = draw.randrange(len(bad))
            status, run = bad[index]
            answer = run()
            if answer[0] != status:
                raise RuntimeError(f"bad request {index}: expected {status}, got {answer}")
            return 0, resident(pid)
        chosen = [draw.randrange(len(files)) for _ in range(draw.randint(1, 4))]
        send = draw.choice([ask, ask_by_form])
        found = scores(send(url, [files[index] for index in chosen], levels=LEVELS))
        for index, score in zip(chosen, found, strict=True):
            # The bundled model has bfloat16 weights, whose sums depend on the size of a batch.
            if abs(score - expected[index]) > 0.05:
                raise RuntimeError(f"image {index}: expected {expected[index]}, got {score}")
        return len(found), resident(pid)

    start = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as pool:
        results = list(pool.map(request, range(num_requests)))
    taken = time.perf_counter() - start
    memory = [used for _, used in results]
    window = max(20, num_requests // 20)
    return Report(
        requests=num_requests,
        images=sum(count for count, _ in results),
        refused=sum(count == 0 for count, _ in results),
        seconds=taken,
        memory_early=statistics.median(memory[num_requests // 4 :][:window]),
        memory_late=statistics.median(memory[-window:]),
    )


def resident(pid: int) -> float:
    """MB of the resident set of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--requests", type=int, default=2000)
    args = options.parse_args()
    with serving(*OPTIONS) as (url, pid):
        report = soak(url, pid, args.requests)
    print(
        f"{report.requests} requests, {report.refused} of them bad or left, {report.images} images "
        f"scored in {report.seconds:.0f} s; memory {report.memory_early:.0f} MB after a quarter, "
        f"{report.memory_late:.0f} MB at the end"
    )
    write(args.json, args, vars(report))
    if not report.is_flat:
        sys.exit(1)


if __name__ == "__main__":
    main()
