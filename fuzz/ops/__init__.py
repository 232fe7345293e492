"""A coverage-guided fuzzer over the native ops: `python -m fuzz.ops`.

`cases.h` makes a run of an op out of bytes, `oracle_*.cpp` say whether it is sound and what it has
to give, `fuzz_ops.cpp` holds the kernels against them; `target.cmake` builds it, with Clang.
"""
