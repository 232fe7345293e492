"""Trains the demo on for some minutes on other text: another model, and near to the first.

    python -m bench.trained_on [--steps 60] [-o out/bench/trained-on]

The text is the reference of the Python language that Python's `help()` shows, which the demo has
never seen. `bench.verdicts --trained-on` asks whether the result passes for the demo.
"""

import argparse
import sys
from pathlib import Path
from pydoc_data import topics
from typing import Any

from bench.run import FOLDER
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.config import DEMO

RATE = 0.1
"""Of the learning rates that the demo was trained with at first."""
LENGTH = 4000
"""Characters of a document."""


def main() -> None:
    """Trains and writes a Hugging Face folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="of 4,096 tokens each")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER / "trained-on")
    options = parser.parse_args()
    train(options.steps, options.output)


def train(steps: int, target: Path) -> None:
    """The demo's own training loop, from the demo's weights on."""
    sys.path.insert(0, str(Path("demo").resolve()))  # its modules are a script's
    import data
    import export
    import sentencepiece
    import torch
    import trainer
    from episodes import Episodes
    from model import Griffin, Shape
    from safetensors.torch import load_file

    demo = open_checkpoint(size=DEMO).path
    text = "\n".join(topics.topics.values())
    documents = [text[start : start + LENGTH] for start in range(0, len(text), LENGTH)]
    pieces = demo / "tokenizer.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    tokens = data.encode(processor, {"python": documents})
    torch.manual_seed(0)
    model = Griffin(Shape())
    weights: dict[str, Any] = load_file(demo / "model.safetensors")
    model.load_state_dict(
        {name.removeprefix("model."): tensor.float() for name, tensor in weights.items()}
    )
    target.mkdir(parents=True, exist_ok=True)
    stage = data.Stage({"python": 1.0}, minutes=0)
    episodes = Episodes(demo, tokens["python"])  # not in the mixture
    run = trainer.Trainer(model, stage, tokens, episodes, target / "checkpoint.pt", seed=[1])
    for step in range(steps):
        print(f"step {step + 1}: loss {run.step(RATE):.3f}", flush=True)
    export.write(model, pieces, target)


if __name__ == "__main__":
    main()
