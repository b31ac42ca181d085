"""Push a model folder to the Hub. A file that does not belong to a model stops the push.

This is one file because the rules on what may be published belong together.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import ExifTags, Image
from safetensors import SafetensorError, safe_open

_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_model.safetensors"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_PICTURE = re.compile(r"(pictures/)?\w[\w.+-]*\.(png|jpe?g)", re.IGNORECASE)
_ALLOWED = re.compile(
    r"((generation_|processor_|preprocessor_|tokenizer_|adapter_)?config|tokenizer|special_tokens_map|added_tokens"
    r"|conversion_report|scorer|decision|model\.safetensors\.index)\.json|tokenizer\.model|qwen\.tiktoken"
    r"|(chat|decision)_template\.jinja|README\.md"
    r"|(LICENSE|NOTICE)[\w-]*(\.txt|\.md)?|\.gitattributes|\w+_mplug_owl2\w*\.py"
    r"|\.eval_results/[\w.-]+\.yaml"
    rf"|(adapter_model|non_lora_trainables)\.safetensors|{_WEIGHTS.pattern}"
)
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_BINARY = {".safetensors", ".model", ".tiktoken", ".png", ".jpg", ".jpeg"}
_PROGRAM = re.compile(rb"\x7fELF|MZ\x90\x00|\xcf\xfa\xed\xfe")  # of Linux, Windows, macOS
_ARCHIVE_OR_PICKLE = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")
_SECRET_NAME = re.compile(
    r"\.env.*|.*\.(pem|key)|id_(rsa|dsa|ecdsa|ed25519).*|\.netrc|(stored_)?tokens?(\.txt)?|credentials.*",
    re.IGNORECASE,
)
_SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "an AWS access key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a GitHub token": re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "an API key (sk-)": re.compile(r"(?<![\w-])sk-(?=[\w-]*\d)[\w-]{20,}"),
}
_SECRET_KEY = re.compile(
    r"(.*_)?(api_?key|secret(_?key)?|passw(or)?d|private_?key|credentials?|(access|auth|api|hub|hf|github)_?token)",
    re.IGNORECASE,
)
_NAME_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path")
_HOME = re.compile(r"(?<![\w.~])(/(home|Users)/\w|/root/|[A-Za-z]:\\Users\\)")
_LOCAL_PATH = re.compile(r"(?<![\w.~])(/(home|Users|root|tmp)/|[A-Za-z]:\\)")
_RELATIVE_IMPORT = re.compile(r"^\s*from \.(\w+) import", re.MULTILINE)


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
            f"expected create_pr or revision, got both ({revision!r}): a pull request is always to "
            "main."
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


def checked_names(folder: Path) -> list[str]:
    """Run every check that needs no network, and return the names of the files to upload."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: expected a model folder with a config.json, got none; save or convert one "
            "first."
        )
    config = _read_json(folder / "config.json")
    if (found := config.get("model_type")) != "mplug_owl2":
        raise ValueError(
            f"{folder}: expected model_type 'mplug_owl2' in config.json, got {found!r}: convert it "
            "first."
        )
    names = _allowed_names(folder)
    _check_card(folder / "README.md")
    for name in names:
        if Path(name).suffix.lower() not in _BINARY:
            _check_text(folder / name)
        elif name.endswith(".safetensors"):
            _check_metadata(folder / name)
        elif _PICTURE.fullmatch(name):
            _check_picture(folder / name)
    check_code(folder, names)
    if any(name.startswith(("scorer.", "decision")) for name in names):
        from .scoring.decision import check_scorer  # torch, which takes seconds

        check_scorer(folder)
    _check_weights(folder, names)
    return names


def _allowed_names(folder: Path) -> list[str]:
    card = folder / "README.md"
    shown = _read_text(card) if card.is_file() else ""
    names: list[str] = []
    refused: dict[str, list[str]] = {}
    for path in _entries(folder):
        name = path.relative_to(folder).as_posix()
        if reason := _reason_against(path, name, folder, shown):
            refused.setdefault(reason, []).append(name)
        else:
            names.append(name)
    if refused:
        reasons = "; ".join(f"{reason}: {', '.join(found)}" for reason, found in refused.items())
        raise ValueError(
            f"{folder} holds what must not be published. {reasons}. Remove them from the folder."
        )
    return names


def _entries(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name in ("pictures", ".eval_results") and path.is_dir() and not path.is_symlink():
            yield from sorted(path.iterdir())
        else:
            yield path


def _reason_against(path: Path, name: str, folder: Path, card: str) -> str | None:
    if path.is_symlink() and not _is_honest_link(path, folder):
        return "Links that lead out of the folder, or nowhere"
    if _SECRET_NAME.fullmatch(path.name):
        return "Files that are secrets by their names"
    if path.suffix.lower() in _PICKLES:
        return "Pickles, which can run code on loading (convert writes safetensors)"
    is_picture = _PICTURE.fullmatch(name)
    if not path.is_file() or not (is_picture or _ALLOWED.fullmatch(name)):
        return "Not part of a model of this package"
    if is_picture and name not in card:
        return "Images that README.md does not show"
    return _reason_against_content(path)


def _reason_against_content(path: Path) -> str | None:
    """A safetensors header may begin with the bytes of a pickle: only one that cannot be read is
    looked at.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np"):
                return None
    except (SafetensorError, OSError):
        damaged: str | None = "Damaged weight files, cut short or no safetensors"
    else:
        damaged = None
    with path.open("rb") as file:
        start = file.read(4)
    if _PROGRAM.match(start):
        return "Programs under another name"
    if _ARCHIVE_OR_PICKLE.match(start):
        return "Pickles or archives under another name, which can run code on loading"
    return damaged


def _is_honest_link(path: Path, folder: Path) -> bool:
    """Into the folder itself, or into the blobs of a Hub cache, of one repository or shared by
    all.
    """
    target = Path(os.path.realpath(path))
    if not target.is_file():
        return False
    in_repo = target.parent.name == "blobs" and re.match(
        r"(models|datasets|spaces)--", target.parents[1].name
    )
    store = target.parents[1] if len(target.parents) > 1 else target.parent
    is_shared = store.name == "blobs" and (store / ".huggingface-shared-blobs").is_file()
    return target.is_relative_to(folder.resolve()) or bool(in_repo) or is_shared


def _check_card(path: Path) -> None:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: expected a model card with metadata, got none; write one."
        )
    try:
        data = ModelCard.load(path).data
    except Exception as error:  # YAML's errors have no base in common with the card's own
        raise ValueError(
            f"{path}: expected metadata in YAML between two lines of ---, got {error!r}."
        ) from None
    required = ["library_name", "pipeline_tag", "license", "tags"]
    if data.get("license") == "other":
        required.append("license_name")
    if missing := [name for name in required if not data.get(name)]:
        raise ValueError(
            f"{path}: its metadata lacks {', '.join(missing)}; add them between the lines of ---."
        )
    if data.pipeline_tag != "image-text-to-text":
        raise ValueError(
            f"{path}: expected pipeline_tag image-text-to-text, got {data.pipeline_tag}; correct "
            "it."
        )


def _check_text(path: Path) -> None:
    text = _read_text(path)
    _check_secrets(path, text)
    if path.suffix != ".json":
        if found := _HOME.search(text):
            line = text.count("\n", 0, found.start()) + 1
            raise ValueError(
                f"{path}: line {line} names a home folder: expected none, write ~/ or a shorter "
                "path."
            )
        return
    content = _read_json(path)
    if path.name == "tokenizer.json":
        return  # a vocabulary may hold any text
    for key, value in _strings(content):
        if value and any(map(_SECRET_KEY.fullmatch, key.split("."))):
            raise ValueError(
                f"{path}: {key} seems to be a secret: remove it, and revoke it if it was ever "
                "shared."
            )
        if _LOCAL_PATH.search(value) or (
            key.rpartition(".")[2] in _NAME_KEYS and not _is_repo_id(value)
        ):
            raise ValueError(
                f"{path}: {key} is a path of a local machine: expected none, remove or shorten it."
            )


def _check_secrets(path: Path, text: str) -> None:
    for kind, pattern in _SECRETS.items():
        if pattern.search(text):
            raise ValueError(
                f"{path} seems to hold {kind}: remove it, and revoke it if it was ever shared."
            )


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return not name
    return True


def _check_metadata(path: Path) -> None:
    """What safetensors keeps beside the tensors."""
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
    for key, value in metadata.items():
        _check_secrets(path, f"{key} {value}")
        if value and _SECRET_KEY.fullmatch(key):
            raise ValueError(
                f"{path}: {key} in its metadata seems to be a secret: save the model again without "
                "it."
            )
        if _LOCAL_PATH.search(value):
            raise ValueError(
                f"{path}: {key} in its metadata is a path of a local machine: save it again "
                "without."
            )


def _check_picture(path: Path) -> None:
    """It is what its name says, and tells nothing but what it shows."""
    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    content = path.read_bytes()
    try:
        with warnings.catch_warnings(), Image.open(BytesIO(content), formats=[kind]) as image:
            warnings.simplefilter("ignore")  # damage is an error here
            image.load()
            exif = image.getexif()
            values = [
                value for key, value in image.info.items() if key not in ("exif", "icc_profile")
            ]
            values += [*exif.values(), *exif.get_ifd(ExifTags.IFD.Exif).values()]
            position = exif.get_ifd(ExifTags.IFD.GPSInfo)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes decoders raise almost anything
        raise ValueError(
            f"{path}: expected a whole {kind} image, got {type(error).__name__}; save it again."
        ) from None
    texts = [
        value.decode("latin-1") if isinstance(value, bytes) else str(value) for value in values
    ]
    _check_secrets(path, "\n".join([content.decode("latin-1"), *texts]))
    if position or any("exif:GPS" in text for text in texts):
        raise ValueError(
            f"{path} tells the place where it was taken: save it again without EXIF and XMP."
        )
    if any(map(_LOCAL_PATH.search, texts)):
        raise ValueError(
            f"{path} holds a path of a local machine: save it again without its texts."
        )


def check_code(folder: Path, names: list[str]) -> None:
    """Check that the remote code in the folder is the package's own and complete."""
    package = Path(__file__).parent
    ours = {
        file.name: file
        for part in ("modeling", "processing")
        for file in (package / part).glob("*.py")
    }
    needed: set[str] = set()
    for name in names:
        if name.endswith(".py"):
            content = (folder / name).read_bytes()
            if name not in ours or content != ours[name].read_bytes():
                raise ValueError(
                    f"{folder / name} differs from the package's file: save the model again with "
                    "it."
                )
            needed.update(_RELATIVE_IMPORT.findall(content.decode()))
        elif name.endswith("config.json"):
            maps = (
                value
                for key, value in _strings(_read_json(folder / name))
                if "auto_map" in key.split(".")
            )
            needed.update(value.rsplit(".", 1)[0] for value in maps)
    if missing := sorted({f"{module}.py" for module in needed} - set(names)):
        raise ValueError(
            f"{folder} lacks code that it refers to: {', '.join(missing)}; save the model again."
        )


def _check_weights(folder: Path, names: list[str]) -> None:
    weights = {name for name in names if _WEIGHTS.fullmatch(name)}
    expected = {"model.safetensors"}
    if _INDEX in names:
        weight_map = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(
                f"{folder / _INDEX}: expected a weight_map, got {weight_map!r}; save the model "
                "again."
            )
        expected = {str(name) for name in weight_map.values()}
    elif _ADAPTER in names and not weights:
        return
    if missing := sorted(expected - weights):
        raise ValueError(
            f"{folder}: its weights are not whole, {', '.join(missing)} is missing; save the model "
            "again."
        )
    if stale := sorted(weights - expected):
        raise ValueError(
            f"{folder}: {', '.join(stale)} is not among its weights ({_INDEX} says so); remove it."
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"{path}: expected text in UTF-8, got other bytes; write it again."
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: expected JSON, got an error: {error}; save the model again."
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got {type(content).__name__}; save the model again."
        )
    return content


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The strings of a JSON value, each with the dotted key that leads to it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, (dict, list)):
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strings(inner, f"{key}.{step}" if key else str(step))


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
            f"{repo_id}: expected a private repository, got a public one: change its settings "
            "first."
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
    has_weights = any(_WEIGHTS.fullmatch(name) for name in names)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=names,  # none of these names holds a wildcard
        delete_patterns=["model.safetensors", "model-?????-of-?????.safetensors", _INDEX]
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
        401: "the token is missing or wrong, or the repository is not visible to it; run `hf auth login`.",
        403: "the token may not write there; make one with write permission for it.",
        404: "no such repository or revision; check the names.",
    }
    said = " ".join((cause.server_message or "without a reason").split())
    what_now = "try again later" if status == 429 or status >= 500 else "correct what it names"
    return f"the Hub answered {status}, " + advice.get(status, f"{said}; {what_now}.")
