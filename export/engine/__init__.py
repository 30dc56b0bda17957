"""Making a bundle's graph an engine's, TensorRT's or ONNX Runtime's: what the library claims, what is fused, whose layers run."""
