"""Tables, charts and HTML pages that validate, evaluation, planning and the benchmarks share."""
