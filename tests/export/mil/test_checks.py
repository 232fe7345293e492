"""What is said of states, on small programs by hand."""

from rgexport.export.mil.checks import check_states
from rgexport.export.mil.program import Function, Name, Operation, TensorType

STATE = TensorType("float16", (1, 1, 4, 32))


def operation(kind: str, name: str, result: TensorType | None = None, **inputs: str) -> Operation:
    given = {key: (Name(value),) for key, value in inputs.items()}
    return Operation(kind, name, given, ((name, result),) if result else ())


def complaints(*operations: Operation, tokens: int = 1) -> list[str]:
    row = TensorType("float16", (1, 1, 1, 32))
    inputs = {"position_ids": TensorType("int32", (1, tokens)), "row": row}
    states = {"a": STATE, "b": STATE}
    return list(check_states(Function("main", inputs, states, (), operations)))


def read(state: str) -> Operation:
    return operation("read_state", f"{state}_read", STATE, input=state)


def write(state: str, data: str) -> Operation:
    return operation("write_state", f"{state}_write", input=state, data=data)


def shifted(state: str) -> Operation:
    return operation("add", f"{state}_new", STATE, x=f"{state}_read", y="row")


A = read("a"), shifted("a"), write("a", "a_new")
B = read("b"), shifted("b"), write("b", "b_new")


def test_sound_states():
    assert complaints(*A, *B) == []
    again = operation("read_state", "a_after", STATE, input="a")
    assert complaints(*A, *B, again) == []


def test_state_that_is_written_twice():
    expected = "main: write_state a_write: it writes the state a a second time"
    assert complaints(*A, *B, write("a", "b_new")) == [expected]


def test_chunk_that_fills_a_state():
    program = *B, read("a"), operation("tile", "new", STATE, x="row"), write("a", "new")
    assert complaints(*program) and complaints(*program, tokens=4) == []
