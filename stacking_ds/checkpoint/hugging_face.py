"""Exports a trained model as a folder that Hugging Face's `transformers` loads."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from stacking_ds.checkpoint.save import little_endian_bytes, safetensors_header
from stacking_ds.console import first_of
from stacking_ds.errors import CheckpointError, ConfigError, DataError
from stacking_ds.files import is_count, published, read_json
from stacking_ds.model.bert import parameter_shapes
from stacking_ds.model.bert_config import BertConfig

_SPECIAL_TOKENS = {
    f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")
}

_CONFIG_KEYS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("max_position_embeddings", "type_vocab_size", "initializer_range", "layer_norm_eps"),
)
_SWITCHES = ("lowercase", "strip_accents", "handle_chinese_chars")

_COPIED = ("tokenizer.json", "vocab.txt")
_FILES = {"config.json", "model.safetensors", "tokenizer_config.json", *_COPIED}


def export_to_hugging_face(
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: BertConfig,
    tokenizer_dir: Path,
    out_dir: Path,
    *,
    longest_tokens: int | None = None,
) -> None:
    """Write the model and its tokenizer into `out_dir`.

    Each tensor is written as it comes and none is kept, so a model need not fit into memory. The
    folder appears whole or not at all; an earlier export there is replaced. It loads with
    `from_pretrained` as `BertForPreTraining`, any `AutoModel…` class of BERT, and `AutoTokenizer`.

    Args:
        tensors: every parameter of `config`'s model once, in any order: our name, fp32 on the CPU.
        tokenizer_dir: folder with the `tokenizer.json` and `vocab.txt` of the training data.
        out_dir: new, empty, or an earlier export.
        longest_tokens: the longest rows that trained the model, to which its tokenizer is to cut
            text: the embeddings of later positions are as random as they began. None: all were.

    Raises:
        ConfigError: a pre-LN model, or an `out_dir` with something else in it.
        CheckpointError: tensors that are not those of `config`.
        DataError: tokenizer files that are missing, unreadable or larger than the model.
    """
    if config.layer_norm_position != "post":
        raise ConfigError(
            f"layer_norm_position={config.layer_norm_position!r} cannot be exported: Hugging "
            f"Face's BERT normalises after each residual sum; train with 'post' to export"
        )
    tokenizer = _read_tokenizer(tokenizer_dir)
    if len(tokenizer["model"]["vocab"]) > config.vocab_size:
        raise DataError(
            f"the tokenizer in {tokenizer_dir} has {len(tokenizer['model']['vocab'])} tokens, the "
            f"model {config.vocab_size}; export with the tokenizer the model was trained with"
        )
    # behind a link, the folder is replaced and not the link
    out_dir = Path(os.path.realpath(out_dir))
    if out_dir.exists() and not out_dir.is_dir():
        raise ConfigError(f"{out_dir} is a file; give the folder to export into")
    # an export is replaced as a whole, so anything else in the folder would be lost
    found = {path.name for path in out_dir.iterdir()} if out_dir.exists() else set()
    if foreign := sorted(found - _FILES):
        raise ConfigError(
            f"{out_dir} holds something else than an export ({', '.join(foreign[:3])}); give "
            f"another folder"
        )
    longest_tokens = longest_tokens or config.max_position_embeddings
    try:
        with published(out_dir) as partial:
            _write_weights(partial / "model.safetensors", tensors, config)
            for name, content in (
                ("config.json", _model_json(config, tokenizer)),
                ("tokenizer_config.json", _tokenizer_json(tokenizer, longest_tokens)),
            ):
                (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            for name in _COPIED:
                shutil.copyfile(tokenizer_dir / name, partial / name)
    except OSError as error:
        raise ConfigError(
            f"cannot write the export {out_dir} ({error}); make room, or choose another folder"
        ) from None


def _write_weights(
    path: Path, tensors: Iterable[tuple[str, torch.Tensor]], config: BertConfig
) -> None:
    """Write a safetensors file, whose header says beforehand where each tensor will stand."""
    # Tied tensors stand under their first name only: `transformers` ties them on loading.
    shapes = parameter_shapes(config)
    header, places = safetensors_header(shapes, format="pt")
    surplus = []
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            place = places.pop(name, None)
            if place is None:
                surplus.append(name)
                continue
            if tuple(tensor.shape) != shapes[name]:
                raise CheckpointError(
                    f"{name} has shape {tuple(tensor.shape)} where the config says {shapes[name]}; "
                    f"export with the checkpoint's own config"
                )
            file.seek(place)
            file.write(little_endian_bytes(tensor))
    if places or surplus:
        missing, others = (first_of(list(map(repr, sorted(names)))) for names in (places, surplus))
        raise CheckpointError(
            f"the tensors are not those of a model of {config.num_hidden_layers} layers: missing "
            f"[{missing}], unknown or twice [{others}]; export with the checkpoint's own config"
        )


def _read_tokenizer(folder: Path) -> dict[str, Any]:
    for name in _COPIED:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing; point to the folder of prepared data")
    path = folder / "tokenizer.json"
    try:
        tokenizer: dict[str, Any] = read_json(path)
        kinds = tokenizer["model"]["type"], tokenizer["normalizer"]["type"]
        vocabulary = tokenizer["model"]["vocab"]
        special = [vocabulary[token] for token in _SPECIAL_TOKENS.values()]
        switches = [tokenizer["normalizer"][name] for name in _SWITCHES]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a BERT tokenizer ({error!r}); prepare the data anew or restore the file"
        ) from error
    if kinds != ("WordPiece", "BertNormalizer"):
        raise DataError(
            f"{path} is made of {kinds}, and BERT's of WordPiece with a "
            f"BertNormalizer; export needs the tokenizer that prepared the data"
        )
    right = all(map(is_count, special)) and len(set(special)) == len(special)
    if not right or not all(each is None or isinstance(each, bool) for each in switches):
        raise DataError(
            f"{path} is damaged: its special tokens have no ids of their own, "
            f"or a switch of its normalizer is neither on nor off; prepare the data anew or "
            f"restore the file"
        )
    return tokenizer


def _model_json(config: BertConfig, tokenizer: dict[str, Any]) -> dict[str, Any]:
    values = {**config.model_dump(), "hidden_act": "gelu"}
    return {
        "architectures": ["BertForPreTraining"],
        "model_type": "bert",
        **{name: values[name] for name in _CONFIG_KEYS},
        "pad_token_id": tokenizer["model"]["vocab"]["[PAD]"],
        "tie_word_embeddings": True,
    }


def _tokenizer_json(tokenizer: dict[str, Any], longest_tokens: int) -> dict[str, Any]:
    normalizer = tokenizer["normalizer"]
    return {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": normalizer["lowercase"],
        "strip_accents": normalizer["strip_accents"],
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        "model_max_length": longest_tokens,
        **_SPECIAL_TOKENS,
    }
