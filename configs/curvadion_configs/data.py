"""Data sets beside torchtitan's own, which are c4, c4_validation and c4_test."""

from typing import Any

from datasets import load_dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS


def _text(sample: dict[str, Any]) -> str:
    return sample["text"]


def _fineweb(path: str) -> Any:
    return load_dataset(path, name="sample-10BT", split="train", streaming=True)


def _local(path: str) -> Any:
    return load_dataset(path, split="train")


def register() -> None:
    """Add ``fineweb`` (the 10-billion-token sample) and ``local``, a folder of .jsonl with a ``text`` in each
    line."""
    DATASETS.setdefault(
        "fineweb", DatasetConfig(path="HuggingFaceFW/fineweb", loader=_fineweb, sample_processor=_text)
    )
    DATASETS.setdefault("local", DatasetConfig(path="assets/text", loader=_local, sample_processor=_text))
