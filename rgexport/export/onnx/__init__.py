"""ONNX: storage of the weights, lowering of the step program, the artifact's folder."""
