"""Making the graph TensorRT's: what is fused, what the plugin takes, what a build may cost, and what is checked."""
