"""`POST /v1/score`: a running server, the client of docs/rewards.md, and the parts where a process
cannot show them.
"""

import asyncio
import json
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import owl2_hf
from owl2_hf.scoring import Scorer, custom_preset
from owl2_hf.scoring.presets import PRESET_FILE

try:
    from owl2_hf import serving
    from owl2_hf.serving.scores import FAILED, Batcher
    from owl2_hf.serving.server import Generator
except ValueError as missing:
    pytest.skip(str(missing), allow_module_level=True)

from benchmarks import score_soak
from benchmarks.score_soak import KEY, ask, ask_by_form, png, post

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
PRESET = custom_preset("one-align", levels=["high", "soft", "bad"])
MAX_PIXELS, MAX_BODY_BYTES = 250_000, 300_000


@pytest.fixture(scope="module")
def parts():
    return owl2_hf.load_default(dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """A scorer in float32, with its preset beside the weights."""
    folder = tmp_path_factory.mktemp("scorer")
    for part in parts:
        part.save_pretrained(folder)
    (folder / PRESET_FILE).write_text(PRESET.to_json(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def url(folder):
    limits = ["--max-image-pixels", str(MAX_PIXELS), "--max-body-bytes", str(MAX_BODY_BYTES)]
    with score_soak.serving(str(folder), *limits) as (url, _):
        yield url


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (11, 40, 56, 3), dtype=np.uint8)
    return [
        Image.fromarray(one).resize((8 + 4 * index, 9)).resize((56, 40))
        for index, one in enumerate(noise)
    ]


@pytest.fixture(scope="module")
def expected(parts, images):
    found = Scorer(*parts, PRESET)(images)
    assert max(one.score for one in found) - min(one.score for one in found) > 0.01
    return found


@pytest.mark.parametrize("send", [ask, ask_by_form])
def test_the_scores_are_the_scorer_s(url, folder, images, expected, send):
    status, body = send(url, [png(image) for image in images])
    assert status == 200, body
    assert body["model"] == str(folder) and body["task"] == "quality"
    assert body["scale"] == [1, 5] and body["levels"] == ["high", "soft", "bad"]
    assert [one["index"] for one in body["data"]] == [*range(len(images))]
    for one, other in zip(body["data"], expected, strict=True):
        assert one["score"] == pytest.approx(other.score, abs=1e-5)
        assert one["std"] == pytest.approx(other.std, abs=1e-4)
        assert one["probs"] == pytest.approx(other.probs, abs=1e-5)


@pytest.mark.parametrize("send", [ask, ask_by_form])
def test_preset_task_and_levels_of_a_request_count(url, parts, images, send):
    options = {"preset": "q-instruct", "levels": ["yes", "no"]}
    status, body = send(url, [png(images[0])], **options)
    [other] = Scorer(*parts, custom_preset("q-instruct", levels=["yes", "no"]))(images[0])
    assert status == 200, body
    assert body["scale"] == [0, 1]
    assert body["data"][0]["score"] == pytest.approx(other.score, abs=1e-5)
    status, body = send(url, [png(images[0])], task="aesthetics")
    [other] = Scorer(*parts, PRESET)(images[0], task="aesthetics")
    assert body["data"][0]["score"] == pytest.approx(other.score, abs=1e-5)


def test_many_clients_at_once_get_their_own_scores(url, images, expected):
    def one(index):
        send = [ask, ask_by_form][index % 2]
        options = {"task": "aesthetics"} if index % 3 == 0 else {}
        status, body = send(url, [png(images[index]), png(images[0])], **options)
        assert status == 200, body
        return [found["score"] for found in body["data"]]

    alone = [one(index) for index in range(len(images))]
    with ThreadPoolExecutor(len(images)) as pool:
        for _ in range(3):
            together = list(pool.map(one, range(len(images))))
            for scores, others in zip(together, alone, strict=True):
                assert scores == pytest.approx(others, abs=1e-5)
    assert alone[1][0] == pytest.approx(expected[1].score, abs=1e-5)


def test_a_bad_request_says_what_was_expected(url, images):
    file = png(images[0])
    form = {"Content-Type": "multipart/form-data; boundary=abc"}
    wide = png(Image.new("1", (400, 400)))
    cases = [
        (ask(url, [file, file[:50]]), 400, "image 2 of 2: it is damaged"),
        (ask(url, [b"text"]), 400, "image 1 of 1: it is not"),
        (ask(url, [wide, wide]), 400, "image 2 of 2: it has 400 x 400 pixels"),
        (ask(url, []), 400, "images: "),
        (ask(url, 257 * [b""]), 400, "images: .*at most 256"),
        (ask(url, [file], preset="deqa"), 400, "levels: the level 'excellent' is not one token"),
        (ask(url, [file], preset="none"), 400, "expected a preset of one-align"),
        (ask(url, [file], task="beauty"), 400, "expected a task of quality"),
        (ask(url, [file], task="video"), 400, "task: expected a task for images"),
        (ask(url, [file], levels=["high"]), 400, "levels: "),
        (ask(url, [file], levels=[" ", "high"]), 400, "levels.0: "),
        (ask(url, [file], levels=["\ud800", "high"]), 400, "levels"),
        (ask(url, [file], crops=True), 400, "crops: "),
        (ask(url, [file], model="other"), 404, "unknown model 'other'"),
        (ask_by_form(url, [file], model="other"), 404, "unknown model 'other'"),
        (ask_by_form(url, [file], levels="high"), 400, "levels: "),
        (ask_by_form(url, [file], images="text"), 400, "'images': expected files"),
        (ask_by_form(url, [], task="quality"), 400, "images: expected at least one file"),
        (ask_by_form(url, 257 * [b""]), 400, "Too many files"),
        (post(url, b'{"images": ["/etc/passwd"]}'), 400, "expected a data URL"),
        (post(url, b'{"images": ["http://127.0.0.1/a.png"]}'), 400, "does not fetch URLs"),
        (post(url, b"[" * 100_000), 400, "expected a JSON object"),
        (post(url, b"{}", {}), 400, "expected a JSON object"),
        (post(url, b"[]"), 400, ""),
        (post(url, b"x", form), 400, "multipart"),
        (post(url, b"x", {"Content-Type": "multipart/form-data"}), 400, "boundary"),
        (post(url, b"{}", key="wrong"), 401, "API key"),
        (post(url, b"x" * (MAX_BODY_BYTES + 1)), 413, "at most 300,000 bytes"),
    ]
    for (status, body), expected_status, message in cases:
        assert (status, *body) == (expected_status, "error"), (body, message)
        assert re.search(message, body["error"]["message"]), (body, message)
    assert ask(url, [file])[0] == 200


class Harmful:
    """What would write a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_runs_nothing(url, tmp_path):
    proof = tmp_path / "it ran"
    body = pickle.dumps({"images": [Harmful(proof)]})
    for kind in ({}, {"Content-Type": "application/json"}, {"Content-Type": "multipart/form-data"}):
        assert post(url, body, kind)[0] == 400
    for send in (ask, ask_by_form):
        status, answer = send(url, [body])
        assert status == 400 and "image 1 of 1: it is not" in answer["error"]["message"]
    assert not proof.exists()
    pickle.loads(body)  # noqa: S301  # so that the test can fail
    assert proof.exists()


def test_a_model_without_the_level_words_says_so():
    with score_soak.serving() as (url, _):
        file = png(Image.new("RGB", (8, 8)))
        status, body = ask(url, [file])
        assert status == 400 and "'excellent' is not one token" in body["error"]["message"]
        assert ask(url, [file], levels=["high", "soft", "bad"])[0] == 200


def call(built, body):
    """Awaitable for status and JSON of the application itself."""
    sent, received = [], [json.dumps(body).encode()]

    async def receive():
        if received:
            return {"type": "http.request", "body": received.pop()}
        return await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)

    async def run():
        scope = {"type": "http", "method": "POST", "path": "/v1/score", "query_string": b""}
        scope |= {"http_version": "1.1", "scheme": "http", "server": ("test", 80), "root_path": ""}
        scope["headers"] = [(b"content-type", b"application/json")]
        try:
            await built(scope, receive, send)
        except RuntimeError as error:  # uvicorn logs it
            assert str(error) == FAILED
        return sent[0]["status"], json.loads(b"".join(one.get("body", b"") for one in sent[1:]))

    return run()


def body_of(*images, **options):
    import base64

    urls = ["data:image/png;base64," + base64.b64encode(png(image)).decode() for image in images]
    return {"images": urls, **options}


def test_images_that_wait_go_through_the_model_together(parts, images, expected):
    model, processor = parts
    settings = serving.ServerSettings(batch_size=4)
    built = serving.build_app("it", model, processor, settings, PRESET)
    sizes, free = [], threading.Event()
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )

    async def run():
        built.generator.submit(free.wait)  # the model is busy
        bodies = [body_of(image) for image in images[:5]]
        bodies += [body_of(images[5], task="aesthetics"), body_of(*images[6:8])]
        answers = [asyncio.ensure_future(call(built, body)) for body in bodies]
        await asyncio.sleep(2)
        free.set()
        return await asyncio.gather(*answers)

    try:
        answers = asyncio.run(run())
    finally:
        hook.remove()
    assert [status for status, _ in answers] == 7 * [200]
    scores = [one["score"] for _, body in answers for one in body["data"]]
    assert scores[:5] == pytest.approx([one.score for one in expected[:5]], abs=1e-5)
    assert scores[6:] == pytest.approx([one.score for one in expected[6:8]], abs=1e-5)
    # Four and three of quality, and the one of aesthetics, whose prompt is another.
    assert sorted(sizes) == [1, 3, 4]


def test_an_image_of_a_client_that_has_gone_is_not_scored():
    generator, free = Generator(), threading.Event()
    batcher = Batcher(generator, 8)
    seen = []

    class Recorder:
        preset = PRESET

        def score_prepared(self, inputs):
            seen.append(inputs["input_ids"].flatten().tolist())
            return inputs["input_ids"].flatten().tolist()

    async def run():
        generator.submit(free.wait)
        scorer = Recorder()
        futures = [
            batcher.submit(scorer, "quality", {"input_ids": torch.tensor([[index]])})
            for index in range(4)
        ]
        futures[1].cancel()
        await asyncio.sleep(0)
        assert len(batcher._waiting) == 3  # nothing of it is kept
        free.set()
        return await asyncio.gather(*futures, return_exceptions=True)

    found = asyncio.run(run())
    assert seen == [[0, 2, 3]]
    assert found[0] == 0 and isinstance(found[1], asyncio.CancelledError) and found[2:] == [2, 3]


def test_an_error_of_the_model_is_500_without_its_text(parts, images, expected, monkeypatch):
    built = serving.build_app("it", *parts, preset=PRESET)

    def broken(self, inputs):
        raise ValueError("a secret of /home/user")

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score_prepared", broken)
        status, body = asyncio.run(call(built, body_of(images[0])))
    assert (status, body["error"]["message"]) == (500, FAILED)
    assert body["error"]["code"] == "internal_error" and "secret" not in str(body)
    # More images than there is room for at once: nothing of the failed ones still takes it.
    built = serving.build_app("it", *parts, serving.ServerSettings(batch_size=1), PRESET)
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score_prepared", broken)
        assert asyncio.run(call(built, body_of(*images)))[0] == 500


def test_room_is_given_back_after_bad_images_and_clients_that_leave(parts, images, expected):
    built = serving.build_app("it", *parts, serving.ServerSettings(batch_size=1), PRESET)
    broken = body_of(images[0])
    broken["images"] += ["data:image/png;base64,AAAA"]

    async def run():
        for _ in range(4):
            assert (await call(built, broken))[0] == 400
            left = asyncio.ensure_future(call(built, body_of(*images)))
            await asyncio.sleep(0.02)
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
        return await call(built, body_of(*images))

    status, body = asyncio.run(asyncio.wait_for(run(), 60))
    assert status == 200
    scores = [one["score"] for one in body["data"]]
    assert scores == pytest.approx([one.score for one in expected], abs=1e-5)


def test_settings_refuse_an_empty_batch():
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        serving.ServerSettings(batch_size=0)


def functions_of(page):
    """What the Python blocks of the page define."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, "rewards.md", "exec"), names)
    return names


@pytest.fixture
def page(folder, images, tmp_path, monkeypatch, capsys):
    """The names that the page defines, with the small scorer as path/to/deqa."""
    pytest.importorskip("requests")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "deqa").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(owl2_hf.scoring.PRESETS, "deqa", PRESET)
    names = functions_of(PAGE)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(printed) == 2 and all(0 <= score <= 1 for score in printed)
    return names


FORMS = {
    "tensor": lambda images: (
        torch.stack([torch.from_numpy(np.array(one)) for one in images]).permute(0, 3, 1, 2) / 255
    ),
    "array": lambda images: np.stack([np.asarray(one) for one in images]),
    "PIL": list,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_page_replaces_flow_grpo_s_function(page, url, images, expected, form, monkeypatch):
    monkeypatch.setenv("DEQA_URL", url.removesuffix("/v1"))
    monkeypatch.setenv("OWL2_HF_API_KEY", KEY)
    batch = FORMS[form](images)
    for name in ("deqa_score_remote", "deqa_score"):
        factory = page[name]
        # flow_grpo looks at the names of a function, gives it a device if it takes one, and weighs
        # its scores.
        assert "device" in factory.__code__.co_varnames
        scores, info = factory(torch.device("cpu"))(batch, ["a prompt"] * len(images), [{}])
        weighed = torch.as_tensor([0.5 * score for score in scores]).float()
        assert info == {}
        assert scores == pytest.approx([one.score / 5 for one in expected], abs=1e-5), name
        assert weighed.shape == (len(images),)


def test_the_page_s_client_raises_what_the_server_says(page, url, images, monkeypatch):
    monkeypatch.setenv("DEQA_URL", url.removesuffix("/v1"))
    monkeypatch.setenv("OWL2_HF_API_KEY", "wrong")
    with pytest.raises(RuntimeError, match=r"401: .*API key"):
        page["deqa_score_remote"]("cpu")(images[:1], [""], [{}])


def test_a_soak_of_good_and_bad_requests_leaves_scores_and_memory_alone():
    with score_soak.serving(*score_soak.OPTIONS) as (url, pid):
        report = score_soak.soak(url, pid, 200)
    assert report.is_flat, report
    assert report.refused > 50 and report.images > 200
