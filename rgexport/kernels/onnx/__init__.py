"""The native kernels of the ops of our domain, for ONNX Runtime."""
