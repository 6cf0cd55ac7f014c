"""Scratch models: a byte-pair tokenizer trained on the prompts, and random weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from plad_dist.config import ScratchModel
from plad_dist.data.dataset import Dataset
from plad_dist.data.models import commit_model, model_class, model_fingerprint, unfinished_model
from plad_dist.errors import UserError, first_line
from plad_dist.fingerprint import fingerprint

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def make_model(
    scratch: ScratchModel, prompts: Dataset | pa.Table, input_fingerprint: str, seed: int, folder: Path
) -> None:
    """Write a random model with its tokenizer, unless the folder already holds it.

    Args:
        prompts: prompts whose texts train the tokenizer.
        input_fingerprint: fingerprint of the prompts.

    Raises:
        UserError: transformers cannot build the architecture.
        RunFailed: the model cannot be written.
    """
    identity = fingerprint(
        "scratch model", scratch=scratch.model_dump(mode="json"), prompts=input_fingerprint, seed=seed
    )
    if model_fingerprint(folder) == identity:
        return
    tokenizer = train_tokenizer(_texts(prompts), scratch.vocab_size)
    model = random_model(scratch, tokenizer, seed)
    with unfinished_model(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        model.save_pretrained(temporary)
        commit_model(temporary, folder, identity, {})


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    """Return a byte-level byte-pair tokenizer trained on texts.

    A word at the start of a text has the same tokens as within it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def random_model(scratch: ScratchModel, tokenizer: Any, seed: int) -> Any:
    """Return a language model with random weights.

    Raises:
        UserError: transformers cannot build the architecture.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    vocabulary = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    return _build(scratch, vocabulary)


def check_architecture(scratch: ScratchModel) -> Any:
    """Return the transformers config of a scratch model, built without memory for its weights.

    Raises:
        UserError: transformers cannot build the architecture.
    """
    import torch

    with torch.device("meta"):
        return _build(scratch, {"vocab_size": scratch.vocab_size}).config


def _build(scratch: ScratchModel, vocabulary: dict[str, int]) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig

    arguments = dict(scratch.architecture)
    model_type = arguments.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, CONFIG_MAPPING.keys(), n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        raise UserError(f"scratch.architecture.model_type: transformers has no {model_type!r}{hint}")
    try:
        config = AutoConfig.for_model(model_type, **arguments, **vocabulary)
        if config.is_encoder_decoder:  # T5's convention; the families' own defaults are other tokens of this tokenizer
            config.decoder_start_token_id = arguments.get("decoder_start_token_id", config.pad_token_id)
        return model_class(config).from_config(config, dtype=torch.float32)
    except Exception as error:  # noqa: BLE001 - config classes raise any type of exception for bad arguments
        raise UserError(
            f"scratch.architecture: transformers cannot build this {model_type} model: {first_line(error)}"
        ) from None


def _texts(prompts: Dataset | pa.Table) -> Iterator[str]:
    """Yield the contents of all messages and the references."""
    tables = [prompts] if isinstance(prompts, pa.Table) else prompts.blocks()
    for table in tables:
        for batch in table.select(["messages", "reference"]).to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                yield from (message["content"] for message in row["messages"])
                if row["reference"]:
                    yield row["reference"]
