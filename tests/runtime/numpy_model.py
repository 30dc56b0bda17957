"""A Sessa language model in plain numpy, float64, token by token: an oracle that shares no line with the product, and a Backend to test sessions with."""

from __future__ import annotations

import math

import numpy as np

from sessa_deploy.config import SessaConfig
from sessa_deploy.runtime.backend import Backend

erf = np.vectorize(math.erf, otypes=[np.float64])


def random_weights(config: SessaConfig, seed: int = 0, scale: float = 0.35) -> dict[str, np.ndarray]:
    """A state dict with weights large enough that every part of the model shows in the logits."""
    rng = np.random.default_rng(seed)
    D, kv = config.d_model, config.kv_heads * config.head_dim
    shapes = {"embedding.weight": (config.vocab_size, D), "norm.weight": (D,), "norm.bias": (D,), "lm_head.weight": (config.vocab_size, D)}
    for i in range(config.n_layers):
        layer = {"ln.weight": (D,), "ln.bias": (D,), "W_in.weight": (2 * D, D), "W_in.bias": (2 * D,), "W_out.weight": (D, D), "W_out.bias": (D,),
                 "mixer.q_proj.weight": (D, D), "mixer.q_proj.bias": (D,), "mixer.k_proj.weight": (kv, D), "mixer.k_proj.bias": (kv,),
                 "mixer.v_proj.weight": (kv, D), "mixer.v_proj.bias": (kv,), "mixer.proj_fb.weight": (2 * D, D), "mixer.proj_fb.bias": (2 * D,),
                 "mixer.gamma_bias": (), "mixer.gamma_ctx.weight": (1, D)}
        if config.n_heads > 1:
            layer["mixer.out_proj.weight"] = (D, D)
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    weights = {name: rng.normal(size=shape) * scale for name, shape in shapes.items()}
    weights = {name: w + 1.0 if name.endswith(("norm.weight", "ln.weight")) else w for name, w in weights.items()}
    return {name: np.asarray(w, np.float32).astype(np.float64) for name, w in weights.items()}


def softmax(x):
    w = np.exp(x - x.max())
    return w / w.sum()


def norm(x, weight, bias, eps):
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + eps) * weight + bias


def rotate(x, position):
    """x (H,d) at one position."""
    half = x.shape[-1] // 2
    angle = position * 10000.0 ** (-2.0 * np.arange(half) / x.shape[-1])
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


class NumpyModel:
    """One sequence at a time. A cache is a list (a layer) of dicts with lists of rows: k_f, v_f, k_b, s."""

    def __init__(self, config: SessaConfig, weights: dict[str, np.ndarray]) -> None:
        self.config, self.w = config, weights

    def empty(self):
        return [{"k_f": [], "v_f": [], "k_b": [], "s": []} for _ in range(self.config.n_layers)]

    def token(self, token: int, cache) -> np.ndarray:
        """Logits (V,) after `token`, which is appended to the cache."""
        c, w = self.config, self.w
        x = w["embedding.weight"][token]
        for i, rows in enumerate(cache):
            def p(name, i=i):
                return w[f"layers.{i}.{name}"]

            a, g = np.split(p("W_in.weight") @ norm(x, p("ln.weight"), p("ln.bias"), c.layer_norm_eps) + p("W_in.bias"), 2)
            a = 0.5 * a * (1 + erf(a / math.sqrt(2)))
            position = len(rows["s"])
            q = (p("mixer.q_proj.weight") @ a + p("mixer.q_proj.bias")).reshape(c.n_heads, c.head_dim)
            k = (p("mixer.k_proj.weight") @ a + p("mixer.k_proj.bias")).reshape(c.kv_heads, c.head_dim)
            v = (p("mixer.v_proj.weight") @ a + p("mixer.v_proj.bias")).reshape(c.kv_heads, c.head_dim)
            if c.use_forward_rope:
                q, k = rotate(q, position), rotate(k, position)
            rows["k_f"].append(k)
            rows["v_f"].append(v)
            keys, values, group = np.array(rows["k_f"]), np.array(rows["v_f"]), c.n_heads // c.kv_heads
            f = np.concatenate([softmax(keys[:, h // group] @ q[h] / math.sqrt(c.head_dim)) @ values[:, h // group] for h in range(c.n_heads)])
            if c.n_heads > 1:
                f = p("mixer.out_proj.weight") @ f
            q_b, k_b = np.split(p("mixer.proj_fb.weight") @ a + p("mixer.proj_fb.bias"), 2)
            gamma = c.gamma_max * np.tanh(p("mixer.gamma_bias") + p("mixer.gamma_ctx.weight")[0] @ a)
            s = f
            if position:
                s = f + gamma * (softmax(np.array(rows["k_b"]) @ q_b / math.sqrt(c.d_model)) @ np.array(rows["s"]))
            rows["k_b"].append(k_b)
            rows["s"].append(s)
            x = x + p("W_out.weight") @ (s * g) + p("W_out.bias")
        return w["lm_head.weight"] @ norm(x, w["norm.weight"], w["norm.bias"], c.layer_norm_eps)

    def logits(self, tokens) -> np.ndarray:
        """(T,V) of one sequence."""
        cache = self.empty()
        return np.array([self.token(t, cache) for t in tokens])

    def greedy(self, prompt, count: int) -> list[int]:
        """`count` tokens behind the prompt, each the most likely one."""
        cache, out = self.empty(), []
        for t in prompt:
            logits = self.token(t, cache)
        for _ in range(count):
            out.append(int(np.argmax(logits)))
            logits = self.token(out[-1], cache)
        return out


class NumpyBackend(Backend):
    """The oracle behind the Backend protocol. `calls` records (T, new_length) of each step."""

    name = "numpy"

    def __init__(self, model: NumpyModel, batch: int = 1, capacity: int | None = None) -> None:
        super().__init__(model.config, batch, capacity)
        self.model, self.calls = model, []
        self._caches = [model.empty() for _ in range(batch)]

    def _forward(self, ids, new):
        self.calls.append((ids.shape[1], new.tolist()))
        logits = np.full((self.batch, self.config.vocab_size), np.nan, np.float32)
        for b in range(self.batch):
            for rows in self._caches[b]:
                for values in rows.values():
                    del values[int(self.kept()[b]) :]
            for token in ids[b, : new[b]]:
                logits[b] = self.model.token(int(token), self._caches[b])
        return logits

    def _copy_row(self, source, target, length):
        self._caches[target] = [{name: list(values[:length]) for name, values in rows.items()} for rows in self._caches[source]]

    def cached(self, row):
        return {f"past.{i}.{name}": np.array(values[: self.length[row]]) for i, rows in enumerate(self._caches[row]) for name, values in rows.items()}

    def poison(self):
        return
