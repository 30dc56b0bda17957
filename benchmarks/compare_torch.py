"""The peers of compare.py that run in PyTorch: our model in eager mode, compiled, as a CUDA graph, and the official layers stacked in eager mode."""

from __future__ import annotations

import functools
from typing import Any

import torch
from compare_peer import Peer
from gpu import capture
from torch import Tensor, nn

from sessa_deploy.contract import CACHE_FIELDS, PRECISIONS
from sessa_deploy.model import SessaLayer, SessaLM
from sessa_deploy.runtime.backend import IntArray


class Torch(Peer):
    """Our model with its own caches, eager; `compiled` layer by layer, `graph` with the decode step captured, ids, append and argmax inside."""

    def __init__(self, job: dict[str, Any], compiled: bool = False, graph: bool = False) -> None:
        super().__init__(job)
        self.model, self.compiled, self.graph = model(job), compiled, graph
        self.caches: Any = None
        self.captured: torch.cuda.CUDAGraph | None = None
        if compiled:
            torch._dynamo.config.recompile_limit = 8 * self.config.n_layers  # type: ignore[attr-defined]
            # On a GPU the past is always the whole capacity; on a CPU it grows.
            step = torch.compile(SessaLayer.step, dynamic=False if self.device == "cuda" else None)
            for layer in self.model.layers:
                layer.step = functools.partial(step, layer)  # type: ignore[method-assign]

    def open(self, batch: int, capacity: int) -> None:
        self.caches = self.model.init_cache(batch, capacity, self.device)
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)

    def begin(self, contexts: tuple[int, ...]) -> None:
        fill([[getattr(cache, name) for name in CACHE_FIELDS] for cache in self.caches], max(contexts))
        self.contexts = torch.tensor(contexts, dtype=torch.int32, device=self.device)
        self.longest = max(contexts)
        self.rewind()
        if self.graph and self.captured is None:
            self._capture()

    def rewind(self) -> None:
        for cache in self.caches:
            cache.length.copy_(self.contexts)
            cache._at_most = self.longest

    @torch.inference_mode()
    def step(self, last: bool = False) -> list[int]:
        if self.captured is not None:
            self.captured.replay()
        else:
            self._decode()
        return self.ids[:, 0].tolist()

    @torch.inference_mode()
    def prompt(self, ids: IntArray) -> list[int]:
        for cache in self.caches:
            cache.reset()
        return self.model.prefill(torch.from_numpy(ids).to(self.device), self.caches).argmax(-1).tolist()

    def close(self) -> None:
        self.caches = self.captured = None
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def notes(self) -> dict[str, Any]:
        stats = torch._dynamo.utils.counters["stats"] if self.compiled else {}  # type: ignore[attr-defined]
        return {"torch": torch.__version__, **({"graphs_compiled": stats["unique_graphs"]} if stats else {})}

    def _decode(self) -> None:
        self.ids.copy_(self.model.decode_step(self.ids, self.caches).argmax(-1, keepdim=True))

    @torch.inference_mode()
    def _capture(self) -> None:
        self.captured = capture([self._decode], [self._decode, self.rewind] * 3)
        self.rewind()


class Official(Peer):
    """The official layers, stacked between our embedding, norm and lm_head. One length for all sequences: they have no ragged batch."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        try:
            from sessa import SessaLayer as Layer  # type: ignore[import-not-found]
        except ImportError:
            raise RuntimeError("the official package `sessa` is not importable: put its repository on PYTHONPATH") from None
        c, shell = self.config, model(job)
        dtype = getattr(torch, PRECISIONS[self.precision].torch)
        self.layers = []
        for ours in shell.layers:
            layer = Layer(c.d_model, c.n_heads, c.n_kv_heads, ln_eps=c.layer_norm_eps, use_forward_rope=c.use_forward_rope, gamma_max=c.gamma_max)
            layer.load_state_dict(ours.state_dict(), strict=False)
            self.layers.append(layer.to(self.device, dtype).eval())
        shell.layers = nn.ModuleList()
        self.shell, self.at = shell, 0
        self.caches: list[Any] = []

    def open(self, batch: int, capacity: int) -> None:
        self.caches = [layer.init_cache(batch, max_len=capacity) for layer in self.layers]
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)

    def begin(self, contexts: tuple[int, ...]) -> None:
        if len(set(contexts)) > 1:
            raise RuntimeError("the official layers keep one length for all sequences of a batch")
        fill([[cache[name] for name in CACHE_FIELDS] for cache in self.caches], contexts[0])
        self.at = contexts[0]
        self.rewind()

    def rewind(self) -> None:
        for cache in self.caches:
            cache["t"] = self.at

    @torch.inference_mode()
    def step(self, last: bool = False) -> list[int]:
        x = self.shell.embedding(self.ids)
        for i, layer in enumerate(self.layers):
            x, self.caches[i] = layer.decode_step(x, self.caches[i])
        self.ids = self._head(x)
        return self.ids[:, 0].tolist()

    @torch.inference_mode()
    def prompt(self, ids: IntArray) -> list[int]:
        x = self.shell.embedding(torch.from_numpy(ids).to(self.device))
        for i, layer in enumerate(self.layers):
            self.caches[i]["t"] = 0
            x, self.caches[i] = layer.prefill(x, self.caches[i])
        return self._head(x[:, -1:])[:, 0].tolist()

    def _head(self, x: Tensor) -> Tensor:
        return self.shell.lm_head(self.shell.norm(x)).float().argmax(-1)

    def close(self) -> None:
        self.caches = []
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def notes(self) -> dict[str, Any]:
        return {"torch": torch.__version__}


def model(job: dict[str, Any]) -> SessaLM:
    """Our model on the device: the checkpoint's weights, or random ones."""
    if job["checkpoint"]:
        from sessa_deploy.checkpoint import load_checkpoint

        found = load_checkpoint(job["checkpoint"])
    else:
        from sessa_deploy.config import SessaConfig

        torch.manual_seed(0)
        with torch.device(job["device"]):
            found = SessaLM(SessaConfig.from_dict(job["config"]))
    return found.to_precision(str(job["precision"])).to(job["device"]).eval().requires_grad_(False)


@torch.inference_mode()
def fill(caches: list[list[Tensor]], rows: int) -> None:
    """Random rows into the first `rows` of every cache: a step's time does not depend on what they hold."""
    for cache in caches:
        for x in cache:
            x[:, :rows].normal_()


def make(job: dict[str, Any]) -> Peer:
    """The peer that a job names."""
    torch.set_float32_matmul_precision("highest")
    kind = job["peer"]
    if kind == "official":
        return Official(job)
    if job["device"] == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no CUDA GPU")
    if "graph" in kind and job["device"] != "cuda":
        raise RuntimeError("a CUDA graph needs a GPU")
    return Torch(job, compiled="compile" in kind, graph="graph" in kind)
