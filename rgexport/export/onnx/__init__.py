"""Exports to ONNX: lowers the step program, and writes the artifact's folder."""
