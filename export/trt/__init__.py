"""Making an engine of TensorRT: what its parsers take, what a build may cost, and what is checked."""
