"""What each MIL operation takes and does, after Apple's documentation of the iOS 18 op set.

Written from the docstrings of `coremltools.converters.mil.mil.ops.defs`, for tests: a second
opinion that shares nothing with what emits or runs programs elsewhere.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOATS = ("fp16", "fp32")
NUMBERS = (*FLOATS, "int32")
ARRAYS = (*NUMBERS, "int8", "uint8", "int16", "uint16", "bool")
SIZES = ("int8", "int16", "int32")
SETTINGS = {*SIZES, "bool", "str"}
PACKED = ("int4", "uint4", "int8", "uint8")
TABLE_INDICES = ("uint1", "uint2", "uint3", "uint4", "uint6", "uint8")
CAST_TO = ("int8", "uint8", "int16", "uint16", "int32", "fp16", "fp32", "bool")


class RefusedError(Exception):
    """A program that Apple's documentation does not allow."""


def demand(true: bool, complaint: str) -> None:
    """Refuses what is not `true`."""
    if not true:
        raise RefusedError(complaint)


@dataclass(frozen=True)
class Operand:
    """An argument as the program declares it; `constant` is its value where that is known."""

    dtype: str
    shape: tuple[int, ...]
    is_const: bool
    constant: Any = None


@dataclass(frozen=True)
class Parameter:
    """One line of an op's "Parameters": `dtypes` is one type or a letter of its "Attributes"."""

    name: str
    const: bool
    many: bool
    dtypes: str
    lowest: int
    highest: int
    optional: bool


@dataclass(frozen=True)
class Rule:
    """An op: its parameters, what the letters stand for, the type it returns, what it does."""

    parameters: tuple[Parameter, ...]
    domains: dict[str, tuple[str, ...]]
    returns: str
    run: Callable[..., Tensor]

    def output_dtype(self, operands: dict[str, list[Operand]]) -> str:
        """The type of the output; refuses arguments that the documentation does not allow."""
        known = {parameter.name for parameter in self.parameters}
        demand(operands.keys() <= known, f"no parameters {sorted(operands.keys() - known)}")
        letters: dict[str, str] = {}
        for parameter in self.parameters:
            given = operands.get(parameter.name, [])
            demand(bool(given) or parameter.optional, f"{parameter.name} is required")
            demand(parameter.many or len(given) <= 1, f"{parameter.name} takes one value")
            for operand in given:
                self._check(parameter, operand, letters)
        if self.returns.startswith("$"):
            return str(operands[self.returns[1:]][0].constant)
        return letters.get(self.returns, self.returns)

    def is_setting(self, name: str) -> bool:
        """Whether it is a constant such as an axis, which `run` takes as a Python value."""
        parameter = next(each for each in self.parameters if each.name == name)
        return parameter.const and set(self._allowed(parameter)) <= SETTINGS

    def _allowed(self, parameter: Parameter) -> tuple[str, ...]:
        return self.domains.get(parameter.dtypes, (parameter.dtypes,))

    def _check(self, parameter: Parameter, operand: Operand, letters: dict[str, str]) -> None:
        name, dtype, rank = parameter.name, operand.dtype, len(operand.shape)
        allowed = self._allowed(parameter)
        demand(dtype in allowed, f"{name} is {dtype}, not one of {allowed}")
        demand(letters.setdefault(parameter.dtypes, dtype) == dtype, f"{name}: another type")
        demand(operand.is_const or not parameter.const, f"{name} is not a constant")
        within = parameter.lowest <= rank <= parameter.highest
        demand(within, f"{name}: rank {rank}, not {parameter.lowest} to {parameter.highest}")


RULES: dict[str, Rule] = {}
_PARAMETER = re.compile(r"(\w+):(!?)(\*?)(\w+)(?:@(\d)(?:-(\d))?)?(\??)")


def rule(signature: str, **domains: tuple[str, ...]) -> Callable[[Callable[..., Tensor]], Any]:
    """Enters a function in `RULES` by its name.

    A signature such as `x:T@1-3 weight:!U@2 bias:!U@1? -> T` names the parameters: `!` a constant,
    `*` any number of values, `@` the ranks allowed, `?` optional. `-> $dtype`: as that says.
    """
    taken, returns = signature.split(" -> ")

    def enter(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        RULES[run.__name__.rstrip("_")] = Rule(
            tuple(_parameter(text) for text in taken.split()), domains, returns, run
        )
        return run

    return enter


def _parameter(text: str) -> Parameter:
    match = _PARAMETER.fullmatch(text)
    assert match, text
    name, const, many, dtypes, lowest, highest, optional = match.groups()
    first = int(lowest or 0)
    last = int(highest or lowest or 5)
    return Parameter(name, bool(const), bool(many), dtypes, first, last, bool(optional))


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "floor_div": torch.floor_divide,
    "mod": torch.remainder,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}
_COMPARISONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "equal": torch.eq,
    "not_equal": torch.ne,
    "less": torch.lt,
    "less_equal": torch.le,
    "greater": torch.gt,
    "greater_equal": torch.ge,
}
_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "cos": torch.cos,
    "sin": torch.sin,
}


def _enter(name: str, signature: str, dtypes: tuple[str, ...], run: Callable[..., Tensor]) -> None:
    def call(**arguments: Tensor) -> Tensor:
        # a protobuf map has no order of its own
        return run(*(arguments[key] for key in sorted(arguments)))

    call.__name__ = name
    rule(signature, T=dtypes)(call)


for _name, _run in _BINARY.items():
    _enter(_name, "x:T y:T -> T", NUMBERS, _run)
for _name, _run in _COMPARISONS.items():
    _enter(_name, "x:T y:T -> bool", NUMBERS, _run)
for _name, _unary in _UNARY.items():
    _enter(_name, "x:T -> T", FLOATS, _unary)
_enter("logical_and", "x:T y:T -> bool", ("bool",), torch.logical_and)
_enter("identity", "x:T -> T", ARRAYS, torch.clone)


@rule("x:T epsilon:!U@0? -> T", T=FLOATS, U=FLOATS)
def rsqrt(x: Tensor, epsilon: Tensor | float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


@rule("x:T mode:!str@0? -> T", T=FLOATS)
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    demand(mode in ("EXACT", "TANH_APPROXIMATION"), f"mode {mode}")
    return torch.nn.functional.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


@rule("x:T dtype:!str@0 -> $dtype", T=ARRAYS)
def cast(x: Tensor, dtype: str) -> Tensor:
    demand(dtype in CAST_TO, f"no cast to {dtype}")
    if dtype in FLOATS:
        return x
    return x.to(torch.bool if dtype == "bool" else getattr(torch, dtype))


@rule("x:T@1-3 weight:!U@2 bias:!U@1? -> T", T=NUMBERS, U=NUMBERS)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


@rule("x:T@1-5 y:T@1-5 transpose_x:!bool@0? transpose_y:!bool@0? -> T", T=NUMBERS)
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    demand(not transpose_x or x.ndim > 1, "transpose_x of a vector")
    left = x.transpose(-1, -2) if transpose_x else x
    right = y.transpose(-1, -2) if transpose_y and y.ndim > 1 else y
    return left @ right


@rule("x:T axis:!int32@0? -> T", T=FLOATS)
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


@rule("x:T axes:!int32@1? keep_dims:!bool@0? -> T", T=NUMBERS)
def reduce_sum(x: Tensor, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Tensor:
    return torch.sum(x, axes or list(range(x.ndim)), keepdim=keep_dims, dtype=x.dtype)


@rule("x:T axes:!int32@1? keep_dims:!bool@0? -> T", T=FLOATS)
def reduce_mean(x: Tensor, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Tensor:
    return torch.mean(x, axes or list(range(x.ndim)), keepdim=keep_dims)


@rule("cond:bool a:T b:T -> T", T=(*NUMBERS, "bool"))
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # The documentation broadcasts all three, coremltools' type inference a and b alone.
    among = torch.broadcast_shapes(a.shape, b.shape)
    demand(torch.broadcast_shapes(cond.shape, among) == among, "cond is wider than a and b")
    return torch.where(cond, a, b)


@rule("x:T indices:I axis:!int32@0? batch_dims:!int32@0? validate_indices:!bool@0? -> T",
      T=(*NUMBERS, "int8", "uint8", "int16", "uint16"),
      I=("int32", "int16", "uint16", "int8", "uint8"))  # fmt: skip
def gather(
    x: Tensor,
    indices: Tensor,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool = False,
) -> Tensor:
    demand(batch_dims == 0, "batch_dims is beyond this interpreter")
    axis %= x.ndim
    size = x.shape[axis]
    demand(0 <= int(indices.min()) and int(indices.max()) < size, f"indices outside of 0 to {size}")
    taken = x.index_select(axis, indices.flatten().long())
    return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@rule("values:*T axis:!int32@0 interleave:!bool@0? -> T", T=ARRAYS)
def concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    demand(not interleave, "interleave is beyond this interpreter")
    demand(all(value.ndim == values[0].ndim > 0 for value in values), "ranks differ or are 0")
    return torch.cat(values, axis)


@rule("x:T shape:U@1 -> T", T=ARRAYS, U=SIZES)
def reshape(x: Tensor, shape: Tensor) -> Tensor:
    asked = shape.tolist()
    demand(all(size >= -1 for size in asked) and asked.count(-1) <= 1, f"shape {asked}")
    missing = len(asked) - x.ndim  # a 0 stands for x's dimension, counted from the right
    sizes = [
        (x.shape[at - missing] if at >= missing else 1) if size == 0 else size
        for at, size in enumerate(asked)
    ]
    return x.reshape(sizes)


@rule("x:T perm:!int32@1 -> T", T=ARRAYS)
def transpose(x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


@rule("x:T axes:!int32@1? -> T", T=ARRAYS)
def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@rule("x:T axes:!int32@1 -> T", T=ARRAYS)
def expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    rank = x.ndim + len(axes)
    demand(all(-rank <= axis < rank for axis in axes), f"axes {axes} of {rank}")
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


_SLICE = (
    "begin:U@1 end:U@1 stride:!U@1? begin_mask:!bool@1? end_mask:!bool@1? squeeze_mask:!bool@1?"
)


@rule(f"x:T@1-5 {_SLICE} -> T", T=ARRAYS, U=SIZES)
def slice_by_index(x: Tensor, begin: Tensor, end: Tensor, **options: list[Any]) -> Tensor:
    taken, squeezed = _positions(x, begin, end, **options)
    for axis, positions in enumerate(taken):
        x = x.index_select(axis, torch.tensor(positions, dtype=torch.long))
    return x.squeeze(tuple(squeezed))


@rule(f"x:T@1-5 update:T@1-5 {_SLICE} -> T", T=ARRAYS, U=SIZES)
def slice_update(
    x: Tensor, update: Tensor, begin: Tensor, end: Tensor, **options: list[Any]
) -> Tensor:
    taken, squeezed = _positions(x, begin, end, **options)
    shape = [len(positions) for axis, positions in enumerate(taken) if axis not in squeezed]
    demand(list(update.shape) == shape, f"update is {list(update.shape)}, the slice {shape}")
    grid = torch.meshgrid(*(torch.tensor(positions) for positions in taken), indexing="ij")
    changed = x.clone()
    changed[grid] = update.reshape(grid[0].shape)
    return changed


def _positions(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> tuple[list[range], list[int]]:
    """The positions taken along each axis, as numpy's slices do; and the axes to squeeze."""
    rank = x.ndim
    none = [False] * rank
    options = (stride or [1] * rank, begin_mask or none, end_mask or none, squeeze_mask or none)
    columns = (begin.tolist(), end.tolist(), *options)
    demand(all(len(column) == rank for column in columns), f"x is of rank {rank}")
    taken = []
    for size, first, last, step, from_start, to_end, pure in zip(x.shape, *columns, strict=True):
        demand(step != 0, "stride 0")
        if pure:
            demand(-size <= first < size, f"index {first} into {size}")
            taken.append(range(first % size, first % size + 1))
            continue
        ends = slice(None if from_start else first, None if to_end else last, step)
        taken.append(range(*ends.indices(size)))
    return taken, [axis for axis, pure in enumerate(options[3]) if pure]


@rule("data:!S@1-5 scale:!T@1-5 offset:!O@1-5? -> T", S=(*PACKED, *FLOATS), T=FLOATS,
      O=(*PACKED, *FLOATS))  # fmt: skip
def constexpr_blockwise_shift_scale(
    data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> Tensor:
    demand(offset is None or offset.shape == scale.shape, "offset and scale differ in shape")
    shifted = data.to(scale.dtype)
    if offset is not None:
        shifted = shifted - _spread(offset.to(scale.dtype), data.shape)
    return _spread(scale, data.shape) * shifted


def _spread(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeats each block's value over the block."""
    demand(blocks.ndim == len(shape), f"rank {blocks.ndim} against {len(shape)}")
    for axis, (count, size) in enumerate(zip(blocks.shape, shape, strict=True)):
        demand(size % count == 0, f"{count} blocks do not divide {size}")
        blocks = blocks.repeat_interleave(size // count, axis)
    return blocks


@rule("indices:!I@1-5 lut:!T@3-5 vector_axis:!int32@0? -> T", I=TABLE_INDICES,
      T=("int8", "uint8", *FLOATS))  # fmt: skip
def constexpr_lut_to_dense(indices: Tensor, lut: Tensor, vector_axis: int | None = None) -> Tensor:
    demand(lut.ndim == indices.ndim + 2, f"lut is of rank {lut.ndim}, indices {indices.ndim}")
    demand(lut.shape[-1] == 1, "vectors are beyond this interpreter")
    demand(math.log2(lut.shape[-2]).is_integer(), f"{lut.shape[-2]} entries in a table")
    demand(int(indices.max()) < lut.shape[-2], "an index outside of the table")
    groups = lut.shape[:-2]
    which = torch.arange(math.prod(groups)).reshape(groups)
    return lut.reshape(-1, lut.shape[-2])[_spread(which, indices.shape), indices.long()]
