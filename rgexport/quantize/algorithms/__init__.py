"""The algorithms that choose scales and levels, and the statistics that weigh their errors."""
