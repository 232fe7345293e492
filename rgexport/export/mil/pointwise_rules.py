"""Types of the results of operations that treat each item by itself."""

from rgexport.export.mil.program import TensorType
from rgexport.export.mil.signatures import (
    ALL,
    BOOL,
    FLOATS,
    STRING,
    VALUES,
    WORD,
    Arguments,
    Misfit,
    Signature,
    Slot,
    broadcast,
)


def one(dtypes: frozenset[str]) -> Signature:
    """The signature of a function of one value."""
    return {"x": Slot(dtypes)}


def two(dtypes: frozenset[str]) -> Signature:
    """The signature of a function of two values of one dtype."""
    return {"x": Slot(dtypes, "T"), "y": Slot(dtypes, "T")}


ONE_WITH_EPSILON: Signature = one(FLOATS) | {
    "epsilon": Slot(FLOATS, optional=True, constant=True),
}
CLIP: Signature = {
    "x": Slot(FLOATS, "T"),
    "alpha": Slot(FLOATS, "T", constant=True),
    "beta": Slot(FLOATS, "T", constant=True),
}
GELU: Signature = one(FLOATS) | {"mode": WORD}
CAST: Signature = one(ALL) | {"dtype": Slot(STRING, constant=True)}
SELECT: Signature = {"cond": Slot(BOOL), "a": Slot(VALUES, "T"), "b": Slot(VALUES, "T")}
LEAKY: Signature = one(FLOATS) | {"alpha": Slot(FLOATS, constant=True)}

GELU_MODES = ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")
CAST_DTYPES = {"fp16": "float16", "fp32": "float32"} | {
    word: word for word in ("int8", "uint8", "int16", "uint16", "int32", "bool")
}
"""What `cast` calls a dtype → its name."""


def same(given: Arguments) -> list[TensorType]:
    """As its input x."""
    return [given.type("x")]


def stretched(given: Arguments) -> list[TensorType]:
    """X and y, stretched to one shape."""
    return [TensorType(given.type("x").dtype, broadcast(given.shape("x"), given.shape("y")))]


def compared(given: Arguments) -> list[TensorType]:
    """Truth values of the stretched shape."""
    return [TensorType("bool", broadcast(given.shape("x"), given.shape("y")))]


def selected(given: Arguments) -> list[TensorType]:
    """Items of a or b, all three stretched to one shape."""
    shape = broadcast(given.shape("cond"), given.shape("a"), given.shape("b"))
    return [TensorType(given.type("a").dtype, shape)]


def cast(given: Arguments) -> list[TensorType]:
    """X in another dtype."""
    word = given.word("dtype", "")
    if word not in CAST_DTYPES:
        raise Misfit(f"its input dtype is {word!r}; expected one of {', '.join(CAST_DTYPES)}")
    return [TensorType(CAST_DTYPES[word], given.shape("x"))]


def gelu(given: Arguments) -> list[TensorType]:
    """As its input x."""
    mode = given.word("mode", GELU_MODES[0])
    if mode not in GELU_MODES:
        raise Misfit(f"its input mode is {mode!r}; expected one of {', '.join(GELU_MODES)}")
    return same(given)


def clip(given: Arguments) -> list[TensorType]:
    """As its input x."""
    if given.known("alpha") and given.known("beta"):
        low, high = float(given.array("alpha")), float(given.array("beta"))
        if not low < high:
            raise Misfit(f"it clips to [{low}, {high}]; expected a lower bound below the upper one")
    return same(given)
