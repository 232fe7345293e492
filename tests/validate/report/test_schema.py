import json
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
def written(clean, checkpoint, tmp_path_factory) -> list[Any]:
    """What is written of one result, of one without an original, of a broken one, and of two."""
    whole = validate_artifact(clean("int4"), Request(model=str(checkpoint), max_tokens=40))
    alone = validate_artifact(clean("fp32"), Request(max_tokens=12))
    found = []
    for results in ([whole], [alone], [with_nan(whole)], [whole, alone]):
        file = tmp_path_factory.mktemp("schema") / "r.json"
        write_json(results, file)
        found.append(json.loads(file.read_text("utf-8")))
    return found


def test_the_published_schema_is_that_of_the_code():
    assert PUBLISHED.read_text("utf-8") == as_text() + "\n"


def test_all_that_is_written_is_described(written):
    schema = json.loads(PUBLISHED.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    for value in written:
        jsonschema.Draft202012Validator(schema).validate(value)
    assert not jsonschema.Draft202012Validator(schema).is_valid(written[0] | {"verdict": "MAYBE"})
    definitions = result_schema()["$defs"]
    assert written[0].keys() == definitions["Result"]["properties"].keys()
    place = written[0]["original"]["worst"][0]
    assert place.keys() == definitions["WorstPosition"]["properties"].keys()
    assert all(definition["description"] for definition in definitions.values())
