"""Text to token ids and back: SentencePiece models, trained in memory.

"SentencePiece: A simple and language independent subword tokenizer", arXiv 1808.06226.
Source and target share one model, as in "Attention Is All You Need", section 5.1.
"""

import io
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vit_jax.errors import UserError, reason, unknown

PAD, BOS, EOS, UNK = 0, 1, 2, 3
KINDS = ('unigram', 'bpe', 'char')

# From here on, 256 of the ids are the bytes. Below they would leave too few for words.
BYTE_FALLBACK_FROM = 1024
_NO_UNICODE = 'a line is no Unicode text: it holds lone surrogates'
_MAX_CHARACTERS = 1 << 20  # of which a vocabulary consists: more than Unicode has named


def train_tokenizer(
    lines: Iterable[str],
    vocab_size: int,
    kind: str = 'unigram',
    max_lines: int = 1_000_000,
) -> bytes:
    """Trains a SentencePiece model: the same lines and arguments give the same bytes.

    What a model makes of text it has not seen: from 1,024 ids on, a character it does
    not know becomes the bytes of its UTF-8, and nothing is lost ('byte_fallback'; the
    rarest 0.05% of the characters of `lines` are not known either). A smaller
    vocabulary has no ids to spare for bytes: it knows every character of `lines`, and
    any other becomes `UNK`.

    Args:
      lines: sentences of all languages; those of more than 4,192 bytes are left out.
      vocab_size: number of ids, with PAD, BOS, EOS and UNK; of kind 'char' at most so
        many, since there are no more than characters.
      kind: 'unigram', 'bpe' or 'char'.
      max_lines: lines to learn from; the first ones.

    Returns:
      The model, for `Tokenizer`, and for any program that reads SentencePiece's files.

    Raises:
      UserError: when the lines cannot fill `vocab_size`, or it is too small for their
        characters (the limit is told), and when there are no lines.

    >>> lines = ['ein Hund bellt', 'a dog barks'] * 20
    >>> tokenizer = Tokenizer(train_tokenizer(lines, vocab_size=40, kind='char'))
    >>> tokenizer.vocab_size, tokenizer.decode(tokenizer.encode(['ein dog']))
    (20, ['ein dog'])
    """
    if kind not in KINDS:
        raise unknown('kind of tokenizer', kind, KINDS)
    if vocab_size <= UNK + 1:
        raise UserError(f'config.text.vocab_size must be at least 5, not {vocab_size}')
    sentencepiece = _import_sentencepiece()
    fallback = vocab_size >= BYTE_FALLBACK_FROM
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.islice(lines, max_lines),
            model_writer=model,
            model_type=kind,
            # Of characters, SentencePiece would keep the most frequent without a word.
            vocab_size=_MAX_CHARACTERS if kind == 'char' else vocab_size,
            byte_fallback=fallback,
            character_coverage=0.9995 if fallback else 1.0,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            num_threads=16,  # decides how sums are rounded: not the machine's number
            minloglevel=2,  # errors, which it also raises
        )
    except RuntimeError as error:
        raise _training_error(error, vocab_size) from error
    if kind == 'char':
        needed = Tokenizer(model.getvalue()).vocab_size
        if needed > vocab_size:
            raise _too_small(vocab_size, needed)
    return model.getvalue()


def _training_error(error: Exception, vocab_size: int) -> UserError:
    """What SentencePiece says, which names places in its source, in our words."""
    text = str(error)
    if found := re.search(r'too high .* value <= (\d+)', text):
        return UserError(
            f'config.text.vocab_size {vocab_size} is more than the training text can '
            f'fill: it can be at most {found[1]}'
        )
    if found := re.search(r'smaller than required_chars\. \d+ vs (\d+)', text):
        return _too_small(vocab_size, int(found[1]))
    if 'sentences_.empty()' in text:
        return UserError(
            'there is no text to train a tokenizer on: all lines are empty'
        )
    if 'Unable to cast' in text:
        return UserError(_NO_UNICODE)
    return UserError(f'SentencePiece cannot train a tokenizer: {reason(error)}')


def _too_small(vocab_size: int, needed: int) -> UserError:
    bytes_too = ', the 256 bytes' if vocab_size >= BYTE_FALLBACK_FROM else ''
    return UserError(
        f'config.text.vocab_size {vocab_size} is too small for the characters of the '
        f'training text{bytes_too} and the 4 special tokens: it must be at least '
        f'{needed}'
    )


class Tokenizer:
    """Encodes and decodes with a SentencePiece model.

    Text is normalised first, as the model says; ours by SentencePiece's 'nmt_nfkc':
    compatible characters become one ('ﬁ' is 'fi', '２' is '2'), white space of any kind
    one space, none of it stays at the ends, and control characters are dropped. So
    `decode(encode(lines))` gives the normalised lines.

    It can be pickled.

    Args:
      model: as `train_tokenizer` made it.

    Raises:
      UserError: for bytes that are no model, or one with other special tokens.
    """

    def __init__(self, model: bytes):
        sentencepiece = _import_sentencepiece()
        self.model = bytes(model)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self.model)
        except RuntimeError as error:
            raise UserError(
                f'the tokenizer of {len(self.model):,} bytes is damaged: SentencePiece '
                'cannot read it; copy it again, or train it anew'
            ) from error
        processor = self._processor
        found = tuple(
            getattr(processor, f'{name}_id')() for name in ('pad', 'bos', 'eos', 'unk')
        )
        if found != (PAD, BOS, EOS, UNK):
            raise UserError(
                f'the tokenizer has the ids {found} for PAD, BOS, EOS and UNK; they '
                f'must be {(PAD, BOS, EOS, UNK)}: train it by `train_tokenizer`'
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.model,)

    @property
    def vocab_size(self) -> int:
        """Number of ids, with the special ones."""
        return self._processor.vocab_size()

    def encode(self, lines: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each line, int32 `[length]`, without BOS and EOS.

        Raises:
          UserError: for a line that is no Unicode text (lone surrogates).
        """
        if not lines:
            return []
        try:
            # Its own threads take what is not worth the while of a few lines.
            threads = -1 if len(lines) > 256 else 1
            encoded = self._processor.encode(list(lines), num_threads=threads)
        except TypeError as error:
            raise UserError(_NO_UNICODE) from error
        return [np.array(ids, np.int32) for ids in encoded]

    def pieces(self, ids: np.ndarray) -> list[str]:
        """What each id stands for, such as '▁dog', whose '▁' is a space.

        BOS is '<s>', EOS '</s>'; an id that the vocabulary does not have, '<unk>'.

        Args:
          ids: `[length]` integers.
        """
        known = np.where((ids >= 0) & (ids < self.vocab_size), ids, UNK)
        return [self._processor.id_to_piece(int(i)) for i in known]

    def decode(self, ids: Sequence[np.ndarray]) -> list[str]:
        """The text of each row of ids, up to its EOS; PAD and BOS are skipped.

        UNK is written as '⁇'.

        Raises:
          UserError: for an id that the vocabulary does not have.
        """
        rows = [_cut(np.asarray(row)) for row in ids]
        for row in rows:
            if row.size and not 0 <= row.min() <= row.max() < self.vocab_size:
                wrong = row[(row < 0) | (row >= self.vocab_size)][0]
                raise UserError(
                    f'token {wrong} is not of this tokenizer: its ids are 0 to '
                    f'{self.vocab_size - 1}'
                )
        # It writes nothing for PAD and BOS, which are control symbols of the model.
        return self._processor.decode([row.tolist() for row in rows]) if rows else []


def _cut(row: np.ndarray) -> np.ndarray:
    """What stands before EOS."""
    (ends,) = np.nonzero(row == EOS)
    return row[: ends[0]] if ends.size else row


def _import_sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(
            "text needs SentencePiece: install the extra, pip install -e '.[text]'"
        ) from error
    return sentencepiece
