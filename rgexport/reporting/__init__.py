"""Tables, charts and HTML pages that validate, evaluate, compress and the benchmarks share."""
