"""Prepare what torchtitan reads, without a network: a BPE tokenizer and a folder of .jsonl, from local text.

    python scripts/prepare_assets.py            # the standard library's own source, 512 tokens: debug configs
    python scripts/prepare_assets.py --text ~/books --vocabulary 50257 --out assets/books

The real ones, where there is a network (GPT-2's tokenizer has the 50257 tokens that the gpt_* configs are
made for; C4 and FineWeb are streamed by torchtitan's data loader):

    hf download openai-community/gpt2 tokenizer.json tokenizer_config.json --local-dir assets/gpt2
"""

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

try:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError as error:
    raise SystemExit(
        f"a tokenizer is built with {error.name}, which is missing: pip install 'curvadion[torchtitan]'"
    ) from None

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>")


def documents(source: Path, limit: int) -> Iterator[str]:
    """Yield the text files of a folder, or one file, in a fixed order, up to so many characters in all."""
    paths = (
        [source]
        if source.is_file()
        else sorted(p for p in source.rglob("*") if p.suffix in (".txt", ".md", ".rst", ".py"))
    )
    for path in paths:
        if "site-packages" in path.parts or limit <= 0:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")[:limit]
        if len(text) >= 200:
            limit -= len(text)
            yield text


def main() -> None:
    """Write OUT/text/data.jsonl, OUT/tokenizer/tokenizer.json and tokenizer_config.json."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--text",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        help="file, or folder of .txt, .md, .rst, .py",
    )
    parser.add_argument("--characters", type=int, default=4_000_000, help="how much of it")
    parser.add_argument("--vocabulary", type=int, default=512, help="tokens, special ones included")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder to write to")
    args = parser.parse_args()

    texts = list(documents(args.text, args.characters))
    if not texts:
        parser.error(f"--text must hold text files of at least 200 characters; got none in {args.text}")
    (args.out / "text").mkdir(parents=True, exist_ok=True)
    with open(args.out / "text" / "data.jsonl", "w") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder = args.out / "tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "add_bos_token": True, "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    size = tokenizer.get_vocab_size()
    print(
        f"{args.out}/text: {len(texts)} documents, {sum(map(len, texts)):,} characters; {folder}: {size:,} "
        "tokens"
    )


if __name__ == "__main__":
    main()
