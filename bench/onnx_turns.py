"""Whole models in turns: a 2B with our kernels and without, and llama.cpp's transformer."""

import argparse
from contextlib import ExitStack
from typing import Any

from bench.llama import LlamaBench
from bench.onnx_models import STORAGES, TRANSFORMER, Storage, make_missing
from bench.read_speed import c_roofline
from bench.worker import Worker
from rgexport.artifacts.onnx.model_file import DATA_FILE
from rgexport.files.atomic import evict_from_page_cache
from rgexport.parallelism import usable_processors
from rgexport.progress import note
from rgexport.runtimes.bench.roofline import ReadSpeed, roofline

KERNELS = {"native": True, "stock": False}
"""Who takes turns with `llama`."""


def take_turns(test: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Model → `facts` of its sessions and `rounds`.

    A round has the `rate` (and of a session the `rss`) of each. Single tokens (`tg`) also have the
    read speeds between them: by `numpy` and by `c`, and by `c` of the `weights` where they lie.
    """
    storages = {name: STORAGES[name] for name in options.models}
    make_missing(list(storages.values()))
    threads = usable_processors()
    tokens = {"prompt": length} if test == "pp" else {}
    bench = LlamaBench(
        options.tools / "llama-bench",
        threads,
        0 if test == "pp" else length,
        repetitions=1,
        **tokens,
    )
    found = {}
    for name, storage in storages.items():
        evict_from_page_cache(storage.artifact / DATA_FILE)  # read anew, as at a first opening
        with ExitStack() as stack:
            speeds = _read_speeds(stack, threads, storage) if test == "tg" else {}
            workers = {
                kernels: stack.enter_context(Worker(storage.artifact, native=native))
                for kernels, native in KERNELS.items()
            }
            rounds = []
            for index in range(options.rounds):
                note(f"{name}, {test}{length}, round {index + 1} of {options.rounds}")
                entry: dict[str, Any] = {kind: [read()] for kind, read in speeds.items()}
                for kernels, worker in workers.items():
                    entry[kernels] = worker.measure(test, length)
                    for kind, read in speeds.items():
                        entry[kind].append(read())
                entry["llama"] = bench(TRANSFORMER)
                for kind, read in speeds.items():
                    entry[kind].append(read())
                rounds.append(entry)
        size = sum(file.stat().st_size for file in storage.artifact.iterdir())
        facts = {kernels: worker.facts for kernels, worker in workers.items()}
        found[name] = {"artifact_bytes": size, "facts": facts, "rounds": rounds}
    return {"test": f"{test}{length}", "threads": threads, "models": found}


def _read_speeds(stack: ExitStack, threads: int, storage: Storage) -> dict[str, ReadSpeed]:
    weights = storage.artifact / DATA_FILE
    return {
        "numpy": stack.enter_context(roofline(threads)),
        "c": stack.enter_context(c_roofline(threads)),
        "weights": stack.enter_context(c_roofline(threads, file=weights)),
    }
