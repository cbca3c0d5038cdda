"""Text -> token ids and back. Both tokenizers have <s>, <pad>, </s>, <unk> and <mask>, and need no network."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from vlmoe.config import TextConfig
from vlmoe.errors import UserError


@runtime_checkable
class Tokenizer(Protocol):
    """What tasks know of a tokenizer. It travels to the loader's processes, so it can be pickled."""

    bos_id: int
    pad_id: int
    eos_id: int
    unk_id: int
    mask_id: int
    vocab_size: int  # every id, special ones too, lies below it

    def encode(self, text: str) -> list[int]:
        """Ids without special ones."""
        ...

    def encode_with_specials(self, text: str, max_length: int) -> list[int]:
        """<s> ids </s>, the ids cut so that it has at most `max_length` positions."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special ones are skipped."""
        ...


def load_tokenizer(config: TextConfig) -> Tokenizer:
    """The tokenizer of a recipe.

    Raises:
        UserError: no sentencepiece model, or one that cannot be used.
    """
    if config.tokenizer == "clip":
        return ClipTokenizer()
    if config.model is None:
        raise UserError("data.text.model is not set: give the path of a sentencepiece model, or set tokenizer: clip")
    return SentencePieceTokenizer(config.model)


def tokenizer_digest(config: TextConfig) -> str:
    """Tokenizers with the same one give every text the same ids."""
    if config.tokenizer == "clip" or config.model is None:
        return config.tokenizer
    return hashlib.sha256(Path(config.model).read_bytes()).hexdigest()


class SentencePieceTokenizer:
    """A sentencepiece model under fairseq's numbering, as XLM-R and BEiT-3 (`beit3.spm`) have it.

    <s> 0, <pad> 1, </s> 2, <unk> 3; piece i >= 3 of the model is id i + 1; <mask> is the last id. A model of 64,000
    pieces has a vocabulary of 64,002.

    Raises:
        UserError: the file is missing, is no sentencepiece model, or numbers its special pieces differently.
    """

    bos_id, pad_id, eos_id, unk_id = 0, 1, 2, 3

    def __init__(self, model: str) -> None:
        from sentencepiece import SentencePieceProcessor

        if not Path(model).is_file():
            raise UserError(
                f"data.text.model: {model} does not exist; make the data set (docs/data.md) or set data.text.model"
            )
        self.pieces = SentencePieceProcessor()
        try:
            self.pieces.LoadFromSerializedProto(Path(model).read_bytes())
            specials = self.pieces.unk_id(), self.pieces.bos_id(), self.pieces.eos_id(), self.pieces.pad_id()
        except (OSError, RuntimeError):
            raise UserError(f"data.text.model: {model} is not a sentencepiece model; make it again") from None
        if specials != (0, 1, 2, -1):
            raise UserError(
                f"data.text.model: {model} numbers unk, bos, eos, pad as {specials}; train it with sentencepiece's "
                "defaults (0, 1, 2, -1)"
            )
        self.vocab_size = self.pieces.get_piece_size() + 2
        self.mask_id = self.vocab_size - 1

    def encode(self, text: str) -> list[int]:
        return [piece + 1 if piece else self.unk_id for piece in self.pieces.encode(text)]

    def encode_with_specials(self, text: str, max_length: int) -> list[int]:
        return [self.bos_id, *self.encode(text)[: max_length - 2], self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        return self.pieces.decode([each - 1 for each in map(int, ids) if self.unk_id < each < self.mask_id])


def is_unicode(text: str) -> bool:
    """False where a text holds half a surrogate pair, as JSON can and a shell passes on: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


class ClipTokenizer:
    """CLIP's lower-case byte-pair encoding of 49,408 ids, from the table inside open_clip, and two ids more.

    <s> 49406 (start of text), </s> 49407 (end of text), <pad> 49408, <mask> 49409. Bytes leave nothing unknown;
    `unk_id` is that of </s>, as in CLIP's own tokenizer files.
    """

    bos_id, eos_id, unk_id, pad_id, mask_id, vocab_size = 49406, 49407, 49407, 49408, 49409, 49410

    def __init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.pieces = SimpleTokenizer()

    def encode(self, text: str) -> list[int]:
        return [each for each in self.pieces.encode(text) if each < self.bos_id]

    def encode_with_specials(self, text: str, max_length: int) -> list[int]:
        return [self.bos_id, *self.encode(text)[: max_length - 2], self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        return self.pieces.decode([each for each in map(int, ids) if each < self.bos_id]).strip()
