"""ONNX Runtime on a CPU and on CUDA. Nothing is imported here; `backend.py` is the door."""
