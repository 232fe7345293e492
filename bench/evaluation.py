"""Evaluates the demo model in five artifacts; writes a page and its figures.

    python -m bench.evaluation [--model demo/model] [--more WORD …]

Exports the model to `out/evaluation`, and runs `rgexport evaluate` there: all suites but `tasks`.
To be run in the repository's root: a quarter of an hour on two cores, after `make llama-tools`.
What is there is not done again. `--more` are further arguments of `evaluate`, such as `--trials 8`.
"""

import argparse
from pathlib import Path

from bench.quality import TEXTS
from bench.run import command
from rgexport.evaluation.report import PAGE
from rgexport.progress import note

FOLDER = Path("out/evaluation")
CALIBRATION = "texts.calibration"
ARTIFACTS = {
    "fp32": "onnx --precision fp32",
    "int8": "onnx --int8",
    "int4": "onnx --int4",
    "int4-best": f"onnx --int4 --calibration {CALIBRATION}",
    "q4_k_m.gguf": "gguf --type q4_k_m",
}
"""Name → what to type after `rgexport`; the first is what the others are compared with."""
SUITES = "text", "memory", "noise", "window", "length"


def main() -> None:
    """Makes missing artifacts and evaluates all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[])
    asked = parser.parse_args()
    folder = FOLDER / asked.model.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CALIBRATION).exists():
        command("calibrate", "-m", asked.model, "-o", folder / CALIBRATION)
    for name, words in ARTIFACTS.items():
        if not (folder / name).exists():
            words = words.replace(CALIBRATION, str(folder / CALIBRATION))
            command(*words.split(), "-m", asked.model, "-o", folder / name)
    suites = [word for suite in SUITES for word in ("--suite", suite)]
    texts = [word for text in TEXTS.values() for word in ("--text", text)]
    models, results = [folder / name for name in ARTIFACTS], folder / "results"
    command("evaluate", *models, *suites, *texts, "-o", results, *asked.more)
    note(f"{results / PAGE} is complete")


if __name__ == "__main__":
    main()
