"""Train a sentencepiece model on the texts of shards.

    python data/train_tokenizer.py --out datasets/tokenizer.model --vocab-size 8000 datasets/pictures/train-*.tar

A unigram model with byte fallback, so that no text is unknown; the same shards give the same file.
"""

import argparse
import io
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece
from bank import run_command
from tqdm import tqdm

from vlmoe.data.sample import BrokenSample, decode_sample
from vlmoe.errors import UserError

COVERAGE = 0.9995  # of the characters; byte fallback spells the rest
SEED = 0
QUIET = 2  # sentencepiece's log level: errors only


def texts_of(shards: Sequence[Path]) -> Iterator[str]:
    """The captions (`.json`) and texts (`.txt`) of the samples, in order; broken ones are named and left out.

    Raises:
        UserError: a file is no tar.
    """
    for shard in tqdm(shards, desc="read", unit="shard"):
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    stored = tar.extractfile(member) if member.name.endswith((".json", ".txt")) else None
                    if stored is not None:
                        key, _, extension = member.name.rpartition(".")
                        try:
                            yield from _texts_in(stored.read(), extension)
                        except (BrokenSample, UnicodeError) as error:
                            tqdm.write(f"left out: {shard} key {key} ({error})", file=sys.stderr)
        except tarfile.ReadError:
            raise UserError(f"{shard}: no shard, or cut short; make it again") from None


def _texts_in(content: bytes, extension: str) -> list[str]:
    if extension == "txt":
        return content.decode().splitlines()
    texts = decode_sample({"json": content}, key="", source="", needs=()).meta.get("captions", [])
    "".join(texts).encode()  # half a surrogate pair is no text
    return texts


def train(texts: Sequence[str], vocab_size: int) -> bytes:
    """The serialised model; it has fewer pieces than `vocab_size` where the texts hold no more."""
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(SEED)
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=COVERAGE,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,  # sums in another order would give another model
        minloglevel=QUIET,
    )
    return model.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, nargs="+", help="tar files with key.json (captions) or key.txt")
    parser.add_argument("--out", type=Path, required=True, help="the model file")
    parser.add_argument("--vocab-size", type=int, default=8000, help="pieces, at most (default: 8000)")
    options = parser.parse_args(arguments)
    texts = [text for text in texts_of(options.shards) if text.strip()]
    if not texts:
        raise UserError("the shards hold no captions and no texts")
    print(f"training on {len(texts)} texts", file=sys.stderr)
    try:
        model = train(texts, options.vocab_size)
    except RuntimeError as error:
        raise UserError(f"--vocab-size {options.vocab_size}: {' '.join(str(error).split())}") from None
    options.out.parent.mkdir(parents=True, exist_ok=True)
    new = options.out.with_name(options.out.name + ".tmp")
    new.write_bytes(model)
    os.replace(new, options.out)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    asked = "" if size == options.vocab_size else f" (of {options.vocab_size} asked for: the texts hold no more)"
    print(f"{options.out}: {size} pieces{asked}")


if __name__ == "__main__":
    sys.exit(run_command(main))
