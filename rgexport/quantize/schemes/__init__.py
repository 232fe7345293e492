"""The storage schemes: the arrays that hold the rows of a tensor, and their layouts."""
