"""What people do today with `datasets`: tokenize by `map`, concatenate, cut into blocks, save.

    python -m stacking_ds.bench.hf_path TEXT.jsonl ... --tokenizer tokenizer.json --out DIR

The way of the masked-LM example scripts of transformers: no sentences, no document boundaries, no
held-out split, no duplicates found.
"""

import argparse
from itertools import chain
from typing import Any

_BLOCK_TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(prog="hf_path", description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()

    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=options.tokenizer, model_max_length=10**9, mask_token="[MASK]"
    )
    texts = datasets.load_dataset(
        "json", data_files=options.files, split="train", cache_dir=f"{options.out}/cache"
    )

    def tokenize(batch: dict[str, list[str]]) -> Any:
        return tokenizer(batch["text"], return_special_tokens_mask=True)

    tokenized = texts.map(
        tokenize, batched=True, num_proc=options.workers, remove_columns=texts.column_names
    )
    tokenized.map(blocks, batched=True, num_proc=options.workers).save_to_disk(
        f"{options.out}/blocks", num_proc=options.workers
    )


def blocks(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """The lists of each column joined and cut into blocks; what is left over is dropped."""
    joined = {name: list(chain.from_iterable(lists)) for name, lists in batch.items()}
    total = len(next(iter(joined.values()))) // _BLOCK_TOKENS * _BLOCK_TOKENS
    return {
        name: [ids[start : start + _BLOCK_TOKENS] for start in range(0, total, _BLOCK_TOKENS)]
        for name, ids in joined.items()
    }


if __name__ == "__main__":
    main()
