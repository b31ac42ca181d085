"""Push a model folder to the Hub, after `files.py` has checked it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id

from .files import INDEX, WEIGHTS, checked_names


@dataclass
class PushReport:
    """What a push sent or would send: file names in the repository and their sizes in bytes."""

    repo_id: str
    files: list[tuple[str, int]]
    url: str | None = None


def push(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
) -> PushReport:
    """Check a model folder and upload it to the Hub.

    The repository and the branch are created if they do not exist.

    Weight files in the repository that the folder does not have are deleted in the same commit,
    because a loader would read them as part of the new model. All other files there stay. To resume
    an interrupted push, call it again: files that have arrived are not sent again. To resume a pull
    request, pass `revision="refs/pr/N"` instead of `create_pr`; otherwise a second one is opened.

    A push cannot change the visibility of an existing repository, add files that do not belong to a
    model, or open a pull request against a branch other than main.

    Args:
        folder: Folder made by `save_pretrained` or `convert`, with a model card.
        repo_id: `namespace/name`, or only a name, for the namespace of the token's owner.
        private: Create the repository as private. True raises an error if a public one exists.
        revision: Branch to push to. Default: main.
        create_pr: Open a pull request instead of changing main.
        dry_run: Check everything and report, without network requests.
        token: Hub token. Default: the token that `hf auth login` saved.
        commit_message: Message of the commit, and title of the pull request.

    Raises:
        ValueError: If the model in the folder is incomplete, the folder holds files that must not
            be published, or the Hub refuses the upload.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError(
            f"expected create_pr or revision, got both ({revision!r}): pull requests always go "
            "to main."
        )
    names = checked_names(folder)
    report = PushReport(repo_id, [(name, (folder / name).stat().st_size) for name in names])
    if not dry_run:
        with _hub_errors(repo_id):
            api = _api(token)
            report.repo_id = _prepare(api, folder, repo_id, private, revision)
            report.url = _upload(
                api, folder, names, report.repo_id, revision, create_pr, commit_message
            )
    return report


def _api(token: str | None) -> HfApi:
    if token is None and get_token() is None:
        raise ValueError(
            "expected a token of the Hub, got none: run `hf auth login`, set HF_TOKEN, or pass one."
        )
    return HfApi(token=token)


def _prepare(
    api: HfApi, folder: Path, repo_id: str, private: bool | None, revision: str | None
) -> str:
    """The card passes the Hub's own check, the repository and the branch are there; returns the
    whole repo id.
    """
    try:
        ModelCard.load(folder / "README.md").validate()
    except ValueError as error:
        raise ValueError(f"{folder / 'README.md'}: the Hub refuses its metadata: {error}") from None
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(
            f"{repo_id}: expected a private repository, got a public one: make it private in its "
            "settings first."
        )
    if revision not in (None, "main") and not str(revision).startswith("refs/"):
        api.create_branch(repo_id, branch=str(revision), exist_ok=True)
    return repo_id


def _upload(
    api: HfApi,
    folder: Path,
    names: list[str],
    repo_id: str,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
) -> str:
    has_weights = any(WEIGHTS.fullmatch(name) for name in names)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=names,  # none of these names contains a wildcard
        delete_patterns=["model.safetensors", "model-?????-of-?????.safetensors", INDEX]
        if has_weights
        else None,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or "Upload mPLUG-Owl2 model",
    )
    return commit.pr_url or commit.commit_url


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:
        raise ValueError(f"{repo_id} was not pushed: {_explanation(error)}") from error


def _explanation(error: BaseException) -> str:
    """One line; an upload wraps the Hub's answer in an error of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if cause is None:
        return " ".join(f"{type(error).__name__}: {error}".split())
    status = cause.response.status_code
    advice = {
        401: "the token is missing or wrong, or cannot read the repository; run `hf auth login`.",
        403: "the token has no write permission; create one that has.",
        404: "no such repository or revision; check the names.",
    }
    said = " ".join((cause.server_message or "no reason given").split())
    what_now = "try again later" if status == 429 or status >= 500 else "correct it"
    return f"the Hub answered {status}, " + advice.get(status, f"{said}; {what_now}.")
