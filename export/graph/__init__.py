"""Making the graph: torch.export, function bodies, passes over the ONNX model, and the file it becomes."""
