"""TensorRT: engines, their buffers, and the kernels around a decode step. Nothing is imported here; `backend.py` is the door."""
