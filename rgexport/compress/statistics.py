"""The pass of a text through the model, one layer's weights in memory at a time.

Forward it sums x xᵀ of the linears' inputs, backward g² of the gradients at their outputs. Each
step ends in `Work`, so that a later run goes on after the last one that was complete.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rgexport.compress.backward import SquareSums, square_sum
from rgexport.compress.grams import Gram, watched_inputs
from rgexport.compress.head import head_statistics
from rgexport.compress.passages import Passages
from rgexport.compress.work import StatisticsFile, Work
from rgexport.errors import RequestError
from rgexport.griffin.layout import EMBEDDING, input_site
from rgexport.griffin.reference import Reference
from rgexport.griffin.state import layer_states
from rgexport.griffin.step import LayerState
from rgexport.progress import task
from rgexport.quantize.calibration_format import (
    EMBEDDED,
    FISHER,
    PROBABILITY,
    gradient_name,
    hessian_name,
    input_columns,
    linears,
)

_FORWARD, _BACKWARD = 2048, 1024
"""Tokens that go through a layer at once, which bounds the memory of its activations."""


@dataclass(frozen=True)
class Collector:
    """Collects the statistics of a text; `gradients` are its first sequences."""

    model: Reference
    text: Passages
    gradients: Passages
    work: Work
    file: StatisticsFile
    seed: int

    def collect(self) -> None:
        """Does all steps that are not done, in their order."""
        self.forward()
        self.head()
        self.backward()

    def forward(self) -> None:
        """All layers: the Hessians of their inputs, and the residual stream after the last."""
        count = self.model.config.num_layers
        done = self.work.steps("stream")
        stream = self._begin() if not done else self._load(f"stream-{done[-1]}")
        first, tokens = done[-1] if done else 0, len(self.text.tokens)
        if first == count:
            return
        with task("Running the layers", (count - first) * tokens, "tokens x layers") as advance:
            for index in range(first, count):
                self.work.save(f"input-{index}", self._start_of(stream).cpu().numpy())
                self.file.write(self._through(index, stream))
                self.work.save(f"stream-{index + 1}", stream.cpu().numpy())
                self.work.drop(f"stream-{index}")
                advance(tokens)

    def head(self) -> None:
        """The head's Hessian, the probabilities, and the gradient after the last layer."""
        last = self.model.config.num_layers
        if self.work.steps("gradient"):
            return
        stream, site = self._load(f"stream-{last}"), str(input_site(EMBEDDING))
        norm = self.model.final_norm()
        start = self._start_of(stream).clone().requires_grad_()
        with torch.no_grad():
            hidden = norm(stream)
        gram = Gram(site, self.model.config.width, stream.device)
        gram.add(hidden)
        with task("Running the head", len(hidden), "tokens") as advance:
            found = head_statistics(self.model, hidden, len(start), self.seed, advance)
        self.file.write({PROBABILITY: found.probability, FISHER: found.fisher})
        self.file.write({hessian_name(site, i): t for i, t in enumerate(gram.triangles())})
        (gradient,) = torch.autograd.grad(norm(start), start, found.gradient)
        self.work.save(f"gradient-{last}", gradient.cpu().numpy())

    def backward(self) -> None:
        """All layers from the last: the gradients at the outputs of their linears."""
        below = min(self.work.steps("gradient"))
        gradient, tokens = self._load(f"gradient-{below}"), len(self.gradients.tokens)
        with task("Running backwards", (below or 1) * tokens, "tokens x layers") as advance:
            for index in reversed(range(below)):
                gradient, sums = self._back_through(index, gradient)
                means = sums.means(tokens)
                self.file.write({gradient_name(site): mean for site, mean in means.items()})
                self.work.save(f"gradient-{index}", gradient.cpu().numpy())
                self.work.drop(f"gradient-{index + 1}")
                advance(tokens)
        embedded = (square_sum(gradient) / tokens).float().cpu().numpy()
        self.file.write({gradient_name(EMBEDDED): embedded})

    def _begin(self) -> Tensor:
        """The residual stream [N, width] before the first layer."""
        with torch.no_grad():
            return self.model.embed(self.text.tokens.astype(np.int64))

    def _start_of(self, stream: Tensor) -> Tensor:
        """That of the sequences that have gradients."""
        return stream[: len(self.gradients.tokens)]

    def _load(self, name: str) -> Tensor:
        found = self.work.load(name)
        expected = self.model.config.width
        if found is None or found.ndim != 2 or found.shape[1] != expected:
            raise RequestError(
                f"{self.work.folder} lacks {name}; remove it and run the command again"
            )
        return torch.from_numpy(found).to(self.model.device)

    def _through(self, index: int, stream: Tensor) -> dict[str, np.ndarray]:
        """Takes the stream through a layer, in place; returns the Hessians of its inputs."""
        layer = self.model.layer(index)
        grams, watched = self._grams(index)
        with torch.no_grad(), watched_inputs(layer, watched):
            for place, shape in self.text.batches(_FORWARD):
                x = stream[place].unflatten(0, shape)
                stream[place] = layer(x, *self._beginning(index, shape))[0].flatten(0, 1)
        return {
            hessian_name(site, block): triangle
            for site, gram in grams.items()
            for block, triangle in enumerate(gram.triangles())
        }

    def _grams(self, index: int) -> tuple[dict[str, Gram], dict[str, Gram]]:
        """The sums of a layer by site, and by one of the linears that read from it."""
        prefix, config = f"layers.{index}.", self.model.config
        readers = {
            str(input_site(name)): name for name in linears(config) if name.startswith(prefix)
        }
        columns = input_columns(config)
        grams = {site: Gram(site, columns[site], self.model.device) for site in readers}
        by_name = {
            name.removeprefix(prefix).removesuffix(".weight"): grams[site]
            for site, name in readers.items()
        }
        return grams, by_name

    def _back_through(self, index: int, gradient: Tensor) -> tuple[Tensor, SquareSums]:
        """The gradient [n, width] before a layer from that after it, and Σ g² inside."""
        layer, sums = self.model.layer(index), SquareSums()
        inputs = self._load(f"input-{index}")
        before = torch.empty_like(gradient)
        with sums.watched(layer):
            for place, shape in self.gradients.batches(_BACKWARD):
                x = inputs[place].unflatten(0, shape).requires_grad_()
                y = layer(x, *self._beginning(index, shape))[0]
                (found,) = torch.autograd.grad(y, x, gradient[place].unflatten(0, shape))
                before[place] = found.flatten(0, 1)
        return before, sums

    def _beginning(self, index: int, shape: tuple[int, int]) -> tuple[Tensor, LayerState]:
        """Positions and a fresh state for sequences; the window is no longer than they are."""
        config, device = self.model.config, self.model.device
        short = dataclasses.replace(config, window=min(config.window, shape[1]))
        first, second = (
            torch.zeros(shape[0], *spec.shape, device=device)
            for spec in layer_states(short, index, "float32")
        )
        return torch.arange(shape[1], device=device).expand(shape), (first, second)
