"""One graph for every engine: what of a bundle's graph the library computes, and what is left to the engine. onnx only; no engine is asked here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from onnx import ModelProto

from sessa_deploy import contract
from sessa_deploy.errors import UserError
from sessa_deploy.export.engine import fuse, graph, layers
from sessa_deploy.export.engine.graph import PreparedGraph
from sessa_deploy.process import command
from sessa_deploy.runtime.bundle import Bundle

PLUGIN = "plugin"  # of --layers: the library computes what stands around the attentions
FLOAT32 = "the graph is float32, and the library's kernels around the attentions store 16 bits"


@dataclass(frozen=True)
class Target:
    """An engine to prepare a graph for.

    name: as a user reads it, with its version; short: without; own: the word of --layers for the engine's own kernels; why: its layers are better computed
    by the library; options: of `build`, that choose the engine; complaints: what its parser cannot take of a graph; one_message: weights that are laid out
    anew travel inside the graph's message, else they may be of any size; one_projection: it gains by one product with an unequal Split behind it in place of
    a layer's projections; rotary: beside its own layers too the library computes the rotary tables, which it would compute on the host.
    """

    name: str
    short: str
    own: str
    why: str
    options: tuple[str, ...] = ()
    complaints: Callable[[ModelProto], list[str]] = lambda model: []
    one_message: bool = True
    one_projection: bool = True
    rotary: bool = False


def prepare(bundle: Bundle, target: Target, asked: str | None) -> tuple[PreparedGraph, str, list[str]]:
    """The graph for an engine; who computes its layers, "plugin" or `target.own`; and which roads were taken that nobody asked for, one line each.

    asked: of --layers; None: the library, where it has kernels for them. Raises UserError on a graph that cannot be read, by us or by the engine, and where
    what was asked for cannot be had.
    """
    prepared = graph.prepare(graph.load(bundle.model))
    if bundle.weights is None:
        _readable(bundle, target, prepared)
    taken, why = _layers(bundle, target, prepared, asked != target.own)
    if asked not in (None, taken):
        raise unavailable(bundle, target, why)
    if bundle.weights is not None:
        if taken != PLUGIN:
            raise UserError(f"weights in 8 bits are read by the library's kernels alone, and it has none for these layers ({why})", got=str(bundle.path),
                            allowed=f"--backend ort; for {target.short} a bundle exported without --weights", fix=bundle.export_hint())
        _readable(bundle, target, prepared)  # the library's nodes read them, and no DequantizeLinear is left
    notes = [f"{op}: standard operators in place of the plugin ({prepared.reasons.get(op, 'the library does not bring it')})" for op in prepared.inlined]
    who = "the plugin library" if taken == PLUGIN else target.short
    return prepared, taken, [*notes, *_wide_projections(bundle), *([f"layers: by {who} ({why})"] if asked is None else [])]


def check_weights(bundle: Bundle, who: str, layers: str | None, archs: Collection[int] = ()) -> None:
    """Raise UserError where a bundle's matrices are in 8 bits and `who` cannot run them, see Bundle.require_engine_weights; also where --layers asks for an
    engine's own, which would make them wide."""
    bundle.require_engine_weights(who, archs)
    if bundle.weights is not None and layers not in (None, PLUGIN):
        raise UserError("weights in 8 bits are read by the library's kernels alone", got=f"--layers {layers} for {bundle.path} with {bundle.weights.format}",
                        allowed=PLUGIN, fix=f"leave --layers out, or {bundle.export_hint()}")


def _readable(bundle: Bundle, target: Target, prepared: PreparedGraph) -> None:
    wrong = target.complaints(prepared.model)
    if wrong:
        raise UserError(f"{target.name} cannot read this graph", got=" / ".join(wrong), fix=bundle.export_hint(" --opset 17"))


def _wide_projections(bundle: Bundle) -> list[str]:
    """Which layers' projections, one product in an engine, stay wide because some of them were kept so."""
    if bundle.weights is None:
        return []
    kept = {i: [p for p in layers.PROJECTIONS if f"layers.{i}.mixer.{p}.weight" in bundle.weights.kept] for i in range(bundle.config.n_layers)}
    mixed = [i for i, names in kept.items() if 0 < len(names) < len(layers.PROJECTIONS)]
    if not mixed:
        return []
    names = dict.fromkeys(p for i in mixed for p in kept[i])
    return [f"projections of layer{'s' if len(mixed) > 1 else ''} {', '.join(map(str, mixed))}: in {bundle.precision}, as one product computes them all "
            f"and --keep holds {', '.join(names)}"]


def check_layers(words: Collection[str], asked: str | None) -> None:
    """Raise UserError on a word of --layers that is none of these."""
    if asked is not None and asked not in words:
        raise UserError("--layers is none of ours", got=repr(asked), allowed=", ".join(words))


def check_precision(bundle: Bundle, asked: str | None) -> None:
    """Raise UserError on a precision that is not the graph's own."""
    if asked is not None and asked != bundle.precision:
        raise UserError("the exported graph decides the precision", got=f"--precision {asked}", allowed=bundle.precision,
                        fix=f"{bundle.export_hint(' --precision')} {asked}")


def unavailable(bundle: Bundle, target: Target, why: str) -> UserError:
    """The error that the library cannot compute the layers as --layers asks."""
    return UserError(f"--layers {PLUGIN} cannot be had", got=why, allowed=f"{target.own} for this graph",
                     fix=command("build", bundle.path, *target.options, "--layers", target.own))


def all_logits(model: ModelProto) -> bool:
    """Whether a graph gives the logits of every token."""
    return any(x.name == contract.LOGITS and len(x.type.tensor_type.shape.dim) == contract.ALL_LOGITS_RANK for x in model.graph.output)


def plugin_nodes(model: ModelProto) -> dict[str, int]:
    """op -> how many nodes of it the library computes."""
    return dict(sorted(Counter(n.op_type for n in model.graph.node if n.domain == contract.DOMAIN).items()))


def _layers(bundle: Bundle, target: Target, prepared: PreparedGraph, wanted: bool) -> tuple[str, str]:
    """Who computes the layers, and why: the engine where the library has no kernels for them. wanted: the library, if it can."""
    found, folder = prepared.model.graph, bundle.model.parent
    fuse.unmasked_rows(found)
    storage = contract.PRECISIONS[bundle.precision].onnx
    why = "as --layers asks"
    if wanted or target.rotary:
        prepared.types |= layers.rotary(found, storage) or {}
    if wanted:
        try:
            if bundle.precision == "fp32":
                raise layers.Unavailable(FLOAT32)
            prepared.types |= layers.rewrite(found, bundle.config, storage, folder, target.one_message)
        except layers.Unavailable as reason:
            why = str(reason)
        else:
            return PLUGIN, target.why
    if target.one_projection:
        same = fuse.one_projection(found, folder)
        prepared.types |= {new: prepared.types[old] for new, old in same.items()}
    return target.own, why
