"""ONNX artifacts: the graph file, the ops that it may have, the files for other programs."""
