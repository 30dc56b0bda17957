"""How a run begins: with random weights, with those of a checkpoint, or where it was saved last."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from sessa_deploy import data_file
from sessa_deploy.checkpoint import load_checkpoint
from sessa_deploy.checkpoint_layout import locate
from sessa_deploy.checkpoint_tokenizer import read_tokenizer
from sessa_deploy.checks import integer
from sessa_deploy.config import Note, SessaConfig
from sessa_deploy.data import Corpus, load_corpus
from sessa_deploy.distributed.group import ALONE, Group
from sessa_deploy.distributed.states import STATE_FILE, read_plain_values
from sessa_deploy.errors import UserError, need
from sessa_deploy.files import check_folder, check_target
from sessa_deploy.model import SessaLM
from sessa_deploy.runtime.tokenizer import Tokenizer, byte_level_tokenizer
from sessa_deploy.train_options import TrainOptions
from sessa_deploy.train_run import RESUME_DIR, RESUME_FILE, RUN_FILES, Run

# What resume.pt must hold; a run that began with a checkpoint says so under "origin".
_STATE = ("options", "config", "step", "seconds", "tokenizer", "corpus", "model", "optimizer", "torch_rng")
SHAPE = ("d_model", "n_layers", "n_heads", "n_kv_heads", "gamma_max", "tie_word_embeddings")


def start(options: TrainOptions, note: Note | None = None, group: Group = ALONE, **shape: Any) -> Run:
    """A new run. shape: SessaConfig's fields but vocab_size, max_context and the special tokens, which the tokenizer and the context give.

    With options.init_from all of these are the checkpoint's, and so are weights and tokenizer; max_context grows to the context where that is longer, and
    a shape that is given must be the same. The optimizer is fresh. note: hears a line of each thing of the checkpoint that was passed over.
    group: the processes that share the run, each of which makes this call.
    Raises UserError if `out` already holds a run or cannot be written, or on anything the options, the text, the checkpoint or the shape get wrong;
    nothing is left behind then.
    """
    need("safetensors", "matplotlib", extra="train")  # what the end of the run writes with
    out = Path(options.out)
    _require_free(out)
    options.share(group.size)
    options.device_of(group.local, group.local_size)  # an absent device is refused before the text is read
    initial = None if options.init_from is None else _initial(options, shape, note)
    tokenizer = _tokenizer(options, initial)
    ends = () if initial is None else initial[0].config.eos_token_ids
    corpus = _corpus(options, tokenizer, next(iter(ends), None), out)
    _require_one_text(corpus, group)
    if initial is None:
        special = {"bos_token_id": corpus.separator, "eos_token_id": corpus.separator}
        config = _config({"vocab_size": tokenizer.vocab_size, "max_context": options.context, **special, **shape})
        run = Run(options, config, tokenizer, corpus, group=group)
    else:
        model = initial[0]
        config = dataclasses.replace(model.config, max_context=max(model.config.max_context, options.context))
        run = Run(options, config, tokenizer, corpus, {"checkpoint": str(options.init_from), "weights_sha256": _digest(model)}, group,
                  model.state_dict())
    group.on_chief(lambda: _make(out))
    return run


def prepare(options: TrainOptions, note: Note | None = None) -> Corpus:
    """Write options.data as the token file options.out, which a later run takes as its data; returns its corpus. tokenizer, init_from, extensions and
    held_out are looked at too; the file keeps what they say. Raises UserError as `start` does, and where the file cannot be written."""
    check_target(options.out, "--out", "the token file")
    initial = None if options.init_from is None else _initial(options, {}, note)
    ends = () if initial is None else initial[0].config.eos_token_ids
    return data_file.prepare(options.data, options.out, _tokenizer(options, initial), options.held_out, options.extensions, next(iter(ends), None))


def _corpus(options: TrainOptions, tokenizer: Tokenizer, separator: int | None, out: Path) -> Corpus:
    if not data_file.is_token_file(options.data):
        return load_corpus(options.data, tokenizer, options.held_out, options.extensions, separator, out)
    corpus, own = data_file.open_tokens(options.data)
    if _vocabulary(own) != _vocabulary(tokenizer):
        raise UserError("the token file was written with another tokenizer", got=options.data, allowed="the same vocabulary",
                        fix="write it again with --prepare and this tokenizer")
    if separator is not None and separator != corpus.separator:
        raise UserError("the token file has another token between documents", got=f"{corpus.separator} in {options.data}", allowed=separator,
                        fix="write it again with --prepare and this --init-from")
    return corpus


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("the run's folder cannot be made", got=f"{out} ({error.strerror})", fix="choose another --out") from None


def _require_one_text(corpus: Corpus, group: Group) -> None:
    if group.many:
        group.same(corpus.fingerprint(), "texts", "give all machines the same --data")


def resume(out: str | Path, group: Group = ALONE, **changes: Any) -> Run:
    """A run continued from its folder, by whichever number of processes saved it. changes: options that do not alter the loss curve's past (data's place,
    device, save_every, max_seconds, ...); batch_size must divide what a process has to do of a step, whose windows stay the same.

    Raises UserError if there is no run, if what was saved is damaged, if the folder cannot be written, if the text has changed, or if the windows of a step
    cannot be dealt out over the processes.
    """
    need("safetensors", "matplotlib", extra="train")
    place = _saved(Path(out))
    check_folder(out, "--out", "the run's folder")
    state = _read_resume_file(place) if place.name == RESUME_FILE else read_plain_values(place)
    path = place if place.name == RESUME_FILE else place / STATE_FILE
    wanted = _STATE if place.name == RESUME_FILE else _STATE[:-3]
    lacks = [name for name in wanted if name not in state] if isinstance(state, dict) else ["state"]
    known = {field.name for field in dataclasses.fields(TrainOptions)}
    if lacks or not isinstance(state["options"], dict):
        raise _unreadable(path, f"no {', '.join(lacks) or 'options'} in it")
    strange = sorted(map(str, set(state["options"]) - known))
    if strange:
        raise _unreadable(path, f"options that this version does not know: {', '.join(strange)}")
    batch_size = changes.pop("batch_size", None)
    try:
        saved = {**state["options"], "extensions": tuple(state["options"].get("extensions", ())), "out": str(out)}
        options = TrainOptions(**{**saved, **changes})
        config = SessaConfig.from_dict(state["config"], source=str(path))
        tokenizer = Tokenizer.from_json(state["tokenizer"], source=str(path))
        before = integer("processes", state.get("processes", 1), 1)
    except (TypeError, AttributeError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {str(error)[:120]}") from None
    options = options.reshared(group.size, before, batch_size)
    corpus = _corpus(options, tokenizer, next(iter(config.eos_token_ids), None), Path(out))
    _require_one_text(corpus, group)
    run = Run(options, config, tokenizer, corpus, state.get("origin"), group)
    try:
        run.restore(state)
    except (RuntimeError, TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise _unreadable(path, f"a state that does not fit its model, {type(error).__name__}: {str(error)[:120]}") from None
    return run


def _saved(out: Path) -> Path:
    """Where a run's state is: resume.pt of one process, or resume/ of several; of both the later one, should a kill have left both."""
    file, folder = out / RESUME_FILE, out / RESUME_DIR
    found = [place for place, there in ((file, file), (folder, folder / STATE_FILE)) if there.is_file()]
    if not found:
        raise UserError("there is no run to resume", got=file, allowed="a folder that train wrote", fix="leave --resume out to start one")
    if len(found) == 1:
        return found[0]
    return max(found, key=lambda place: (place / STATE_FILE if place == folder else place).stat().st_mtime_ns)


def _read_resume_file(path: Path) -> Any:
    try:
        with warnings.catch_warnings():  # of a pickle that is refused anyhow
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file may raise anything, and nothing in it is executed
        raise _unreadable(path, f"{type(error).__name__}: {str(error)[:120]}") from None


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(f"{path} cannot be read", got=why, allowed="what train wrote", fix="start a new run in another --out")


def _require_free(out: Path) -> None:
    """UserError unless `out` can be written and holds nothing that the run would overwrite."""
    check_folder(out, "--out", "the run's folder")
    if (out / RESUME_FILE).exists() or (out / RESUME_DIR / STATE_FILE).exists():
        raise UserError("the run's folder already holds a run", got=out, fix="continue it with --resume, or name another --out")
    taken = [name for name in RUN_FILES if (out / name).exists() or (out / name).is_symlink()]
    if taken:
        raise UserError("the run's folder holds files that the run would overwrite", got=", ".join(str(out / name) for name in taken),
                        fix="remove them, or name another --out")


def _config(values: dict[str, Any]) -> SessaConfig:
    try:
        return SessaConfig(**values)
    except UserError as error:  # it may speak of config.json, and there is none
        named = [name for name in SHAPE if re.search(rf"\b{name}\b", f"{error.what} {error.got}")]
        fix = f"change {' or '.join('--' + name.replace('_', '-') for name in named)}" if named else None
        raise UserError(error.what, error.got, error.allowed, fix) from None


def _initial(options: TrainOptions, shape: dict[str, Any], note: Note | None) -> tuple[SessaLM, Tokenizer | None]:
    """The model of options.init_from, in float32 on the CPU, and the tokenizer that `export` would take with it."""
    path = str(options.init_from)
    model = load_checkpoint(path, None if options.init_config is None else SessaConfig.load(options.init_config, note), note=note)
    tokenizer = read_tokenizer(locate(path).folder, model.config)  # what its file asks for in vain is said of every run, also of one resumed
    for name, value in shape.items():
        have = getattr(model.config, name)
        if value is not None and value != have:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{name} is not that of the checkpoint to start from", got=f"{option} {value}, and {have} in {path}", allowed=have,
                            fix=f"leave {option} out, or leave --init-from out")
    return model, None if tokenizer is None else Tokenizer.from_json(tokenizer.decode("utf-8"), source=path)


def _tokenizer(options: TrainOptions, initial: tuple[SessaLM, Tokenizer | None] | None) -> Tokenizer:
    """The tokenizer of a run: the one that was given, that of the checkpoint to start from, or bytes."""
    given = None
    if options.tokenizer is not None:
        try:
            given = Tokenizer(options.tokenizer)
        except UserError as error:
            raise UserError(error.what, error.got, error.allowed, "give --tokenizer a file that tokenizers' Tokenizer.save wrote, or leave it out") from None
    if initial is None:
        own_data = given is None and data_file.is_token_file(options.data)
        return data_file.open_tokens(options.data)[1] if own_data else given or Tokenizer.from_json(byte_level_tokenizer())
    path, size, own = options.init_from, initial[0].config.vocab_size, initial[1]
    if given is None:
        if own is None:
            raise UserError("the checkpoint to start from has no tokenizer", got=f"{path} with a vocabulary of {size}",
                            fix="give its tokenizer with --tokenizer FILE")
        return own
    if own is not None and _vocabulary(own) != _vocabulary(given):
        raise UserError("the tokenizer is not that of the checkpoint to start from",
                        got=f"--tokenizer {options.tokenizer} with {given.vocab_size} tokens, and another vocabulary of {own.vocab_size} in {path}",
                        allowed="the same vocabulary", fix="leave --tokenizer out")
    if given.vocab_size > size:
        raise UserError("the tokenizer has more tokens than the checkpoint to start from", got=f"--tokenizer {options.tokenizer} with {given.vocab_size}",
                        allowed=f"at most its vocabulary of {size}", fix="give the checkpoint's own tokenizer with --tokenizer FILE")
    return given


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    from tokenizers import Tokenizer as Library

    found: dict[str, int] = Library.from_str(tokenizer.to_json()).get_vocab(with_added_tokens=True)
    return found


def _digest(model: SessaLM) -> str:
    """SHA-256 over the names and float32 values of a model's tensors."""
    digest = hashlib.sha256()
    for name, x in model.state_dict().items():
        digest.update(name.encode())
        digest.update(x.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
