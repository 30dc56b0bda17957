"""What sessions on a GPU share, whichever engine runs the graph: caches at fixed addresses, the kernels around a step, its order and its CUDA graphs."""
