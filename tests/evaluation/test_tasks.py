"""The suite `tasks` against lm_eval's own Hugging Face model, and what it refuses."""

import json
import re
import socket
import sys
from pathlib import Path

import pytest

from rgexport import progress
from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.evaluation import run as runner
from rgexport.evaluation.harness.tasks import load_tasks
from rgexport.evaluation.models import open_model
from rgexport.evaluation.pieces import EvaluationRequest
from rgexport.evaluation.suites import tasks
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.profiles import OnnxOptions
from rgexport.griffin.checkpoint import open_checkpoint
from tests.evaluation.small_model import small_model
from tests.models import make_config

pytestmark = pytest.mark.full  # lm_eval comes with a gigabyte of packages
CONFIG = make_config("rra", width=64, heads=4, vocab_size=8192, window=512)
"""Texts are shorter than the window: Hugging Face's code takes it for one less."""
ANSWERS = ["yes", "no", "maybe it is so"]
DOCUMENTS = {
    "questions": [
        {"ask": f"Is {n} a number of {noun}?", "answers": ANSWERS, "right": n % 3}
        for n, noun in enumerate(["cats", "dogs", "letters", "houses"])
    ],
    "shown": [{"ask": f"Is {n} small?", "answers": ANSWERS, "right": n} for n in range(3)],
    "texts": [
        {"text": "It was a bright cold day in April, and the clocks were striking thirteen. " * 2},
        {"text": "Zürich, 東京 and <eos> there."},
        {"text": "<bos>A"},
    ],
}
DATA = "dataset_path: json\ndataset_kwargs: {cache_dir: cache, data_files: {%s}}\n"
QUESTIONS = DATA % "test: questions.jsonl, shown: shown.jsonl"
TASKS = {
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
TASKS["few"] = TASKS["choices"].replace("test: questions", "test: shown")
GROUP = """group: both
task: [choices, few]
aggregate_metric_list: [{metric: acc, weight_by_size: false}]
"""
ASKED = "both", "texts", "replies"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("tasks"), CONFIG)[0]


@pytest.fixture
def files(tmp_path):
    """A folder of task files and their documents."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, documents in DOCUMENTS.items():
        lines = (f"{json.dumps(document)}\n" for document in documents)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}")
    (folder / "both.yaml").write_text(GROUP)
    return folder


def test_answers_and_figures_are_those_of_hflm(model, files, tmp_path, capfd, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(tasks, "REQUESTS", 5)
    monkeypatch.chdir(files)  # where lm_eval looks for documents
    expected = simple_evaluate(
        HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=1),
        tasks=[*ASKED],
        task_manager=TaskManager(include_path=str(files), include_defaults=False),
        bootstrap_iters=0,
    )
    artifact = tmp_path / "artifact"
    export_onnx(open_checkpoint(model), OnnxOptions(precision="fp32"), artifact)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "verbose", False)  # -v sets it for the process
    capfd.readouterr()
    asked = [word for name in ASKED for word in ("--task", name)]
    words = ["--suite", "tasks", *asked, "--task-files", str(files), "-o", "results", "-v"]
    assert run(["evaluate", str(model), str(artifact), *words]) == 0
    shown = capfd.readouterr().out
    assert re.search(r"choices +acc +4 +0\.\d{3} ± 0\.\d{3} +0\.\d{3}", shown)
    assert "bits_per_byte" in Path("results/evaluation.html").read_text()
    for each in json.loads(Path("results/evaluation.json").read_text())["models"]:
        entries = {entry["task"]: entry for entry in each["suites"]["tasks"]["tasks"]}
        assert entries.keys() == {*TASKS, "both"} and entries["choices"]["shots"] == 3
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
    request = EvaluationRequest(tasks=ASKED, task_files=files)
    every = load_tasks(request.tasks, files, None, 0).requests
    for subject in (open_model(str(model)), open_model(str(artifact))):
        results = runner.Results(Path("results"))
        for (piece,) in tasks.chains(subject, request):
            task, first, count = (piece.settings[key] for key in ("task", "first", "requests"))
            replies = results.get(piece)["answers"]
            for one, answer in zip(every[task][first : first + count], replies, strict=True):
                assert answer == pytest.approx(answers[task, one.arguments], abs=1e-4)


def test_other_documents_are_other_work(model, files):
    subject = open_model(str(model))

    def keys(examples: int | None) -> set[str]:
        load_tasks.cache_clear()
        request = EvaluationRequest(tasks=("texts",), task_files=files, examples=examples)
        return {piece.key for (piece,) in tasks.chains(subject, request)}

    before = keys(None)
    assert before == keys(3) != keys(2)
    (files / "texts.jsonl").write_text('{"text": "Another one."}\n')
    assert keys(None) != before


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("process_docs: !function code.ran", r"has !function, by which lm_eval loads Python code"),
        ("doc_to_text: !!python/name:os.system", "is no task file: could not determine a cons"),
        ("class: code.Task", "has class, by which lm_eval loads a class"),
        ("include: more", r"more has !function, by which lm_eval loads"),
        ("metric_list: [{metric: ./code.py}]", r"has the metric ./code.py, by which"),
        ("dataset_path: pandas", "has dataset_path: pandas, by which lm_eval loads pickles"),
        ("dataset_kwargs: {trust_remote_code: true}", "has trust_remote_code, by which"),
        ("doc_to_text: \"{{ ''.__class__.mro() }}\"", "SecurityError: access to attribute"),
        ("unsafe_code: true", "the task bad runs code that a model writes"),
        ("doc_to_text: '{{ nothing }}'", "lm_eval cannot load the tasks: Undefined"),
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
        ("", r"--suite tasks needs --task NAME: a task of lm_eval, or one of --task"),
        ("--task x --task-files nowhere", "--task-files is nowhere; expected a folder of task"),
        ("--task x --task-files {files}/empty", "empty has no tasks; expected .yaml files with"),
        # lm_eval would load a file by its path, with all that it names.
        ("--task {files}/choices.yaml --task-files {files}", "choices.yaml'; expected a task, a"),
        ("--task texts --task-files {files}", r"needs lm_eval: pip install 'rgexport\[tasks\]'"),
    ],
)
def test_wrong_requests(words, line, model, files, capsys, tmp_path, monkeypatch):
    if "texts" in words:
        monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    (files / "empty").mkdir()
    asked = ["--suite", "tasks", *words.format(files=files).split()]
    assert run(["evaluate", str(model), *asked, "-o", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and re.search(line, error[0])


def test_local_tasks_need_no_network(files, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert len(load_tasks(("texts",), files, None, 0).requests["texts"]) == 3
