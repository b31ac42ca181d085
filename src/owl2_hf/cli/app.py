"""The `owl2-hf` command, and what all its subcommands share."""

import json
import logging
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from ..printing import printable

app = typer.Typer(
    help="mPLUG-Owl2 and its family: ask about images, score them, and inspect, convert "
    "and train models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def say(line: str, err: bool = False) -> None:
    """Print one line, with control characters escaped, so that files cannot steer the terminal."""
    typer.echo(printable(line), err=err)


def say_json(value: Any) -> None:
    typer.echo(json.dumps(value))  # json.dumps escapes all but ASCII


def say_mistake(error: Exception) -> None:
    """Print an error in one line, even if its message has several."""
    from huggingface_hub.errors import StrictDataclassError

    is_mistake = isinstance(error, (ValueError, OSError, StrictDataclassError))
    message = (
        str(error)
        if is_mistake
        else f"unexpected {type(error).__name__}: {error}; --debug shows where"
    )
    say(f"owl2-hf: {' '.join(message.split())}", err=True)


# Libraries that print warnings during import, about features that no command uses.
NOISY_LOGGERS = ("torchao", "torch.utils._pytree")


def silence_start_up() -> None:
    """Hide the warnings that other libraries print during import. Keep their errors."""
    # Errors already say what is wrong with an image.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # PEFT asks by a name that transformers has renamed.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def report_mistakes(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command report a user's mistake in one line, with exit code 1 and no traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        silence_start_up()
        try:
            return command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            say("owl2-hf: interrupted", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if kwargs.get("debug"):
                raise
            say_mistake(error)
            raise typer.Exit(1) from None

    return wrapped
