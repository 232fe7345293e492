"""Runs artifacts in every release of onnxruntime-genai from 0.14 on, beside plain ONNX Runtime.

    python -m bench.genai out/demo-int4 [-o out/genai]

Each release gets an environment of its own under `-o`, where it stays. The table says whether the
logits after all prompts were equal to the last bit, and the time of a prompt and of single steps as
multiples of plain ONNX Runtime's, in turns with it. An artifact that was exported with
`--genai-native` runs with our kernels in both.
"""

import argparse
import json
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from rgexport.kernels.onnx.library import LIBRARY

PACKAGE, FIRST = "onnxruntime-genai", (0, 14)
SCRIPT = Path(__file__).with_name("in_genai.py")
MESSAGES = "Hi there", "What did I say?"


def releases() -> list[str]:
    """All releases from the first one on, the oldest first, as the package index lists them."""
    asked = [sys.executable, "-m", "pip", "index", "versions", PACKAGE]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Available versions: (.*)", said)
    assert found, said
    numbers = [tuple(map(int, word.split("."))) for word in found[1].split(", ")]
    return [".".join(map(str, number)) for number in sorted(numbers) if number >= FIRST]


def python_with(release: str, folder: Path) -> Path:
    """The interpreter of an environment that has this release."""
    place = folder / release
    python = place / "bin" / "python"
    if not (place / "installed").is_file():
        venv.create(place, with_pip=True, clear=True)
        packages = f"{PACKAGE}=={release}", "numpy"
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (place / "installed").touch()
    return python


def run(python: Path, artifact: Path, messages: tuple[str, ...] = MESSAGES) -> dict[str, Any]:
    """What `in_genai.py` finds."""
    command = [str(python), str(SCRIPT), str(artifact)]
    if (kernels := artifact / LIBRARY.name).is_file():
        command += ["--kernels", str(kernels)]
    if (artifact / "tokenizer.json").is_file():
        command += ["--chat", *messages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _row(artifact: Path, found: dict[str, Any]) -> str:
    ours, theirs = found["seconds"]["onnxruntime"], found["seconds"]["genai"]
    prompt, steps = (there / here for here, there in zip(ours, theirs, strict=True))
    equal = found["same_tokens"] and found["largest_difference"] == 0
    logits = "equal" if equal else f"differ by {found['largest_difference']:.2g}"
    versions = found["genai"], found["onnxruntime"]
    cells = *versions, artifact.name, logits, f"{prompt:.2f}", f"{steps:.2f}"
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the table, and writes it with the replies as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/genai"))
    asked = parser.parse_args()
    print("| genai | ONNX Runtime | artifact | logits | prompt, × | step, × |\n" + "|---" * 6 + "|")
    found = []
    for release in releases():
        python = python_with(release, asked.output)
        for artifact in asked.artifacts:
            found.append({"artifact": artifact.name, **run(python, artifact)})
            print(_row(artifact, found[-1]), flush=True)
    (asked.output / "found.json").write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
