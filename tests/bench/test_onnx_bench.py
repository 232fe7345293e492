"""Results of a part are joined with those of an earlier run, where both mean the same."""

from bench.onnx import joined


def part(test: str, cpu: str = "a", **models: int) -> dict:
    named = {name.replace("_", "-"): value for name, value in models.items()}
    return {"environment": {"cpu": cpu}, "found": {"test": test, "models": named}}


def test_other_models_are_kept():
    found = joined(part("tg32", int8=1, int4_32=2), part("tg32", int8=3, int4_128=4))
    assert found["found"]["models"] == {"int4-128": 4, "int4-32": 2, "int8": 3}


def test_not_those_of_another_machine_or_test():
    new = part("tg32", int8=3)
    for earlier in ({}, part("tg32", cpu="b", int4_32=2), part("tg16", int4_32=2)):
        assert joined(earlier, new) == new


def test_parts_without_models_are_replaced():
    old, new = ({"environment": {}, "found": {"shapes": [n]}} for n in (1, 2))
    assert joined(old, new) == new
