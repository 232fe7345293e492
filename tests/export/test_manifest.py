"""What is refused when a manifest is read."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rgexport.errors import RequestError
from rgexport.export.checked import NOT_ASKED_FOR, CheckRecord
from rgexport.export.manifest import MANIFEST, write_manifest
from rgexport.export.manifest_reader import read_manifest

Fields = dict[str, Any]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
LINEAR = "layers.0.temporal_block.linear_x.weight"


def test_round_trip(made):
    assert read_manifest(made.folder) == made.manifest


def test_self_check_comes_back(made):
    found = CheckRecord(status="unverified", reason="so", tokens=32, kl=0.5, engine="toy 1")
    write_manifest(made.folder, made.manifest.with_check(found))
    assert read_manifest(made.folder).check == found


def test_fields_may_be_missing_or_unknown(made):
    rewrite(made, lambda fields: (fields.pop("check"), fields.pop("profile"), fields.update(x=1)))
    assert read_manifest(made.folder) == made.manifest
    assert made.manifest.check == NOT_ASKED_FOR and made.manifest.profile == "cpu"


def rewrite(made, change: Callable[[Fields], Any]) -> None:
    path = made.folder / MANIFEST
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def part(fields: Fields) -> Fields:
    return fields["tensors"][LINEAR]["parts"]["scales"]


def rename_file(new: str) -> Callable[[Fields], Any]:
    return lambda fields: fields["files"].update({new: fields["files"]["model.onnx"]})


def store_as_ggml(fields: Fields) -> None:
    scheme = {"kind": "ggml", "type": "q4_0"}
    fields["plan"][LINEAR] = fields["tensors"][LINEAR]["scheme"] = scheme


BROKEN: dict[str, tuple[Callable[[Fields], Any], str]] = {
    "newer": (lambda f: f.update(format_version=2), "format version 2.*update rgexport"),
    "foreign": (lambda f: f.update(kind="car"), "is not the manifest"),
    "version": (lambda f: f.update(format_version="1"), "is not the manifest"),
    "no name": (lambda f: f.pop("name"), "name is missing"),
    "name": (lambda f: f.update(name=3), "name is 3; expected a text"),
    "exact": (lambda f: f.update(exact=1), "exact is 1; expected true or false"),
    "profile": (lambda f: f.update(profile="phone"), "profile is 'phone'; expected"),
    "precision": (lambda f: f.update(precision="int5"), "precision is 'int5'; expected fp32 or"),
    "config": (lambda f: f["config"].pop("width"), "config.width is missing"),
    "zero": (lambda f: f["config"].update(lru_heads=0), "config.lru_heads is 0"),
    "blocks": (lambda f: f["config"].update(block_types=["x"]), r"config.block_types\[0\] is 'x'"),
    "scheme": (lambda f: f["plan"][LINEAR].update(bits=5), "bits = 5; expected 2, 3, 4, 8"),
    "ggml": (store_as_ggml, "only GGUF files have ggml types"),
    "plan": (lambda f: f["plan"].pop(LINEAR), "not stored as the plan says"),
    "tensor": (lambda f: f["tensors"].pop(LINEAR), f"{LINEAR} has shape None"),
    "extra": (lambda f: f["tensors"].update(x=f["tensors"][LINEAR]), "tensors.x has shape"),
    "shape": (lambda f: f["tensors"][LINEAR].update(shape=[1]), "has shape .*expected"),
    "outside": (lambda f: part(f).update(offset=10**9), "lies outside of 'model.onnx.data'"),
    "before": (lambda f: part(f).update(offset=-1), "lies outside of 'model.onnx.data'"),
    "rows": (lambda f: part(f).update(shape=[3, 1]), r"parts are .*\(3, 1\).*expected"),
    "dtype": (lambda f: part(f).update(dtype="int7"), "parts are .*int7.*expected"),
    "no part": (lambda f: f["tensors"][LINEAR]["parts"].pop("scales"), "parts are .*expected"),
    "no file": (lambda f: part(f).update(file="x"), "lies outside of 'x'"),
    "escape": (rename_file("../secret"), "leads out of the artifact"),
    "absolute": (rename_file("/etc/passwd"), "leads out of the artifact"),
    "newline": (rename_file("a\nb"), "leads out of the artifact"),
    "windows": (rename_file("C:\\x"), "leads out of the artifact"),
    "check": (lambda f: f["check"].update(status="fine"), "check.status is 'fine'; expected"),
    "kl": (lambda f: f["check"].update(kl="0.1"), "check.kl is '0.1'; expected a number"),
    "hash": (lambda f: f["files"]["model.onnx"].update(sha256=""), "not a hash and size"),
    "list": (lambda f: f.update(states={}), "states is {}; expected a list"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_manifest(made, case):
    change, complaint = BROKEN[case]
    rewrite(made, change)
    with pytest.raises(RequestError, match=complaint) as caught:
        read_manifest(made.folder)
    assert MANIFEST in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"a": NaN}'])
def test_not_a_manifest(made, text):
    (made.folder / MANIFEST).write_text(text)
    with pytest.raises(RequestError, match=MANIFEST):
        read_manifest(made.folder)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_json_is_accepted_or_refused(made, data):
    fields = made.manifest.to_dict()
    place: Any = fields
    while isinstance(place, dict | list) and place:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
        if data.draw(st.booleans()) or not isinstance(place[key], dict | list):
            place[key] = data.draw(JSON)
            break
        place = place[key]
    (made.folder / MANIFEST).write_text(json.dumps(fields))
    try:
        read_manifest(made.folder)
    except RequestError as error:
        assert str(error).count("\n") == 0
