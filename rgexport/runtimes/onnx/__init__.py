"""ONNX Runtime, with the kernels of this project or its own."""
