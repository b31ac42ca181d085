"""`owl2-hf demo`: its parts, the page through gradio's own client, and the page in a browser."""

import functools
import importlib.machinery
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

import owl2_hf
from owl2_hf.cli import app
from owl2_hf.scoring import custom_preset

gradio_client = pytest.importorskip(
    "gradio_client", reason="gradio is not installed: pip install 'owl2_hf[demo]'"
)
from owl2_hf import demo  # noqa: E402
from owl2_hf.demo.chat import problem, to_messages  # noqa: E402

ROOT = Path(__file__).parents[2]
MAX_PIXELS = 500 * 500
MAX_NEW_TOKENS = 1500
YES_NO = custom_preset(
    "one-align", "quality", "USER: <|image|>Is this an animal? ASSISTANT:", ["yes", "no"]
)


def picture(name="emoji-banana"):
    return str(owl2_hf.default_pictures()[name])


def user(text="", *paths):
    pictures = [{"type": "image", "image": path} for path in paths]
    return {
        "role": "user",
        "content": [*pictures, *([{"type": "text", "text": text}] if text else [])],
    }


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def loaded():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield owl2_hf.load_default()
    torch.set_num_threads(before)


@pytest.fixture
def worker(loaded):
    return demo.ModelWorker(*loaded, "default", demo.DemoSettings(MAX_PIXELS, MAX_NEW_TOKENS))


@pytest.fixture
def endless(loaded, monkeypatch):
    """The model never ends an answer; the list grows with each of its steps."""
    model, steps = loaded[0], []
    monkeypatch.setattr(
        model.generation_config, "suppress_tokens", [model.generation_config.eos_token_id]
    )
    handle = model.register_forward_hook(lambda *_: steps.append(1))
    yield steps
    handle.remove()


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(Path(picture()).read_bytes()[:300])
    return str(path)


# Chats as messages


def test_questions_and_answers_become_messages_pictures_first():
    history = [
        {
            "role": "user",
            "content": [
                {"type": "file", "file": {"path": "a.png"}},
                {"type": "text", "text": "What?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
    messages = to_messages(history, {"text": "And these?", "files": ["b.png", "c.png"]})
    assert messages == [
        user("What?", "a.png"),
        assistant("a cat"),
        user("And these?", "b.png", "c.png"),
    ]


def test_contents_that_gradio_has_not_put_in_order_yet_are_read_too():
    history = [
        {"role": "user", "content": [{"path": "a.png"}, "What?"]},
        {"role": "assistant", "content": "a cat"},
    ]
    assert to_messages(history, {"text": "Sure?"}) == [
        user("What?", "a.png"),
        assistant("a cat"),
        user("Sure?"),
    ]


@pytest.mark.parametrize(
    "answer", [[], [{"role": "assistant", "content": ""}], [problem("it is damaged")]]
)
def test_a_question_without_an_answer_is_left_out(answer):
    history = [{"role": "user", "content": [{"path": "broken.png"}, "What?"]}, *answer]
    assert to_messages(history, {"text": "And now?", "files": []}) == [user("And now?")]


def test_an_empty_question_is_refused():
    with pytest.raises(ValueError, match="the question is empty: write one, or add an image"):
        to_messages([], {"text": " \n", "files": []})


# The model behind the page


def test_the_answer_grows_to_what_describe_says(worker):
    pieces = list(worker.answer([user("What is this?", picture())], 64))
    result = CliRunner().invoke(app, ["describe", picture(), "-q", "What is this?"])
    assert pieces[-1].strip() == result.stdout.strip() == "banana"
    assert all(later.startswith(earlier) for earlier, later in pairwise(pieces))


def test_a_later_question_is_about_the_first_picture(worker):
    chat = [
        user("What is this?", picture()),
        assistant("banana"),
        user("What kind of thing is it?"),
    ]
    inputs = worker._prepare(chat)
    assert int(inputs["mm_token_type_ids"].sum()) == worker.processor.num_image_tokens
    assert list(worker.answer(chat, 64))[-1].strip()


def test_sampling_follows_temperature_and_top_p(worker):
    def ask(**settings):
        torch.manual_seed(0)
        return list(worker.answer([user("What is this?", picture())], 8, **settings))[-1]

    greedy = ask()
    # So little of the probability is the likeliest token alone.
    assert ask(temperature=2.0, top_p=0.01) == greedy
    assert len({ask(temperature=2.0), greedy}) == 2


def test_the_longest_answer_is_the_smallest_of_what_is_asked_allowed_and_left(loaded, endless):
    worker = demo.ModelWorker(*loaded, "default", demo.DemoSettings(max_new_tokens=5))
    for asked, expected in ((3, 3), (7, 5)):
        endless.clear()
        list(worker.answer([user("What is this?")], asked))
        assert len(endless) == expected
    size = worker.context.size
    prompt = worker.context.room(0) - 2
    assert worker.context.room(prompt) == 2 and size == 2048


def test_closing_the_answer_ends_the_generation(worker, endless):
    answer = worker.answer([user("What is this?", picture())], MAX_NEW_TOKENS)
    assert any(text for text in answer)
    answer.close()
    assert worker._turn.acquire(timeout=5)
    assert 0 < len(endless) < MAX_NEW_TOKENS


def test_closing_the_page_ends_the_generation(worker, endless):
    answer = worker.answer([user("What is this?", picture())], MAX_NEW_TOKENS)
    assert any(text for text in answer)
    assert worker.close(5)
    assert 0 < len(endless) < MAX_NEW_TOKENS


def test_a_visitor_who_waits_can_leave(worker, endless):
    with worker._turn:
        answer = worker.answer([user("What is this?")], 8)
        assert next(answer) == ""
        answer.close()
    time.sleep(0.1)
    with worker._turn:
        assert not endless


def test_a_failure_of_the_generation_reaches_the_page(worker, monkeypatch):
    def fail(**kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(worker.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(worker.answer([user("What is this?")], 8))
    assert worker._turn.acquire(timeout=1)


def test_a_broken_picture_is_named_and_its_place_is_not(worker, broken):
    with pytest.raises(ValueError, match=r"^broken\.png: it is damaged"):
        list(worker.answer([user("What is this?", picture(), broken)], 8))


def test_the_pixels_of_all_pictures_count_together(worker, tmp_path):
    paths = [str(tmp_path / f"{index}.png") for index in range(2)]
    for path in paths:
        Image.new("RGB", (400, 400)).save(path)
    list(worker.answer([user("What is this?", paths[0])], 1))
    with pytest.raises(ValueError, match=r"^1\.png: it has 400 x 400 pixels, the limit is 90,000"):
        list(worker.answer([user("What is this?", *paths)], 1))


def test_messages_longer_than_the_context_are_refused(worker):
    with pytest.raises(ValueError, match="the messages are longer than the context of 2048 tokens"):
        list(worker.answer([user("a" * 100_000)], 8))
    with pytest.raises(
        ValueError, match=r"the context of the model, got a prompt of \d+; shorten the prompt"
    ):
        list(worker.answer([user("? " * 3000)], 8))


def test_a_picture_that_was_deleted_is_asked_for_again(worker, tmp_path):
    with pytest.raises(
        ValueError, match="an uploaded image no longer exists: start a new chat and upload it again"
    ):
        list(worker.answer([user("What is this?", str(tmp_path / "gone.png"))], 8))


def test_scores_are_those_of_the_command_and_a_broken_picture_costs_no_other(worker, broken):
    found = dict(worker.score([picture(), broken, picture("shapes-0")], YES_NO, "quality"))
    assert re.match(r"broken\.png: it is damaged", str(found["broken.png"]))
    command = ["score", picture(), picture("shapes-0"), "--model", "default", "--levels", "yes,no"]
    result = CliRunner().invoke(
        app, [*command, "--prompt", YES_NO.prompts["quality"], "--csv", "--batch-size", "1"]
    )
    rows = [line.split(",") for line in result.stdout.splitlines()[1:]]
    assert [float(row[1]) for row in rows] == pytest.approx(
        [found["emoji-banana.png"].score, found["shapes-0.png"].score], abs=1e-5
    )


def test_the_analysis_has_the_figures_of_the_command(worker):
    lines, figures = worker.analyze([picture(), picture("shapes-0")], "What is this?")
    assert lines[0] == "default (with the modality-adaptive module)"
    assert "given image: 'banana'" in lines[1]
    assert set(figures) == {"attention", "norms", "query_maps", "query_maps_unrelated"}
    assert all(min(figure.size) > 300 for figure in figures.values())


def test_an_analysis_needs_one_picture_and_a_question(worker):
    with pytest.raises(
        ValueError, match="expected one image and at most one unrelated image, got 0"
    ):
        worker.analyze([], "What is this?")
    with pytest.raises(ValueError, match="the question is empty: write one about the image"):
        worker.analyze([picture()], " ")


@pytest.mark.parametrize("name", ["max_image_pixels", "max_new_tokens"])
def test_limits_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        demo.DemoSettings(**{name: 0})


def test_another_familys_model_is_refused(loaded):
    with pytest.raises(
        ValueError, match="gpt: expected an MplugOwl2ForConditionalGeneration, got Linear"
    ):
        demo.build_page(torch.nn.Linear(1, 1), loaded[1], "gpt")


# The page, as gradio's client sees it


@pytest.fixture(scope="module")
def address(loaded, tmp_path_factory):
    """A page in this process, so that a test can see its model work."""
    uploads = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        page = demo.build_page(*loaded, "default", demo.DemoSettings(MAX_PIXELS, MAX_NEW_TOKENS))
        page.launch(server_name="127.0.0.1", prevent_thread_lock=True, **demo.LAUNCH_OPTIONS)
        yield page.local_url
        assert any(uploads.rglob("*broken*")), "nothing was uploaded"
        page.close(verbose=False)
        assert not list(uploads.rglob("*broken*")), "uploads stay behind"


@pytest.fixture
def client(address):
    with closing(gradio_client.Client(address, verbose=False)) as client:
        yield client


def asked(text, *paths):
    return {"text": text, "files": [gradio_client.handle_file(path) for path in paths]}


def test_a_chat_goes_on_after_a_broken_picture_and_visitors_have_chats_of_their_own(
    client, address, broken
):
    assert (
        client.predict(asked("What is this?", picture()), 64, 0, 1, api_name="/chat").strip()
        == "banana"
    )
    told = client.predict(asked("And this?", broken), 64, 0, 1, api_name="/chat")
    assert (told["metadata"]["title"], told["content"][:25]) == (
        "No answer",
        "broken.png: it is damaged",
    )
    with_picture = client.predict(asked("What kind of thing is it?"), 64, 0, 1, api_name="/chat")
    with closing(gradio_client.Client(address, verbose=False)) as other:
        assert (
            other.predict(asked("What kind of thing is it?"), 64, 0, 1, api_name="/chat")
            != with_picture
        )


def test_the_python_of_the_documentation_runs(address, tmp_path, monkeypatch, capsys):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "demo.md").read_text(), re.DOTALL)
    shutil.copy(picture(), tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    assert "http://127.0.0.1:7860" in code
    exec(code.replace("http://127.0.0.1:7860", address), {})
    assert capsys.readouterr().out.splitlines()[-1].strip() == "banana"


def test_a_failure_inside_the_model_is_told_without_its_details(client, loaded, monkeypatch):
    def fail(**kwargs):
        raise RuntimeError("the secret layout of the machine")

    with monkeypatch.context() as patch:
        patch.setattr(loaded[0], "generate", fail)
        told = client.predict(asked("What is this?"), 64, 0, 1, api_name="/chat")
        assert told["content"] == "the model failed; the server's log says why."
    assert (
        client.predict(asked("What is this?", picture()), 64, 0, 1, api_name="/chat").strip()
        == "banana"
    )


def test_settings_beyond_the_limits_are_refused(client):
    for values in ((MAX_NEW_TOKENS + 1, 0, 1), (64, 3, 1), (64, 0, 0)):
        with pytest.raises(Exception, match=r"Value .* is (greater|less) than"):
            client.predict(asked("What is this?"), *values, api_name="/chat")


def test_a_visitor_who_cancels_ends_the_generation(client, loaded, endless):
    job = client.submit(asked("What is this?", picture()), MAX_NEW_TOKENS, 0, 1, api_name="/chat")
    wait_until(lambda: len(endless) > 3)
    job.cancel()
    wait_until(lambda: is_quiet(endless))
    assert len(endless) < MAX_NEW_TOKENS


def wait_until(is_true, seconds=20):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def is_quiet(steps):
    before = len(steps)
    time.sleep(0.5)
    return len(steps) == before


# The command


def launch(*arguments, folder):
    command = [sys.executable, "-m", "owl2_hf", "demo", "--port", "0", *map(str, arguments)]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "GRADIO_TEMP_DIR": str(folder),
    }
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_the_command_shows_the_page_until_it_is_told_to_end(tmp_path):
    process = launch("--max-new-tokens", 8, folder=tmp_path)
    line = process.stdout.readline()
    assert re.fullmatch(r"showing default at http://127\.0\.0\.1:\d+\n", line), (
        line + process.stderr.read()
    )
    with urllib.request.urlopen(line.split()[-1]) as response:
        assert "mPLUG-Owl2" in response.read().decode()
    process.send_signal(signal.SIGTERM)
    rest, log = process.communicate(timeout=30)
    assert (process.returncode, rest) == (143, ""), log
    assert "Traceback" not in log


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["demo", "--port", str(port)])
    assert result.exit_code == 1
    assert re.fullmatch(
        rf"owl2-hf: cannot serve at 127\.0\.0\.1 port {port}: .*; choose another --port\.\n",
        result.stderr,
    )


def test_without_gradio_the_command_says_what_to_install():
    code = (
        "import sys\nsys.modules['gradio'] = None\nimport importlib.util as u\nf = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'gradio' else f(name, *a)\n"
        "from owl2_hf.cli import app\nsys.argv = ['owl2-hf', 'demo']\napp()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "owl2-hf: the web page needs gradio: pip install 'owl2_hf[demo]'.\n"


# The Space


def run_app(monkeypatch, spaces=None):
    """Names that the app of the Space defines; `spaces` stands in for the package of that name."""
    monkeypatch.delenv("MODEL", raising=False)
    monkeypatch.setitem(sys.modules, "spaces", spaces)
    namespace = {"__name__": "app"}
    exec(compile((ROOT / "space" / "app.py").read_text(), "app.py", "exec"), namespace)
    return namespace


def test_the_app_of_the_space_builds_the_page(monkeypatch):
    namespace = run_app(monkeypatch)
    functions = namespace["demo"].fns.values()
    assert {"chat", "score", "analyze"} <= {function.api_name for function in functions}
    assert namespace["demo"].worker.settings.max_new_tokens == 512


def test_on_zerogpu_each_function_that_runs_the_model_asks_for_a_gpu(monkeypatch):
    monkeypatch.setenv("GPU_SECONDS", "90")
    decorated = {}

    def gpu(duration):
        def decorate(function):
            decorated[function.__name__] = duration

            @functools.wraps(function)
            def lent(*args):
                decorated["calls"] = decorated.get("calls", 0) + 1
                yield from function(*args)

            return lent if function.__name__ != "analyze" else function

        return decorate

    spaces = types.ModuleType("spaces")
    spaces.__spec__ = importlib.machinery.ModuleSpec("spaces", None)
    spaces.GPU = gpu
    page = run_app(monkeypatch, spaces)["demo"]
    assert decorated == {"chat": 90, "score": 90, "analyze": 90}
    page.launch(prevent_thread_lock=True, **demo.LAUNCH_OPTIONS)
    try:
        client = gradio_client.Client(page.local_url, verbose=False)
        question = {"text": "What is this?", "files": [gradio_client.handle_file(picture())]}
        assert client.predict(question, 8, 0, 1, api_name="/chat") == "banana"
    finally:
        page.close(verbose=False)
    assert decorated["calls"] == 1


def test_the_settings_of_the_space_fit_its_files():
    _, header, _ = (ROOT / "space" / "README.md").read_text().split("---\n", 2)
    settings = yaml.safe_load(header)
    assert settings["sdk"] == "gradio" and (ROOT / "space" / settings["app_file"]).is_file()
    assert f"gradio=={settings['sdk_version']}\n" in (ROOT / "constraints.txt").read_text()
    lines = (ROOT / "space" / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["owl2_hf[demo]"]


# The page in a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("chromium is not installed")
    flags = [
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-sync",
    ]
    flags += ["disable-background-networking", "disable-component-update"]
    flags += ["host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=[f"--{flag}" for flag in flags]
        )
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, address):
    """The page in a window of its own, which asks for nothing from elsewhere."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    elsewhere = []

    def note(request):
        if not request.url.startswith((address, "data:", "blob:")):
            elsewhere.append(request.url)

    context.on("request", note)
    tab = context.new_page()
    tab.set_default_timeout(20_000)
    tab.goto(address)
    yield tab
    context.close()
    assert not elsewhere


@pytest.fixture
def shoot(tab):
    """Keep what the window shows as an image of the documentation, where OWL2_HF_SCREENSHOTS names
    a folder.
    """
    folder = os.environ.get("OWL2_HF_SCREENSHOTS")

    def shoot(name):
        if folder:
            tab.wait_for_timeout(1000)  # till nothing moves any more
            tab.screenshot(path=Path(folder) / f"{name}.png")

    return shoot


def panel(tab):
    """The tab of the page that is open."""
    return tab.locator("[role=tabpanel]:visible").first


def upload(tab, *paths):
    panel(tab).locator("input[type=file]").first.set_input_files(paths)


def ask(tab, text, *paths):
    group = panel(tab).get_by_role("group", name="Multimedia input field")
    expect(group.get_by_role("textbox")).to_be_enabled()  # the answer before has ended
    if paths:
        upload(tab, *paths)
        expect(group.locator(".thumbnail-item")).to_have_count(len(paths))
    group.get_by_role("textbox").fill(text)
    group.locator(".submit-button").click()


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def answers(tab):
    return tab.get_by_test_id("bot")


def test_in_a_browser_pictures_are_uploaded_and_asked_about(tab, shoot):
    ask(tab, "What is this?", picture())
    expect(answers(tab)).to_have_text("banana")
    ask(tab, "What kind of thing is it?")
    expect(answers(tab)).to_have_count(2)
    expect(answers(tab).last).to_have_text("food and drink")
    shoot("demo-chat")
    ask(tab, "What are these?", picture(), picture("emoji-strawberry"))
    expect(answers(tab)).to_have_count(3)
    expect(tab.get_by_test_id("user").locator("img")).to_have_count(3)


def test_in_a_browser_an_answer_grows_until_it_is_stopped(tab, endless):
    tab.get_by_text("Settings").first.click()
    tab.get_by_label("number input for Longest answer").fill(str(MAX_NEW_TOKENS))
    ask(tab, "What is this?", picture())
    expect(answers(tab)).to_have_text(re.compile(r"\w+ \w+"))
    lengths = [len(answers(tab).inner_text())]
    wait_until(lambda: lengths.append(len(answers(tab).inner_text())) or lengths[-1] > lengths[0])
    tab.locator(".stop-button").click()
    wait_until(lambda: is_quiet(endless))
    assert 0 < len(endless) < MAX_NEW_TOKENS
    expect(tab.locator(".submit-button:visible")).to_have_count(1)
    stopped = answers(tab).inner_text()
    assert len(stopped) >= lengths[-1]
    tab.wait_for_timeout(500)
    assert answers(tab).inner_text() == stopped


def test_in_a_browser_a_visitor_who_goes_away_ends_the_generation(tab, endless):
    tab.get_by_text("Settings").first.click()
    tab.get_by_label("number input for Longest answer").fill(str(MAX_NEW_TOKENS))
    ask(tab, "What is this?", picture())
    expect(answers(tab)).to_have_text(re.compile(r"\w+"))
    tab.goto("about:blank")
    wait_until(lambda: is_quiet(endless))
    assert len(endless) < MAX_NEW_TOKENS


def test_in_a_browser_a_broken_picture_is_a_message_and_the_chat_goes_on(tab, broken):
    ask(tab, "What is this?", broken)
    expect(answers(tab)).to_contain_text("broken.png: it is damaged")
    ask(tab, "What is this?", picture())
    expect(answers(tab).last).to_have_text("banana")


def test_in_a_browser_names_and_text_are_no_markup(tab, broken, tmp_path):
    path = tmp_path / "<b onclick=x>.png"
    shutil.copy(broken, path)
    ask(tab, "<i>What</i> is this?", str(path))
    expect(answers(tab)).to_contain_text(": it is damaged")
    expect(tab.get_by_test_id("user").last).to_contain_text("<i>What</i> is this?")
    assert tab.locator("[onclick=x]").count() == 0
    ask(tab, "Is 1 < 2 & <s>?")
    # The first also after it has gone to and fro.
    for text in (
        "<i>What</i> is this?",
        "Is 1 < 2 & <s>?",
    ):
        expect(tab.get_by_text(text, exact=True)).to_have_count(1)


def test_in_a_browser_pictures_are_scored(tab, shoot, broken):
    tab.get_by_role("tab", name="Score").click()
    upload(tab, picture("emoji-strawberry"), broken, picture())
    expect(panel(tab).locator(".gallery-item")).to_have_count(3)
    panel(tab).get_by_role("button", name="Score").click()
    table = panel(tab).get_by_role("grid").first
    for text in ("emoji-banana.png", "broken.png", "it is damaged", "yes"):
        expect(table).to_contain_text(text)
    shoot("demo-score")


def test_in_a_browser_the_plots_of_the_attention_are_shown(tab, shoot):
    tab.get_by_role("tab", name="Attention").click()
    ask(tab, "What is this?", picture())
    expect(panel(tab).get_by_role("textbox", disabled=True)).to_have_value(
        re.compile("given image: 'banana'")
    )
    plots = panel(tab).locator("img:not(.thumbnail-image)")
    expect(plots).to_have_count(3)
    wait_until(
        lambda: min(plot.evaluate("plot => plot.naturalWidth") for plot in plots.all()) > 300
    )
    shoot("demo-attention")
