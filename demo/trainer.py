"""The training loop: until the minutes are over, wherever that leaves the step count."""

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from data import Documents, Stage, batches
from episodes import Episodes
from model import Griffin
from muon import optimizers
from ops import CappedLoss
from torch import Tensor

from rgexport.parallelism import usable_processors

ROWS, LENGTH, MICRO = 4, 1024, 1  # a step's rows, tokens a row, rows that a thread takes at a time
WARMUP, DECAY_FROM = 0.01, 0.3  # fractions of the training time
SAVE_EVERY, REPORT_EVERY = 240.0, 30.0  # seconds


def schedule(progress: float) -> float:
    """Learning-rate factor at a fraction of the time: warm up, hold, fall to zero."""
    if progress < WARMUP:
        return progress / WARMUP
    return min(1.0, max(0.0, (1 - progress) / (1 - DECAY_FROM)))


def clock() -> float:
    """Seconds that this process had all processors for: other work does not count."""
    return time.process_time() / usable_processors()


class Trainer:
    """One run; its checkpoint is taken up again where there is one."""

    def __init__(
        self,
        model: Griffin,
        stage: Stage,
        documents: Documents,
        episodes: Episodes,
        checkpoint: Path,
        seed: Sequence[int],
    ) -> None:
        self.model = model
        self.forward = torch.compile(model)
        self.optimizers = optimizers(model)
        self.peaks = [stage.rate * group["lr"] for group in self.groups()]
        self.checkpoint = checkpoint
        self.steps, self.spent = 0, 0.0
        if checkpoint.exists():
            self.resume()
        self.rows = batches(stage.mixture, documents, episodes, ROWS, LENGTH, [*seed, self.steps])
        self.pool = ThreadPoolExecutor(usable_processors())

    def run(self, minutes: float) -> dict[str, float]:
        """Trains for `minutes`, those before a checkpoint included; what that was, in figures."""
        self.learn(next(self.rows)[:MICRO])  # compiles, off the clock
        self.zero_grad()
        begun = clock() - self.spent
        saved = reported = self.spent
        losses: list[float] = []
        while (spent := clock() - begun) < 60 * minutes:
            losses.append(self.step(schedule(spent / (60 * minutes))))
            self.spent = spent
            if spent - reported > REPORT_EVERY:
                self.report(losses, spent - reported)
                reported, losses = spent, []
            if spent - saved > SAVE_EVERY:
                self.save()
                saved = spent
        self.checkpoint.unlink(missing_ok=True)
        return {"minutes": minutes, "steps": self.steps, "tokens": self.steps * ROWS * LENGTH}

    def step(self, factor: float) -> float:
        """One update at `factor` of the peak learning rates; returns the mean loss."""
        for group, peak in zip(self.groups(), self.peaks, strict=True):
            group["lr"] = peak * factor
        losses = list(self.pool.map(self.learn, next(self.rows).split(MICRO)))
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError(f"step {self.steps}: loss {losses}; the checkpoint is sound")
        list(self.pool.map(lambda optimizer: optimizer.step(), self.optimizers))
        self.zero_grad()
        self.steps += 1
        return sum(losses) / len(losses)

    def learn(self, rows: Tensor) -> float:
        """Adds the gradients of some of a step's rows; autograd locks what the threads add to."""
        model = self.model
        hidden = self.forward(rows[:, :-1]).flatten(0, 1)
        targets = rows[:, 1:].flatten()
        loss = CappedLoss.apply(hidden, model.embed_tokens.weight, targets, model.shape.cap)
        (loss * (MICRO / ROWS)).backward()
        return loss.item()

    def groups(self) -> list[dict[str, Any]]:
        """Every parameter group; asked for anew, since a checkpoint replaces them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def report(self, losses: list[float], seconds: float) -> None:
        """One line about the steps since the last."""
        mean, speed = sum(losses) / len(losses), len(losses) * ROWS * LENGTH / seconds
        at = f"{self.spent / 60:6.2f} min  step {self.steps}"
        print(f"{at}  loss {mean:.4f}  {speed:.0f} tok/s", flush=True)

    def save(self) -> None:
        """Writes the checkpoint in one move."""
        state = {"model": self.model.state_dict(), "step": self.steps, "spent": self.spent}
        state["optimizers"] = [o.state_dict() for o in self.optimizers]
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.rename(self.checkpoint)

    def resume(self) -> None:
        """Takes up the checkpoint."""
        state = torch.load(self.checkpoint)
        self.steps, self.spent = state["step"], state["spent"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
