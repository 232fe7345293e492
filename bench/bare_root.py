"""A wheel where there is nothing but Python: in a bare root, and on an emulated Arm processor.

    sudo python -m bench.bare_root x86   # takes debootstrap
    sudo python -m bench.bare_root arm   # and qemu-user and g++-aarch64-linux-gnu

`x86` installs the wheel of this tree into a Debian root without a compiler, with this machine's
Python, exports the demo there and lets it speak; it prints the sizes of both installs. `arm` runs
the demo's int4 artifact with the aarch64 wheel of ONNX Runtime and our kernels for Arm, on
processors that have i8mm, dot products, or neither, and compares the logits with those of this
machine.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.kernels.onnx.library import LIBRARY
from tests.kernels.onnx import programs

ROOT = Path(__file__).parents[1]
OUT = Path("out/bare")
RELEASE, PYTHON = "trixie", "3.13"
"""Of Debian, and of Python in it."""
PROCESSORS = "max", "neoverse-n1", "cortex-a72"
TAGS = "manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64"

TRY = """\
set -e
export SSL_CERT_FILE=/ca.crt PIP_CERT=/ca.crt REQUESTS_CA_BUNDLE=/ca.crt
unset PIP_FIND_LINKS
rm -rf /installed /demo
{python} -m venv /installed
wheel=$(ls /wheel/rgexport-*.whl)
/installed/bin/pip install -q $wheel
echo "core: $(du -sm /installed | cut -f1) MB"
/installed/bin/pip install -q --find-links /wheel {torch} "$wheel[export]"
echo "with the export: $(du -sm /installed | cut -f1) MB"
/installed/bin/rgexport --version
/installed/bin/rgexport onnx --size demo --int4 -o /demo --force
/installed/bin/rgexport generate /demo -v -p "It is a truth universally acknowledged, that" -n 16
! command -v cc gcc c++ g++ clang cmake
"""
RUN = """\
import sys
import numpy as np
from rgexport.artifacts.opening import open_artifact
from rgexport.runtimes.onnx.session import OrtSession

session = OrtSession(open_artifact(sys.argv[1]), threads=2)
ids = np.random.default_rng(3).integers(110, 8192, 300)
logits = [session.prefill(ids[None])[0, -1]]
for _ in range(20):
    logits.append(session.step(np.array([int(logits[-1].argmax())]))[0])
np.save(sys.argv[2], np.stack(logits))
print(session.info.kernels)
"""


def main() -> None:
    """Runs one of both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["x86", "arm"])
    parser.add_argument("--torch", default="torch", help="what pip installs, such as a CPU wheel")
    asked = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    _in_a_bare_root(asked.torch) if asked.what == "x86" else _on_arm()


def _in_a_bare_root(torch: str) -> None:
    root, prefix = OUT / "x86", Path(sys.base_prefix)
    if not root.exists():
        _call("debootstrap", "--variant=minbase", "--include=libffi8", RELEASE, root)  # for ctypes
    wheels = root / "wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    _call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, ROOT)
    if Path(torch).is_file():
        torch = f"/wheel/{Path(shutil.copy(torch, wheels)).name}"
    target = root / prefix.relative_to("/")
    if not target.exists():
        kept = shutil.ignore_patterns("site-packages", "test", "__pycache__")
        shutil.copytree(prefix, target, symlinks=True, ignore=kept)
    for place in ("/etc/resolv.conf", "/etc/hosts"):
        shutil.copy(place, root / place[1:])
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", root / "ca.crt")
    python = prefix / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    (root / "try.sh").write_text(TRY.format(python=python, torch=torch))
    _call("mount", "--bind", "/proc", root / "proc")  # where engines look for the processor
    try:
        _call("chroot", root, "/bin/sh", "/try.sh")
    finally:
        _call("umount", root / "proc")


def _on_arm() -> None:
    artifact, here = OUT / "demo-int4", OUT / "here.npy"
    start = "from rgexport.cli import main; main()"
    made = [*("onnx", "--size", "demo", "--int4", "--force", "-o"), artifact]
    _call(sys.executable, "-c", start, *made)
    run = OUT / "run.py"
    run.write_text(RUN)
    print("here:", _output(sys.executable, run, artifact, here))
    root, packages, source = _arm_root(), _arm_packages(), OUT / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "rgexport", source / "rgexport", ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(programs.arm() / LIBRARY.name, source / "rgexport" / "kernels" / "onnx")
    expected = np.load(here)
    for processor in PROCESSORS:
        found = OUT / f"{processor}.npy"
        emulator = ["qemu-aarch64", "-cpu", processor, "-L", root]
        places = {"PYTHONPATH": f"{source.resolve()}:{packages.resolve()}"}
        python = [root / f"usr/bin/python{PYTHON}", run, artifact, found]
        kernels = _output(*emulator, *python, PYTHONHOME=str(root / "usr"), **places)
        logits = np.load(found)
        same = (logits.argmax(1) == expected.argmax(1)).all()
        share = np.abs(logits - expected).max() / np.abs(expected).max()
        print(f"{processor}: {kernels}, {'the same' if same else 'OTHER'} tokens, {share:.2%}")


def _arm_root() -> Path:
    """The files of an aarch64 Debian with Python; nothing is configured."""
    folder = (OUT / "arm").resolve()
    if not folder.exists():
        first = OUT / "arm-packages"
        included = "--include=python3-minimal,python3,libpython3-stdlib"
        _call(
            "debootstrap",
            "--arch=arm64",
            "--variant=minbase",
            included,
            "--foreign",
            RELEASE,
            first,
        )
        for package in sorted((first / "var/cache/apt/archives").glob("*.deb")):
            _call("dpkg", "-x", package, folder)
    return folder


def _arm_packages() -> Path:
    """What the core needs, for aarch64."""
    folder = OUT / "arm-site"
    if not folder.exists():
        wheels = OUT / "arm-wheels"
        platforms = [f"--platform={tag}" for tag in TAGS]
        kinds = f"--python-version={PYTHON}", "--only-binary=:all:"
        core = "click filelock huggingface_hub jinja2 ml_dtypes numpy onnxruntime platformdirs"
        core += " protobuf rich sentencepiece tokenizers"
        _call(
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            *platforms,
            *kinds,
            "-d",
            wheels,
            *core.split(),
        )
        for wheel in wheels.glob("*.whl"):
            shutil.unpack_archive(wheel, folder, "zip")
    return folder


def _call(*command: Any) -> None:
    subprocess.run(list(map(str, command)), check=True)


def _output(*command: Any, **variables: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
