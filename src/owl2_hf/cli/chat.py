"""Chat with a model in the terminal."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..naming import DEFAULT_MODEL
from ..printing import printable
from .app import app, report_mistakes, say, say_mistake
from .loading import load, load_processor
from .options import Debug, Device, ModelOption

if TYPE_CHECKING:
    from ..conversation import Conversation, Reply

PROMPT = "> "
HELP = """\
/image PATH_OR_URL  add an image to your next message
/clear              start a new conversation
/save [FILE]        save the conversation to a JSON file
/load FILE          continue a saved conversation
/help               show this list
/quit               end the chat; so does Ctrl-D
Ctrl-C stops an answer. The arrow keys bring back earlier lines.
A message that begins with / needs a space in front."""


@app.command()
@report_mistakes
def chat(
    images: Annotated[
        list[str] | None, typer.Argument(help="Paths or URLs of images for the first message.")
    ] = None,
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest answer, in tokens. Default: the model's setting, otherwise 256."
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(min=0, help="Sampling temperature. 0 always takes the most likely token."),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=1,
            help="Sample from the most likely tokens whose probabilities sum to this. Needs "
            "--temperature above 0.",
        ),
    ] = 1.0,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Chat with a model about images in the terminal. /help lists the commands.

    When the input or the output is not a terminal, each input line is a message or a command.
    Answers go to stdout, everything else to stderr. The exit code is 1 if a line failed.
    """
    from ..conversation import Conversation, OpenedImage

    name = model or DEFAULT_MODEL
    # Opening images takes no weights: a wrong path is found before they load.
    processor = load_processor(name)
    opened = [OpenedImage.open(image, processor) for image in images or []]
    loaded, processor = load(model, device)
    conversation = Conversation(
        loaded,
        processor,
        system,
        max_new_tokens,
        temperature,
        top_p,
    )
    conversation.waiting += opened
    session = Session(conversation, debug)
    if session.is_terminal:
        with suppress(ImportError):  # Windows has its own line editing and history
            import readline  # noqa: F401, input() then edits lines and brings back earlier ones

        say(f"{name} on {loaded.device}. /help lists the commands, Ctrl-D ends the chat.", err=True)
    session.run()
    if session.has_failed and not session.is_terminal:
        raise typer.Exit(1)


class Session:
    """Read lines, and answer them or run them as commands.

    Args:
        debug: Raise errors instead of printing one line about each.
    """

    def __init__(self, conversation: "Conversation", debug: bool = False) -> None:
        self.conversation, self.debug = conversation, debug
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.has_failed = False
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self.image,
            "/clear": self.clear,
            "/save": self.save,
            "/load": self.load,
            "/help": self.help,
        }

    def run(self) -> None:
        """Handle lines until the input ends or /quit."""
        # An error for bytes that are not UTF-8 would end the conversation.
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        while (line := self.read_line()) is not None and line.split() != ["/quit"]:
            try:
                self.take(line)
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
                say("stopped; the conversation is as it was before.", err=True)
            except Exception as error:
                if self.debug:
                    raise
                self.has_failed = True
                say_mistake(error)

    def read_line(self) -> str | None:
        """Return the next line, or `None` at the end of the input."""
        while True:
            try:
                return input(PROMPT if self.is_terminal else "")
            except EOFError:
                if self.is_terminal:
                    typer.echo()
                return None
            except KeyboardInterrupt:  # drops the line, as a shell does
                if not self.is_terminal:
                    raise
                typer.echo()

    def take(self, line: str) -> None:
        if not line.startswith("/"):
            if line.strip():
                self.answer(line.strip())
            return
        name, _, argument = line.partition(" ")
        if name not in self.commands:
            raise ValueError(f"unknown command {name}: /help lists the commands.")
        self.commands[name](argument.strip())

    def answer(self, question: str) -> None:
        is_shown = False

        def show(text: str) -> None:
            nonlocal is_shown
            is_shown = True
            typer.echo(printable(text, keep="\n\t"), nl=False)

        with stopped_by_ctrl_c() if self.is_terminal else nullcontext(lambda: False) as should_stop:
            try:
                reply = self.conversation.ask(question, show, should_stop)
            except BaseException:
                if is_shown:
                    typer.echo()
                raise
        typer.echo()
        self.say_ending(reply)

    def say_ending(self, reply: "Reply") -> None:
        """Print why an answer was cut off."""
        kept = "the text so far is kept" if reply.text else "the message is removed"
        endings = {
            "stopped": f"stopped; {kept}.",
            "length": f"cut off after {self.conversation.max_new_tokens} tokens; "
            "--max-new-tokens allows more.",
            "context": f"cut off, because the context of {self.conversation.context.size} tokens is "
            "full. /clear starts a new conversation.",
        }
        if reply.ending in endings:
            say(endings[reply.ending], err=True)

    def image(self, source: str) -> None:
        if not source:
            raise ValueError("expected /image PATH_OR_URL, got no path.")
        # Terminals put quotes around the path of a file that is dropped on them.
        if source[0] == source[-1] and source[0] in "'\"":
            source = source[1:-1]
        self.conversation.add_image(source)
        name = source if len(source) <= 200 else f"{source[:200]}..."
        say(f"{name} is added to your next message.", err=True)

    def clear(self, argument: str) -> None:
        self.conversation.clear()
        say("new conversation.", err=True)

    def save(self, file: str) -> None:
        path = self.conversation.save(Path(file) if file else None)
        say(f"saved to {file or path.name}", err=True)

    def load(self, file: str) -> None:
        if not file:
            raise ValueError("expected /load FILE, got no file.")
        self.conversation.load(Path(file))
        say(f"{len(self.conversation.messages)} messages from {file}", err=True)

    def help(self, argument: str) -> None:
        for line in HELP.splitlines():
            say(line, err=True)


@contextmanager
def stopped_by_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether Ctrl-C was pressed.

    A second Ctrl-C raises KeyboardInterrupt. The first one waits until the current token is
    finished: an exception during a token can leave libraries half imported, because the first
    answer imports many parts of torch.
    """
    is_pressed = False

    def press(number: int, frame: object) -> None:
        nonlocal is_pressed
        if is_pressed:
            raise KeyboardInterrupt
        is_pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: is_pressed
    finally:
        signal.signal(signal.SIGINT, before)
