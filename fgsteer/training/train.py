"""Train a sparse autoencoder for a model that has none.

sae = train_sae(model, tokenizer, texts, "blocks.12.hook_resid_post", "my-sae")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fgsteer.activations.tokens import bos_id
from fgsteer.data.chat import Text
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked
from fgsteer.models.gradients import gradients_on
from fgsteer.models.hookpoints import Hookpoint, resolve
from fgsteer.models.pairing import model_identity
from fgsteer.models.properties import input_device
from fgsteer.saes.loading import load_sae
from fgsteer.saes.registry import need_sae_lens
from fgsteer.storage.atomic import atomic_folder
from fgsteer.storage.json_files import read_json, write_json
from fgsteer.storage.locks import exclusive_lock
from fgsteer.storage.plans import check_same_plan
from fgsteer.storage.targets import make_folder, new_folder_target
from fgsteer.training.activation_store import (
    ActivationReader,
    ActivationSource,
    ActivationStream,
    block_length,
    store_activations,
)
from fgsteer.training.quality import SAEQuality, measure_sae
from fgsteer.training.settings import SAETraining
from fgsteer.training.trainer import TrainingRun, new_sae

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fgsteer.saes.sae import SAE

HELD_OUT = 100  # texts that are kept for the quality report by default
NOTES = "training.json"  # beside the weights: how they were made


@checked
@gradients_on()
def fit_sae(
    source: ActivationSource,
    hookpoint: Hookpoint | str,
    out: str | Path,
    *,
    settings: SAETraining | None = None,
    metadata: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    work: str | Path | None = None,
    fresh: bool = False,
    progress: Progress = None,
) -> SAE:
    """Train an SAE of sae-lens on activations, and save it in sae-lens's format.

    Args:
        source: An ``ActivationStore`` or an ``ActivationStream``.
        hookpoint: At which of its hookpoints.
        out: The folder of the trained SAE: ``cfg.json``, ``sae_weights.safetensors``, and ``training.json`` with
            settings, losses and all that the run depended on.
        settings: Kind, size and schedule; by default those of ``SAETraining()``.
        metadata: What ``cfg.json`` is to note of the model, such as ``model_name``.
        device: Where it is trained.
        work: The folder of the checkpoint, from which a killed run goes on; by default ``out`` with ``.work`` added.
        fresh: Whether to start over.
        progress: As in ``collect``; a function is called with the number of steps done.

    Returns:
        The trained SAE, loaded from ``out``.

    Raises:
        DataError: There are fewer tokens than a batch, or a stream ends before the training does.
        PairingError: ``work`` holds the checkpoint of another run.
        FormatError: A file cannot be written, or a checkpoint is damaged.
    """
    need_sae_lens("Training a sparse autoencoder")
    at, out = Hookpoint.parse(hookpoint), Path(out)
    width = source.width(at)
    chosen = (settings or SAETraining()).filled(width)
    plan = {"activations": source.plan, "hookpoint": str(at), "training": chosen.as_dict()}
    if (out / NOTES).exists() and not fresh:
        check_same_plan(out, {name: read_json(out / NOTES).get(name) for name in plan}, plan)
        return load_sae(out)
    new_folder_target(out)
    folder = make_folder(work or out.with_name(out.name + ".work"))
    checkpoint = folder / "checkpoint.safetensors"
    with exclusive_lock(folder), reporting(progress, f"training an SAE at {at}", chosen.steps) as report:
        if fresh:
            checkpoint.unlink(missing_ok=True)
        torch.manual_seed(chosen.seed)
        noted = {"hook_name": str(at), **(metadata or {})}
        run = TrainingRun(source, at, chosen, new_sae(chosen, width, noted, str(device)), plan, str(device), checkpoint)
        run.run(report)
        sae = run.finished()
        sae.to(dtype=getattr(torch, chosen.dtype))
        with atomic_folder(out) as beside:
            sae.save_inference_model(beside)
            write_json(beside / NOTES, {**plan, "losses": run.curve})
        checkpoint.unlink()
    return load_sae(out)


@checked
@gradients_on()
def train_sae(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    hookpoint: Hookpoint | str,
    out: str | Path,
    *,
    settings: SAETraining | None = None,
    held_out: int | Sequence[Text] = HELD_OUT,
    context: int | None = None,
    prepend_bos: bool | None = None,
    batch_tokens: int | None = None,
    store: bool = True,
    device: torch.device | str | None = None,
    work: str | Path | None = None,
    fresh: bool = False,
    progress: Progress = None,
) -> tuple[SAE, SAEQuality]:
    """Train a sparse autoencoder on a model's activations, save it for sae-lens, and measure it on held-out text.

    Three stages, each a function of its own: ``store_activations`` (or passes as they are needed), ``fit_sae``,
    ``measure_sae``. A killed run goes on where it was when it is called again. Position 0 of every block, special
    tokens and massive activations are neither trained on nor measured.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        texts: Strings, or conversations as lists of messages, which go through the chat template; in random order.
        hookpoint: Where the SAE is to read and write, such as ``blocks.12.hook_resid_post``.
        out: The folder of the trained SAE, which ``load_sae`` and sae-lens load.
        settings: Kind, size and schedule; by default those of ``SAETraining()``.
        held_out: How many of the first texts are kept for the quality report, or other texts for it.
        context: Tokens of a block; longer texts are cut into several. By default 128, or the model's window where
            that is less.
        prepend_bos: Whether BOS stands before each block; by default as the tokenizer does.
        batch_tokens: Tokens of a forward pass; by default what suits the device.
        store: Whether activations are kept on disk in ``work``, 2 · d_model bytes a token, so that they are recorded
            once and may be read several times; else they are recorded while training, from texts that must suffice.
        device: Where the SAE is trained; by default the device of the model.
        work: The folder of activations and checkpoint; by default ``out`` with ``.work`` added. Activations stay
            there, for SAEs of other settings.
        fresh: Whether to start over.
        progress: As in ``collect``; a function is called with the number of steps done.

    Returns:
        The SAE, loaded from ``out``, and what was measured of it, which ``training.json`` holds too.

    Raises:
        DataError: There is too little text, or a setting is out of range.
        HookpointError: The model lacks the hookpoint.
        PairingError: ``work`` holds something else.
        FormatError: A file cannot be written, or one in ``work`` is damaged.
    """
    need_sae_lens("Training a sparse autoencoder")
    at, out = Hookpoint.parse(hookpoint), Path(out)
    resolve(model, at)
    chosen = settings or SAETraining()
    context = block_length(model, context)
    if not (out / NOTES).exists():
        new_folder_target(out)
    rest = iter(texts)
    kept = list(islice(rest, held_out)) if isinstance(held_out, int) else list(held_out)
    if not kept:
        raise DataError("no held-out text", "texts for the quality report", "pass held_out=100, or texts of your own")
    folder = make_folder(work or out.with_name(out.name + ".work"))
    source: ActivationSource
    reading: dict[str, Any] = {"context": context, "prepend_bos": prepend_bos, "batch_tokens": batch_tokens}
    if store:
        source = store_activations(
            model, tokenizer, rest, [at], folder / "activations", tokens=chosen.tokens, fresh=fresh, **reading
        )
    else:
        source = ActivationStream(ActivationReader(model, tokenizer, rest, **reading))
    sae = fit_sae(
        source,
        at,
        out,
        settings=chosen,
        metadata=describe_model(model, tokenizer, at, context, prepend_bos),
        device=device or input_device(model),
        work=folder,
        fresh=fresh,
        progress=progress,
    )
    quality = measure_sae(
        model, tokenizer, sae, kept, context=context, prepend_bos=prepend_bos, batch_tokens=batch_tokens
    )
    note_quality(out, quality)
    return sae, quality


def describe_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, hookpoint: Hookpoint, context: int, prepend_bos: bool | None
) -> dict[str, Any]:
    """Return what an SAE's config notes of the model and of the texts that it was trained on."""
    ids = tokenizer("a")["input_ids"]
    if prepend_bos is None:
        prepend_bos = tokenizer.bos_token_id is not None and ids[:1] == [bos_id(tokenizer)]
    identity = model_identity(model)
    block = {"resid_post": f"model.layers.{hookpoint.layer}"}.get(hookpoint.site)
    return {
        "model_name": identity["name"],
        "hook_name": str(hookpoint),
        **({} if block is None else {"hf_hook_name": block}),
        "context_size": context,
        "prepend_bos": prepend_bos,
    }


def note_quality(folder: str | Path, quality: SAEQuality) -> None:
    """Add what was measured of an SAE to the notes in its folder."""
    path = Path(folder) / NOTES
    write_json(path, {**read_json(path), "quality": quality.as_dict()})
