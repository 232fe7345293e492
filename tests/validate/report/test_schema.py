import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from rgexport.validate.opening import Request
from rgexport.validate.report.schema import as_text, result_schema
from rgexport.validate.result import write_json
from rgexport.validate.run import validate_artifact
from tests.validate.test_result import with_nan

PUBLISHED = Path(__file__).parents[3] / "docs" / "validate.schema.json"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(PUBLISHED.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def written(clean: Callable[[str], Path], checkpoint: Path, tmp_path_factory: Any) -> list[Any]:
    """What is written of one result, of one without an original, of a broken one, and of two."""
    whole = validate_artifact(clean("int4"), Request(model=str(checkpoint), max_tokens=40))
    alone = validate_artifact(clean("fp32"), Request(max_tokens=12))
    found = []
    for results in ([whole], [alone], [with_nan(whole)], [whole, alone]):
        file = tmp_path_factory.mktemp("schema") / "r.json"
        write_json(results, file)
        found.append(json.loads(file.read_text("utf-8")))
    return found


def test_the_published_schema_is_that_of_the_code() -> None:
    assert PUBLISHED.read_text("utf-8") == as_text() + "\n"


def test_what_is_written_fits(
    validator: jsonschema.Draft202012Validator, written: list[Any]
) -> None:
    for value in written:
        validator.validate(value)


def test_all_that_is_written_is_described(written: list[Any]) -> None:
    definitions = result_schema()["$defs"]
    assert written[0].keys() == definitions["Result"]["properties"].keys()
    place = written[0]["original"]["worst"][0]
    assert place.keys() == definitions["WorstPosition"]["properties"].keys()
    assert all(definition["description"] for definition in definitions.values())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("verdict",), "MAYBE"),
        (("schema_version",), 2),
        (("twin", "kl", "mean"), "small"),
        (("twin", "blocks", 0, "start"), 0.5),
        (("original", "worst", 0, "reference", 0, "token"), None),
        (("weights",), {}),
        (("artifact", "files", "model.onnx"), 7),
    ],
)
def test_what_does_not_fit_is_seen(
    validator: jsonschema.Draft202012Validator,
    written: list[Any],
    path: tuple[Any, ...],
    value: Any,
) -> None:
    copy = json.loads(json.dumps(written[0]))
    *parents, last = path
    inner = copy
    for key in parents:
        inner = inner[key]
    inner[last] = value
    assert not validator.is_valid(copy)
    del inner[last]
    if last != "model.onnx":
        assert not validator.is_valid(copy), "every field is there"
