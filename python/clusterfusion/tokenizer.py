"""Text to token ids and back."""

import os
import warnings
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NoReturn

import numpy as np

from clusterfusion import _native, hub
from clusterfusion._arguments import (
    INT32_MAX,
    INT32_MIN,
    Text,
    Tokens,
    boolean,
    integer,
    is_text,
    not_picklable,
    token_ids,
    utf8,
)


class Tokenizer:
    """BPE as Hugging Face ``tokenizers`` computes it, token for token.

    Immutable; all methods may be called from several threads, and release the GIL.
    """

    def __init__(self, path: str | os.PathLike[str], *, revision: str | None = None) -> None:
        """Opens a tokenizer.json.

        Args:
            path: The file, or a folder that holds one, or a model's name on the hub (owner/name),
                whose tokenizer is downloaded if it is not in the cache: :func:`hub.resolve`.
            revision: Of a name on the hub: a branch, a tag or a whole commit hash; None for "main".

        Raises:
            FileNotFoundError: There is none, here and on the hub.
            PermissionError: It may not be read.
            ValueError: It is broken.
            NotImplementedError: It asks for something other than BPE, or for a part that is not
                known (``docs/checkpoints.md`` lists them).

        Warns (UserWarning) of what the files beside tokenizer.json in the folder ask for that it
        does not: ids may differ from those of transformers' ``AutoTokenizer``.
        """
        file = hub.resolve(path, revision, tokenizer_only=True)
        self._handle = _native.tokenizer_open(file)
        for message in _native.tokenizer_warnings(self._handle):
            warnings.warn(str(message), UserWarning, stacklevel=2)

    @classmethod
    def _from_handle(cls, handle: object) -> "Tokenizer":
        tokenizer = cls.__new__(cls)
        tokenizer._handle = handle
        return tokenizer

    def encode(self, text: Text, *, add_special_tokens: bool = True) -> list[int]:
        """Encodes a text.

        Args:
            text: str, or bytes (bytearray, memoryview) of UTF-8. Each maximal ill-formed
                subsequence of bytes is read as U+FFFD, as
                ``bytes.decode("utf-8", errors="replace")`` does.
            add_special_tokens: Whether the post-processor's tokens are added. Special tokens that
                stand in the text are always recognised.

        Returns:
            The token ids.

        Raises:
            TypeError: ``text`` is neither str nor bytes.
            ValueError: ``text`` holds a lone surrogate.
        """
        ids = _native.tokenizer_encode(
            self._handle,
            utf8("text", text),
            boolean("add_special_tokens", add_special_tokens),
        )
        return list(np.from_dlpack(ids).tolist())

    def encode_batch(
        self, texts: Sequence[Text], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Encodes many texts in one call; results and errors are those of :meth:`encode`."""
        if is_text(texts) or not isinstance(texts, Sequence):
            raise TypeError(
                f"texts: expected a sequence of str or bytes, found {type(texts).__name__}"
            )
        encoded = [utf8(f"texts[{index}]", text) for index, text in enumerate(texts)]
        ends = np.fromiter(accumulate(map(len, encoded)), dtype=np.int64, count=len(encoded))
        all_ids, id_ends = _native.tokenizer_encode_batch(
            self._handle,
            b"".join(encoded),
            ends,
            boolean("add_special_tokens", add_special_tokens),
        )
        ids = np.from_dlpack(all_ids).tolist()
        bounds = [0, *np.from_dlpack(id_ends).tolist()]
        return [ids[begin:end] for begin, end in pairwise(bounds)]

    def decode(self, tokens: Tokens, *, skip_special_tokens: bool = True) -> str:
        """Decodes token ids. Ids behind the vocabulary (a model's may be padded) have no text.

        Args:
            tokens: A sequence of integers, or a 1-D DLPack array of integers on the CPU.
            skip_special_tokens: Whether special tokens are left out of the text.

        Returns:
            The text; bytes that do not form UTF-8 become U+FFFD.

        Raises:
            TypeError: ``tokens`` is not a vector of integers.
            IndexError: An id is negative.
        """
        return str(
            _native.tokenizer_decode(
                self._handle,
                token_ids("tokens", tokens),
                boolean("skip_special_tokens", skip_special_tokens),
            )
        )

    @property
    def vocab_size(self) -> int:
        """One past the largest id of vocabulary and added tokens."""
        return int(_native.tokenizer_vocab_size(self._handle))

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token as tokenizer.json spells it, or None if there is none."""
        id_ = _native.tokenizer_token_to_id(self._handle, utf8("token", token))
        return None if id_ is None else int(id_)

    def id_to_token(self, token: int) -> str:
        """Returns a token as tokenizer.json spells it.

        Raises:
            IndexError: There is no such id.
        """
        token = integer("token", token, INT32_MIN, INT32_MAX)
        return str(_native.tokenizer_id_to_token(self._handle, token))

    def __reduce__(self) -> NoReturn:
        raise not_picklable(self, "Tokenizer(path)")

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size})"
