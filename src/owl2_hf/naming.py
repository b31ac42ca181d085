"""Errors of loading a model say which model it was, and what its name was taken for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEFAULT_MODEL = "default"  # the small model inside the package


@contextmanager
def naming_model(model: str) -> Iterator[None]:
    """Name the model in whatever ValueError or OSError comes of loading it.

    Args:
        model: A folder, the id of a model on the Hub, or `DEFAULT_MODEL`.

    Raises:
        ValueError: There is no such folder and it is no id; or loading failed.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    is_here = model == DEFAULT_MODEL or Path(model).exists()
    try:
        if not is_here:
            validate_repo_id(model)
        yield
    except HFValidationError:
        expected = "expected a folder of this machine or the id of a model on the Hub (owner/name)"
        raise ValueError(f"model {model!r}: there is no such folder; {expected}.") from None
    except (ValueError, OSError) as error:
        taken = (
            "" if is_here else " (no folder of that name is here, so it was looked for on the Hub)"
        )
        raise ValueError(f"model {model!r}{taken}: {error}") from error
