"""The suite `tasks` against lm_eval's own Hugging Face model, and what it refuses."""

import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.evaluate import run as runner
from rgexport.evaluate.harness.answers import answered
from rgexport.evaluate.harness.tasks import load_tasks
from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import open_subject
from rgexport.evaluate.suites import tasks
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.griffin.checkpoint import open_checkpoint
from tests.evaluate.small_model import small_model
from tests.foreign_gguf import write_llama
from tests.llama_tools import needs_llama_cpp
from tests.models import make_config

pytestmark = pytest.mark.full  # lm_eval comes with a gigabyte of packages
CONFIG = make_config("rra", width=64, heads=4, vocab_size=8192, window=512)
"""Texts are shorter than the window: Hugging Face's code takes it for one less."""
DOCUMENTS = {
    "questions": [
        {"ask": f"Is {n} a number of {noun}?", "answers": answers, "right": n % 3}
        for n, noun in enumerate(["cats", "dogs", "letters", "houses"])
        for answers in [["yes", "no", "perhaps it is so"]]
    ],
    "shown": [
        {"ask": f"Is {n} small?", "answers": ["yes", "no", "maybe"], "right": n % 3}
        for n in range(3)
    ],
    "texts": [
        {"text": "It was a bright cold day in April, and the clocks were striking thirteen. " * 2},
        {"text": "Zürich, 東京 and <eos> there."},
        {"text": "<bos>A"},
    ],
}
DATA = "dataset_path: json\ndataset_kwargs: {cache_dir: cache, data_files: {%s}}\n"
QUESTIONS = DATA % "test: questions.jsonl, shown: shown.jsonl"
TASKS = {
    # One token of an answer, several, and none in front of it.
    "choices": QUESTIONS
    + """
test_split: test
fewshot_split: shown
fewshot_config: {sampler: first_n}
num_fewshot: 3
output_type: multiple_choice
doc_to_text: "Question: {{ask}}\\nAnswer:"
doc_to_choice: answers
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "alone": QUESTIONS
    + """
test_split: test
output_type: multiple_choice
doc_to_text: "{{ask}} I think "
target_delimiter: ""
doc_to_choice: ["it is not", "it might be"]
doc_to_target: 0
metric_list: [{metric: acc_mutual_info}]
""",
    "texts": DATA % "test: texts.jsonl"
    + """
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "replies": QUESTIONS
    + """
test_split: test
fewshot_split: shown
num_fewshot: 1
output_type: generate_until
doc_to_text: "{{ask}} "
doc_to_target: "{{answers[right]}}"
generation_kwargs: {until: ["\\n\\n", "e"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return small_model(tmp_path_factory.mktemp("tasks"), CONFIG)[0]


@pytest.fixture
def files(tmp_path) -> Path:
    """A folder of task files and their documents."""
    return write_tasks(tmp_path / "files", TASKS)


def write_tasks(folder: Path, written: dict[str, str]) -> Path:
    folder.mkdir()
    for name, documents in DOCUMENTS.items():
        lines = (f"{json.dumps(document)}\n" for document in documents)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for name, text in written.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}")
    return folder


def hflm(model: Path, files: Path) -> dict[str, Any]:
    """Returns what lm_eval itself finds; it looks for documents in the working folder."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=1),
        tasks=[*TASKS],
        task_manager=TaskManager(include_path=str(files), include_defaults=False),
        bootstrap_iters=0,
    )


def test_answers_and_figures_are_those_of_hflm(model, files, tmp_path, capfd, monkeypatch):
    """Also in pieces of five requests."""
    monkeypatch.setattr(tasks, "REQUESTS", 5)
    monkeypatch.chdir(files)
    expected = hflm(model, files)
    artifact = tmp_path / "artifact"
    export_onnx(open_checkpoint(model), OnnxOptions(precision="fp32"), artifact)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    asked = [word for name in TASKS for word in ("--task", name)]
    words = ["--suite", "tasks", *asked, "--task-files", str(files), "-o", "results"]
    assert run(["evaluate", str(model), str(artifact), *words]) == 0
    shown, remarks = capfd.readouterr()
    assert re.search(r"choices +acc +4 +0\.\d{3} ± 0\.\d{3} +0\.\d{3}", shown)
    assert re.search(r"choices +tokens read +\d\d\d of \d\d\d ", shown)
    assert {line.split()[0] for line in remarks.splitlines()} == {"Checking", "Evaluating"}
    assert "bits_per_byte" in Path("results/evaluation.html").read_text()
    for each in json.loads(Path("results/evaluation.json").read_text())["models"]:
        entries = {entry["task"]: entry for entry in each["suites"]["tasks"]["tasks"]}
        assert entries["choices"]["shots"] == 3
        for task, entry in entries.items():
            for figure in entry["metrics"]:
                # Perplexities are powers of e.
                value = expected["results"][task][f"{figure['metric']},none"]
                assert figure["value"] == pytest.approx(value, rel=1e-4)
    answers = {
        (task, json.dumps(arguments)): answer[0]
        for task, samples in expected["samples"].items()
        for sample in samples
        for arguments, answer in zip(sample["arguments"], sample["resps"], strict=True)
    }
    request = Request(tasks=(*TASKS,), task_files=files)
    every = load_tasks(request.tasks, files, None, 0).asked
    for subject in (open_subject(str(model)), open_subject(str(artifact))):
        results = runner.Results(Path("results"))
        for piece in tasks.pieces(subject, request):
            task, first, count = (piece.work[key] for key in ("task", "first", "requests"))
            found = results.get(piece)["answers"]
            for one, answer in zip(every[task][first : first + count], found, strict=True):
                assert answer == pytest.approx(answers[task, one.arguments], abs=1e-4)


def test_other_documents_are_other_work(model, files, tmp_path):
    subject = open_subject(str(model))

    def keys(examples: int | None, files: Path) -> set[str]:
        request = Request(tasks=("texts",), task_files=files, examples=examples)
        return {piece.key for piece in tasks.pieces(subject, request)}

    other = write_tasks(tmp_path / "other", TASKS)
    assert keys(None, files) == keys(None, other) == keys(3, other) != keys(2, other)
    load_tasks.cache_clear()
    (other / "texts.jsonl").write_text('{"text": "Another one."}\n')
    assert keys(None, files) != keys(None, other)


@pytest.mark.parametrize(("weighted", "share"), [("true", 3 / 7), ("false", (1 / 2 + 1 / 3) / 2)])
def test_groups_are_lm_evals(weighted, share, files):
    """Two answers of four are right in one task, and one of three in the other."""
    listed = f"aggregate_metric_list: [{{metric: acc, weight_by_size: {weighted}}}]"
    (files / "both.yaml").write_text(f"group: both\ntask: [choices, few]\n{listed}\n")
    few = TASKS["choices"].replace("test: questions", "test: shown")
    (files / "few.yaml").write_text(f"task: few\n{few}")
    request = Request(tasks=("both",), task_files=files)
    asked = load_tasks(request.tasks, files, None, 0).asked
    work = {task: {"task": task, "first": 0, "requests": len(own)} for task, own in asked.items()}
    found = [
        (work[task], {"answers": [[-float(n % 3), False] for n in range(len(own))]} | READ)
        for task, own in asked.items()
    ]
    summed = {
        entry["task"]: entry for entry in tasks.summary(tasks.scored(found, request))["tasks"]
    }
    assert summed["choices"]["metrics"][0]["value"] == 1 / 2
    assert summed["few"]["metrics"][0]["value"] == pytest.approx(1 / 3)
    assert summed["both"]["metrics"][0]["value"] == pytest.approx(share)
    assert summed["both"]["metrics"][0]["low"] is None and summed["both"]["tokens"] is None


READ = {"read": 1, "asked": 2}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("process_docs: !function code.ran", r"has !function, by which lm_eval loads Python code"),
        ("doc_to_text: !!python/name:os.system", "is no task file: could not determine a cons"),
        ("class: code.Task", "has class, by which lm_eval loads a class"),
        ("include: more", r"more has !function, by which lm_eval loads"),
        ("metric_list: [{metric: ./code.py}]", r"has the metric ./code.py, by which"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "has hf_evaluate, by which"),
        ("use_prompt: 'x.yaml:y'", "has use_prompt, by which"),
        ("dataset_path: pandas", "has dataset_path: pandas, by which lm_eval loads pickles"),
        ("dataset_kwargs: {trust_remote_code: true}", "has trust_remote_code, by which"),
        ("doc_to_text: \"{{ ''.__class__.mro() }}\"", "SecurityError: access to attribute"),
        ("unsafe_code: true", "the task bad runs code that a model writes"),
        ("doc_to_text: '{{ nothing }}'", "lm_eval cannot load the tasks: Undefined"),
        ("output_type: guess", "lm_eval cannot load the tasks: ValueError: Got invalid outp"),
        ("{", "is no task file: while scanning"),
    ],
)
def test_no_code_of_a_folder_is_run(text, line, files):
    (files / "code.py").write_text(f"open({str(files / 'ran')!r}, 'w')\ndef ran(x): return x\n")
    (files / "more").write_text("process_docs: !function code.ran\n")
    (files / "bad.yaml").write_text(f"task: bad\n{TASKS['choices']}\n{text}\n")
    with pytest.raises(RequestError, match=line):
        load_tasks(("bad",), files, None, 0)
    assert not (files / "ran").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--suite tasks", r"--suite tasks needs --task NAME: a task of lm_eval, or one of --task"),
        ("--task x --task-files nowhere", "--task-files is nowhere; expected a folder of task"),
        ("--task x --task-files {files}/empty", "empty has no tasks; expected .yaml files with"),
    ],
)
def test_wrong_requests(words, line, model, files, capsys, tmp_path):
    (files / "empty").mkdir()
    asked = ["--suite", "tasks", *words.format(files=files).split()]
    assert run(["evaluate", str(model), *asked, "-o", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and re.search(line, error[0])


def test_names_are_no_paths(files):
    """lm_eval would load a file by its path, with all that it names."""
    name = str(files / "choices.yaml")
    with pytest.raises(RequestError, match=f"--task is '{name}'; expected a task, a group or"):
        load_tasks((name, "texts"), files, None, 0)


@needs_llama_cpp
def test_states_may_differ_in_length(files, tmp_path):
    """Those of a transformer have the length of what it has read."""
    subject = open_subject(str(write_llama(tmp_path / "llama.gguf")))
    asked = load_tasks(("replies",), files, None, 0).asked["replies"]
    session = subject.session()
    together = answered(subject.tokenizer, session, asked)["answers"]
    alone = [answered(subject.tokenizer, session, [one])["answers"] for one in asked]
    assert [[reply] for reply in together] == alone
    session.close()


def test_without_lm_eval(model, files, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    words = ["--task", "texts", "--task-files", str(files), "--suite", "tasks"]
    assert run(["evaluate", str(model), *words, "-o", str(tmp_path / "results")]) == 2
    assert "needs lm_eval: pip install 'rgexport[tasks]'" in capsys.readouterr().err


def test_local_tasks_need_no_network(files, monkeypatch):
    def refused(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: refused(None, host))
    found = load_tasks(("texts",), files, None, 0)
    assert len(found.asked["texts"]) == 3


def test_tasks_are_no_suite_unless_they_are_asked_for():
    assert "tasks" not in runner.require_known([])
    assert runner.require_known([], ["choices"])[-1] == "tasks"
    assert runner.require_known(["tasks", "text"], ["choices"]) == ["text", "tasks"]


def test_differences_are_of_the_same_examples():
    def found(right: list[float]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        figure = {"metric": "acc", "sums": right, "counts": [1.0] * len(right)}
        unknown = {"metric": "f1", "sums": None, "counts": None}
        return [({"task": "choices"}, {"metrics": [figure, unknown]})]

    better = tasks.differences(found([0.0] * 20), found([1.0] * 12 + [0.0] * 8))["metrics"]
    assert [gap["metric"] for gap in better] == ["acc"]
    assert better[0]["value"] == pytest.approx(0.6) and better[0]["p"] < 0.01
