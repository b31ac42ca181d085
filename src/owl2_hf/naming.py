"""Names of the models in the package, and loading errors that name the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEFAULT_MODEL = "default"  # the small model inside the package
DEFAULT_SCORER = "default-scorer"  # the small scorer inside the package
_FOLDERS = {DEFAULT_MODEL: "default", DEFAULT_SCORER: "default_scorer"}


def place(model: str) -> str:
    """Return what `from_pretrained` takes: the folder for a model in the package, else the name."""
    folder = _FOLDERS.get(model)
    return model if folder is None else str(Path(__file__).parent / folder)


@contextmanager
def naming_model(model: str) -> Iterator[None]:
    """Add the model's name to any ValueError or OSError raised while loading it.

    Args:
        model: A folder, the id of a model on the Hub, `DEFAULT_MODEL`, or `DEFAULT_SCORER`.

    Raises:
        ValueError: If there is no such folder and it is no id; or loading failed.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    is_here = model in _FOLDERS or Path(model).exists()
    try:
        if not is_here:
            validate_repo_id(model)
        yield
    except HFValidationError:
        expected = "expected a local folder or the id of a model on the Hub (owner/name)"
        raise ValueError(f"model {model!r}: the folder does not exist; {expected}.") from None
    except (ValueError, OSError) as error:
        taken = (
            "" if is_here else " (no local folder has this name, so it was looked up on the Hub)"
        )
        raise ValueError(f"model {model!r}{taken}: {error}") from error
