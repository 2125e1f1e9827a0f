"""The tokens of a run: learned from the text it trains on, kept with what it learns."""

import hashlib
import os
import pathlib
import threading
from collections.abc import Callable, Iterable

import jax
from jax.experimental import multihost_utils

from vit_jax.data.tokenizer import Tokenizer, train_tokenizer
from vit_jax.errors import UserError, reason

FILE = 'tokenizer.model'


def load_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer that lies beside weights.

    Raises:
      UserError: when there is none, or it is damaged.
    """
    path = folder / FILE
    try:
        model = path.read_bytes()
    except OSError as error:
        raise UserError(
            f'{path} cannot be read: {reason(error)}; without it the weights are of no '
            'use'
        ) from error
    return Tokenizer(model)


def folder_of(weights: str) -> pathlib.Path:
    """Where the tokenizer lies: the workdir, also of WORKDIR@best, or beside a file."""
    path = pathlib.Path(weights)
    if path.is_dir():
        return path
    before = weights.rpartition('@')[0]
    return pathlib.Path(before) if os.path.isdir(before) else path.parent


class Vocabulary:
    """A tokenizer that is made when it is first needed, or taken from a workdir.

    Args:
      lines: () -> the text to learn tokens from, of both languages.
      size: number of tokens, the special ones included.
      kind: see `train_tokenizer`.
      weights: those that a run starts from, whose tokens are its own; or None.
    """

    def __init__(
        self,
        lines: Callable[[], Iterable[str]],
        size: int,
        kind: str,
        weights: str | None = None,
    ):
        self._lines = lines
        self._size = size
        self._kind = kind
        self._weights = weights
        self._tokenizer: Tokenizer | None = None
        self._lock = threading.Lock()

    @property
    def tokenizer(self) -> Tokenizer:
        """What is known, or else learned now.

        Raises:
          UserError: for text that is not there, or that has not as many tokens.
        """
        with self._lock:
            if self._tokenizer is None and self._weights is not None:
                self.load(folder_of(self._weights))
            if self._tokenizer is None:
                model = train_tokenizer(self._lines(), self._size, self._kind)
                self._tokenizer = Tokenizer(model)
            return self._tokenizer

    @property
    def digest(self) -> str:
        """Tells tokenizers apart."""
        return hashlib.sha256(self.tokenizer.model).hexdigest()

    def load(self, folder: pathlib.Path) -> None:
        """Takes the tokenizer of a workdir.

        Raises:
          UserError: when it has none, or another one's.
        """
        tokenizer = load_tokenizer(folder)
        if tokenizer.vocab_size > self._size:
            raise UserError(
                f'{folder / FILE} has {tokenizer.vocab_size} tokens, the config '
                f'{self._size}; it is of another run'
            )
        self._tokenizer = tokenizer

    def keep(self, folder: pathlib.Path, begun: bool) -> None:
        """Takes the tokenizer of a workdir, or puts one there for good.

        Of several processes the first makes it, and all have the same.

        Args:
          folder: the workdir.
          begun: whether there are checkpoints, whose tokens must be there.
        """
        path = folder / FILE
        if jax.process_index() == 0 and not begun:
            temporary = path.with_suffix('.tmp')
            temporary.write_bytes(self.tokenizer.model)
            os.replace(temporary, path)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices('tokenizer')
        self.load(folder)
