"""`owl2-hf chat`, typed in a terminal and piped."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from owl2_hf import default_pictures
from owl2_hf.cli import app
from owl2_hf.cli.chat import stopped_by_ctrl_c
from owl2_hf.default import default_dir

PAGE = Path(__file__).parents[2] / "docs" / "chat.md"
IMAGES = {name: str(path) for name, path in default_pictures().items()}
BANANA = IMAGES["emoji-banana"]
SECONDS = 120


class Terminal:
    """The command in a pseudo-terminal: what a person types, and what they see."""

    def __init__(self, *arguments, folder):
        import fcntl
        import pty
        import struct
        import termios

        self.master, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 250, 0, 0))
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "owl2_hf", "chat", *map(str, arguments)],
            cwd=folder,
            stdin=child,
            stdout=child,
            stderr=child,
            # A dumb terminal gets no codes that move the cursor.
            env={**os.environ, "TERM": "dumb"},
            # So that Ctrl-C becomes a signal, the terminal has to be the one of the session.
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(child)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, text):
        os.write(self.master, text.encode())

    def read_until(self, text):
        """What is new on the screen, up to and with the text."""
        end = time.monotonic() + SECONDS
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], end - time.monotonic())
            assert ready, f"no {text!r} within {SECONDS} seconds: {self.seen!r}"
            try:
                new = os.read(self.master, 4096).decode()
            except OSError:  # the other side is closed
                new = ""
            assert new, f"the chat ended without {text!r}: {self.seen!r}"
            self.seen += new.replace("\r", "")
        found, text, self.seen = self.seen.partition(text)
        return found + text

    def ask(self, line):
        """Type a line at the prompt; what comes up to the next prompt, without the line."""
        self.type(f"{line}\n")
        self.read_until("\n")
        return self.read_until("> ").removesuffix("> ")

    def exit_code(self):
        return self.process.wait(timeout=SECONDS)


def run(*arguments, lines=()):
    typed = "".join(f"{line}\n" for line in lines)
    return CliRunner().invoke(app, ["chat", *map(str, arguments)], input=typed)


def model_folder(folder, **generation):
    """The bundled model with another generation config."""
    for path in default_dir().iterdir():
        if path.suffix in (".json", ".jinja", ".safetensors"):
            shutil.copy(path, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **generation}))
    return folder


terminal_only = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals here")


# In a terminal


@terminal_only
def test_ctrl_c_ends_the_answer_and_not_the_program(tmp_path):
    # Without its end-of-text token the model would go on for two thousand tokens.
    model = model_folder(tmp_path, suppress_tokens=[2], max_new_tokens=2000)
    with Terminal(BANANA, "--model", model, folder=tmp_path) as terminal:
        terminal.read_until("> ")
        terminal.type("What is this?\n")
        streamed = terminal.read_until("banana") + terminal.read_until("with")
        terminal.type("\x03")
        rest = terminal.read_until("stopped; the text so far is kept.\n> ")
        assert "> " not in streamed.partition("\n")[2]
        assert terminal.ask("/save first.json").startswith("saved to ")
        shown = (streamed + rest).partition("\n")[2].partition("stopped;")[0].replace("^C", "")
        messages = json.loads((tmp_path / "first.json").read_text())
        assert messages[-1]["content"][0]["text"] == shown.strip()
        assert "Traceback" not in rest

        terminal.type("Is it an animal?\n")
        terminal.read_until("\n")
        assert terminal.read_until(" ").strip()
        terminal.type("\x03")
        terminal.read_until("stopped; the text so far is kept.\n> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0


@terminal_only
def test_lines_come_back_errors_are_one_line_and_ctrl_d_ends(tmp_path):
    (tmp_path / "broken.png").write_bytes(Path(BANANA).read_bytes()[:300])
    with Terminal(folder=tmp_path) as terminal:
        terminal.read_until("> ")
        assert terminal.ask("Is a tiger an animal?") == "yes\n"
        up = "\x1b[A"
        assert terminal.ask(up) == "yes\n"
        for line, message in (
            ("/image broken.png", "broken.png"),
            ("/image", "expected /image PATH_OR_URL"),
            ("/imagine", "unknown command /imagine"),
            ("/load broken.png", "is not valid JSON"),
        ):
            answer = terminal.ask(line)
            assert answer.startswith("owl2-hf: ") and message in answer
            assert answer.count("\n") == 1
        assert terminal.ask("/clear") == "new conversation.\n"
        assert terminal.ask(f"/image {BANANA}") == f"{BANANA} is added to your next message.\n"
        terminal.type("half a line")
        terminal.read_until("half a line")
        time.sleep(1)  # a signal just before readline waits for a key is seen at the next key
        terminal.type("\x03")
        terminal.read_until("\n> ")
        assert terminal.ask("What is this?") == "banana\n"
        assert terminal.ask("/save chat.json") == "saved to chat.json\n"
        assert terminal.ask("/clear") == "new conversation.\n"
        assert terminal.ask("/load chat.json") == "2 messages from chat.json\n"
        assert "/image PATH_OR_URL" in terminal.ask("/help")
        terminal.type("\x04")
        assert terminal.exit_code() == 0
    messages = json.loads((tmp_path / "chat.json").read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"][0] == {"type": "image", "image": BANANA}


@terminal_only
def test_the_transcript_of_the_page_is_what_happens(tmp_path):
    for name in ("emoji-banana", "emoji-tiger-face"):
        shutil.copy(IMAGES[name], tmp_path)
    blocks = re.findall(r"```console\n\$ owl2-hf chat(.*?)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (arguments, transcript) = blocks[0]
    with Terminal(*arguments.split(), folder=tmp_path) as terminal:
        screen = terminal.read_until("> ")
        for line in re.findall(r"^> (.+)$", transcript, re.MULTILINE):
            terminal.type(f"{line}\n")
            if line == "/quit":
                screen += terminal.read_until("\n")
                assert terminal.exit_code() == 0
            else:
                screen += terminal.read_until("\n") + terminal.read_until("> ")
    assert screen == transcript


def test_the_second_ctrl_c_raises():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stopped_by_ctrl_c() as is_pressed:
        assert not is_pressed()
        signal.raise_signal(signal.SIGINT)
        assert is_pressed()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# Piped


def test_piped_lines_are_messages_and_the_output_has_answers_alone():
    lines = ["What is this?", "", "What kind of thing is it?", "/clear", "Is a tiger an animal?"]
    result = run(BANANA, lines=lines)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["banana", "food and drink", "yes"]
    assert result.stderr.splitlines() == ["new conversation."]


def test_the_shell_command_of_the_page_prints_answers(tmp_path):
    (command,) = re.findall(r"\$ (printf .*\n(?:.*\\\n)*)((?:.+\n)+?)```", PAGE.read_text())
    shutil.copy(BANANA, tmp_path)
    words = command[0].replace("owl2-hf", f"'{sys.executable}' -m owl2_hf")
    result = subprocess.run(
        words, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == command[1]


def test_a_line_that_fails_leaves_the_others_and_exits_with_1(tmp_path):
    result = run(lines=["/image no-such-file.png", "Is a tiger an animal?", "/quit", "never read"])
    assert result.exit_code == 1
    assert result.stdout == "yes\n"
    assert "no-such-file.png" in result.stderr and result.stderr.count("\n") == 1


def test_a_message_may_begin_with_a_slash_after_a_space():
    result = run(lines=[" /image is not a command here"])
    assert result.exit_code == 0 and result.stdout.strip()


def test_quotes_around_a_path_are_left_out(tmp_path):
    image = tmp_path / "my photo.png"
    shutil.copy(BANANA, image)
    result = run(lines=[f"/image '{image}'", "What is this?", f"/image {image}", "What is this?"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "banana"


def test_bytes_that_are_no_text_are_replaced():
    result = CliRunner().invoke(app, ["chat"], input=b"\xff\xfe\nIs a tiger an animal?\n")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 2


def test_the_reason_for_a_truncated_answer_is_printed(tmp_path):
    model = model_folder(tmp_path, suppress_tokens=[2])
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 50
    (tmp_path / "config.json").write_text(json.dumps(config))
    lines = ["What is this?", "What is this?", "What is this?", "/clear", "What is this?"]
    result = run("--model", model, "--max-new-tokens", "20", lines=lines)
    assert result.exit_code == 1
    # In front of them is the progress bar of loading.
    first, second, third, *_ = result.stderr[result.stderr.index("cut off") :].splitlines()
    assert first == "cut off after 20 tokens; --max-new-tokens allows more."
    assert second == (
        "cut off, because the context of 50 tokens is full. /clear starts a new conversation."
    )
    assert third.startswith("owl2-hf: the conversation is too long")
    assert len(result.stdout.splitlines()) == 3


def test_an_answer_steers_no_terminal_and_is_saved_as_it_is(monkeypatch, tmp_path):
    odd = "a \x1b]0;owned\x07 b"
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.decode", lambda *args, **kwargs: odd)
    result = run(lines=["Hello", f"/save {tmp_path / 'chat.json'}"])
    assert result.stdout.strip() == "a \\x1b]0;owned\\x07 b"
    assert json.loads((tmp_path / "chat.json").read_text())[1]["content"][0]["text"] == odd


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-image.png"], "no-such-image.png"),
        (["--model", "no/such/folder"], "the folder does not exist"),
        (["--top-p", "0.5"], "top_p=0.5 has no effect at temperature 0"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_the_system_prompt_reaches_the_file(tmp_path):
    file = tmp_path / "chat.json"
    result = run("--system", "Answer in a word.", lines=["Is a tiger an animal?", f"/save {file}"])
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text())[0] == {
        "role": "system",
        "content": [{"type": "text", "text": "Answer in a word."}],
    }
