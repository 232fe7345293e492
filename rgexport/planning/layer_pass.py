"""Passes a text through the model, with one layer's weights in memory at a time.

The forward pass sums x xᵀ of the linears' inputs, the backward pass g² of the gradients at their
outputs. Each step ends with a file in the calibration's folder, where a later run continues.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgexport.errors import RequestError
from rgexport.griffin.layer import Layer
from rgexport.griffin.layout import EMBEDDING, input_site
from rgexport.griffin.reference import Reference
from rgexport.planning.calibration_folder import CalibrationFolder, StatisticsFile
from rgexport.planning.passages import Passages
from rgexport.progress import Advance, task
from rgexport.quantize.algorithms import calibration_file as stored

_FORWARD, _BACKWARD = 2048, 1024  # tokens that go through a layer at once; bounds its activations
_PANEL = 512  # rows of a triangle that are computed together: fewer waste less, but run slower
_LOGIT_BYTES = 512 << 20  # most bytes of logits in memory; the head is read once for as many tokens
_SLAB = 4096  # rows of the vocabulary per computed slab of probabilities


class Gram:
    """Σ x xᵀ over tokens, float32: the lower triangles of the diagonal blocks."""

    def __init__(self, site: str, columns: int, device: torch.device):
        self._site = site
        self._bounds = stored.column_blocks(columns)
        self._sums = [torch.zeros(b - a, b - a, device=device) for a, b in self._bounds]
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2)
        self._tokens += len(rows)
        for (start, stop), total in zip(self._bounds, self._sums, strict=True):
            x_block = rows[:, start:stop]
            # Panels end at the diagonal.
            for first in range(0, len(total), _PANEL):
                last = min(first + _PANEL, len(total))
                total[first:last, :last].addmm_(x_block[:, first:last].T, x_block[:, :last])

    def merge(self, other: "Gram") -> None:
        self._tokens += other._tokens
        for total, added in zip(self._sums, other._sums, strict=True):
            total += added

    def triangles(self) -> Iterator[np.ndarray]:
        """Yields the packed lower triangle of Σ x xᵀ / N of each block."""
        for total in self._sums:
            packed = stored.pack(total.cpu().numpy()) / np.float32(self._tokens)
            if not np.isfinite(packed).all():
                raise RequestError(
                    f"the values at {self._site} overflow on this text, so there are no statistics "
                    "of them; check the checkpoint with `rgexport inspect`, or give another --text"
                )
            yield packed


def _square_sum(gradient: Tensor) -> Tensor:
    return gradient.flatten(0, -2).square().sum(0, dtype=torch.float64)


RunLayer = Callable[[int, Iterable[Tensor]], Iterator[tuple[Tensor, dict[str, Gram]]]]
"""Takes the index of a layer and sequences in batches [B, T, width]; yields the layer's output, and
site → sums of inputs, in order."""


def run_layer(
    model: Reference, index: int, batches: Iterable[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Gram]]]:
    """A `RunLayer` of a model."""
    layer = model.layer(index)
    for x in batches:
        watched, grams = _with_grams(layer)
        with torch.no_grad():
            y, _ = watched(x, *model.beginning(index, *x.shape[:2]))
        yield y, grams


def _with_grams(layer: Layer) -> tuple[Layer, dict[str, Gram]]:
    """Returns a layer that sums the inputs of its linears, by the site that they are from."""
    grams: dict[str, Gram] = {}

    def compute(site: str, op: str, *arguments: Any) -> Any:
        source = input_site(f"{site}.weight")
        if source is not None and source not in grams:
            grams[source] = Gram(source, arguments[0].shape[-1], arguments[0].device)
            grams[source].add(arguments[0])
        return layer.compute(site, op, *arguments)

    return replace(layer, compute=compute), grams


def _with_gradients(layer: Layer) -> tuple[Layer, dict[str, Tensor]]:
    """Returns a layer that sums g² of each linear's outputs by its site, in backward passes."""
    sums: dict[str, Tensor] = {}

    def compute(site: str, op: str, *arguments: Any) -> Any:
        def add(gradient: Tensor) -> None:
            sums[site] = sums.get(site, 0) + _square_sum(gradient)

        results = layer.compute(site, op, *arguments)
        if op == "linear":
            results.register_hook(add)
        return results

    return replace(layer, compute=compute), sums


@dataclass(frozen=True)
class HeadStatistics:
    """Statistics over the tokens of a text.

    Attributes:
        probability: the mean probability of each token, float32 [vocab].
        fisher: the mean of p (1 - p) c², float32 [vocab]; c is the soft cap's derivative.
        labels: tokens for the first positions, drawn from the model's distribution.
        gradient: of their summed negative log-likelihood at the head's input, [n, width].
    """

    probability: np.ndarray
    fisher: np.ndarray
    labels: np.ndarray
    gradient: Tensor


@torch.no_grad()
def head_statistics(
    model: Reference, hidden: Tensor, gradients: int, seed: int, advance: Advance
) -> HeadStatistics:
    """Computes statistics of the final norm's output [N, width]; gradients of the first tokens."""
    sums = np.zeros((2, model.config.vocab_size))
    drawn = np.random.default_rng(seed).random(gradients).astype(np.float32)
    step = max(1, _LOGIT_BYTES // (4 * model.config.vocab_size))
    labels, gradient = [], []
    for start in range(0, len(hidden), step):
        tokens = hidden[start : start + step]
        logits = _Logits(model, tokens)
        logits.add_to(sums)
        points = torch.from_numpy(drawn[start : start + step]).to(hidden.device)
        if len(points):
            labels.append(logits.draw(points))
            gradient.append(logits.gradient(labels[-1]))
        advance(len(tokens))
    probability, fisher = (sums / len(hidden)).astype(np.float32)
    return HeadStatistics(probability, fisher, torch.cat(labels).cpu().numpy(), torch.cat(gradient))


class _Logits:
    def __init__(self, model: Reference, hidden: Tensor):
        self._model, self._cap = model, model.config.soft_cap
        shape = len(hidden), model.config.vocab_size
        self._values = torch.empty(shape, device=hidden.device)
        log_sum = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        for start, rows in model.head_slabs():
            part = self._values[:, start : start + len(rows)]
            torch.mm(hidden, rows.T, out=part)
            if self._cap:
                part.div_(self._cap).tanh_().mul_(self._cap)
            log_sum = torch.logaddexp(log_sum, part.logsumexp(1))
        self._log_sum = log_sum.unsqueeze(1)

    def _slab(self, start: int, count: int) -> tuple[Tensor, Tensor | float]:
        """Returns probabilities [n, count] of a slab, and the soft cap's derivative."""
        part = self._values[:, start : start + count]
        slope = 1 - (part / self._cap).square_() if self._cap else 1.0
        return (part - self._log_sum).exp_(), slope

    def add_to(self, sums: np.ndarray) -> None:
        for start in range(0, self._values.shape[1], _SLAB):
            p, slope = self._slab(start, _SLAB)
            slab = sums[:, start : start + p.shape[1]]
            slab[0] += p.sum(0).cpu().numpy()
            slab[1] += (p * (1 - p) * slope * slope).sum(0).cpu().numpy()

    def draw(self, points: Tensor) -> Tensor:
        """Draws a label for each of the first tokens, by inverting its cumulative sums."""
        labels = self._values[: len(points)].argmax(1)  # where sums round below the point
        below = torch.zeros_like(points)
        for start in range(0, self._values.shape[1], _SLAB):
            sums = below.unsqueeze(1) + self._slab(start, _SLAB)[0][: len(points)].cumsum(1)
            index = torch.searchsorted(sums, points.unsqueeze(1), right=True).squeeze(1)
            inside = (below <= points) & (index < sums.shape[1])
            labels = torch.where(inside, start + index, labels)
            below = sums[:, -1]
        return labels

    def gradient(self, labels: Tensor) -> Tensor:
        count = len(labels)
        total = torch.zeros(0)
        for start, rows in self._model.head_slabs():
            p, slope = self._slab(start, len(rows))
            inside = (labels >= start) & (labels < start + len(rows))
            p = p[:count]
            p[inside, labels[inside] - start] -= 1
            slope = slope if isinstance(slope, float) else slope[:count]
            part = (p * slope) @ rows
            total = part if start == 0 else total.add_(part)
        return total


@dataclass(frozen=True)
class Collector:
    """Collects the statistics of a text; `gradients` are its first sequences."""

    model: Reference
    text: Passages
    gradients: Passages
    folder: CalibrationFolder
    file: StatisticsFile
    seed: int
    run: RunLayer

    def collect(self) -> None:
        self.forward()
        self.head()
        self.backward()

    def forward(self) -> None:
        """Computes the Hessians of all layers' inputs, and the residual stream after the last."""
        count = self.model.config.num_layers
        done = self.folder.steps("stream")
        first, tokens = done[-1] if done else 0, len(self.text.tokens)
        if done:
            stream = self._load(f"stream-{first}")
        else:
            with torch.no_grad():
                stream = self.model.embed(self.text.tokens.astype(np.int64))
        if first == count:
            return
        with task("Running the layers", (count - first) * tokens, "steps") as advance:
            for index in range(first, count):
                self.folder.save(
                    f"input-{index}", stream[: len(self.gradients.tokens)].cpu().numpy()
                )
                self.file.write(self._through(index, stream))
                self.folder.save(f"stream-{index + 1}", stream.cpu().numpy())
                self.folder.remove(f"stream-{index}")
                advance(tokens)

    def head(self) -> None:
        """Computes the head's Hessian, the probabilities, and the gradient after the last layer."""
        last = self.model.config.num_layers
        if self.folder.steps("gradient"):
            return
        stream, site = self._load(f"stream-{last}"), str(input_site(EMBEDDING))
        start = stream[: len(self.gradients.tokens)].clone().requires_grad_()
        with torch.no_grad():
            hidden = self.model.final_norm(stream)
        gram = Gram(site, self.model.config.width, stream.device)
        gram.add(hidden)
        with task("Running the head", len(hidden), "tokens") as advance:
            head = head_statistics(self.model, hidden, len(start), self.seed, advance)
        self.file.write({stored.PROBABILITY: head.probability, stored.FISHER: head.fisher})
        self.file.write({stored.hessian_name(site, i): t for i, t in enumerate(gram.triangles())})
        (gradient,) = torch.autograd.grad(self.model.final_norm(start), start, head.gradient)
        self.folder.save(f"gradient-{last}", gradient.cpu().numpy())

    def backward(self) -> None:
        """Computes the gradients at the outputs of all linears, from the last layer on."""
        below = min(self.folder.steps("gradient"))
        gradient, tokens = self._load(f"gradient-{below}"), len(self.gradients.tokens)
        with task("Running backwards", (below or 1) * tokens, "steps") as advance:
            for index in reversed(range(below)):
                gradient, sums = self._back_through(index, gradient)
                means = {
                    stored.gradient_name(site): (total / tokens).float().cpu().numpy()
                    for site, total in sums.items()
                }
                self.file.write(means)
                self.folder.save(f"gradient-{index}", gradient.cpu().numpy())
                self.folder.remove(f"gradient-{index + 1}")
                advance(tokens)
        embedded = (_square_sum(gradient) / tokens).float().cpu().numpy()
        self.file.write({stored.gradient_name(stored.EMBEDDED): embedded})

    def _load(self, name: str) -> Tensor:
        array = self.folder.load(name)
        expected = self.model.config.width
        if array is None or array.ndim != 2 or array.shape[1] != expected:
            raise RequestError(
                f"{self.folder.path} lacks {name}; remove it and run the command again"
            )
        return torch.from_numpy(array).to(self.model.device)

    def _through(self, index: int, stream: Tensor) -> dict[str, np.ndarray]:
        """Runs a layer on the stream, in place; returns Hessians, added in the order of batches."""
        batches = list(self.text.batches(_FORWARD))
        sequences = (stream[tokens].unflatten(0, shape) for tokens, shape in batches)
        totals: dict[str, Gram] = {}
        for (tokens, _), (y, grams) in zip(batches, self.run(index, sequences), strict=True):
            stream[tokens] = y.flatten(0, 1)
            for site, gram in grams.items():
                if site in totals:
                    totals[site].merge(gram)
                else:
                    totals[site] = gram
        return {
            stored.hessian_name(site, block): triangle
            for site, gram in totals.items()
            for block, triangle in enumerate(gram.triangles())
        }

    def _back_through(self, index: int, gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the gradient [n, width] before a layer, from that after it, and Σ g² inside."""
        layer, sums = _with_gradients(self.model.layer(index))
        before, inputs = torch.empty_like(gradient), self._load(f"input-{index}")
        for tokens, shape in self.gradients.batches(_BACKWARD):
            x = inputs[tokens].unflatten(0, shape).requires_grad_()
            y = layer(x, *self.model.beginning(index, *shape))[0]
            (before_x,) = torch.autograd.grad(y, x, gradient[tokens].unflatten(0, shape))
            before[tokens] = before_x.flatten(0, 1)
        return before, sums
