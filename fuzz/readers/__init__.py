"""A coverage-guided fuzzer over every reader of files: `python -m fuzz.readers`.

`targets` is the table of what is read and by what it is judged; `worker` runs one target in a
process of its own; `__main__` runs them all and prints what came of it.
"""
