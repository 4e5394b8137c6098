"""Text as numbers, in the way that is usual for the field's standard sets.

Of V characters or words: 0 is padding, 1..V are they, V+1 is any other, V+2 begins and V+3 ends a text. The label of a place
is what comes next; a place after the end has the label 0, for a loss to leave out.

References:
    Reddi et al., 2021, Adaptive Federated Optimization, https://arxiv.org/abs/2003.00295, appendix (vocabularies, lengths).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from shoal.errors import DataError

CHARACTERS = b"dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#'/37;?bfjnrvzBFJNRVZ\"&*.26:\naeimquyAEIMQUY]!%)-159\r"
"""The 86 characters of Shakespeare and Dickens, in the order that trained models expect."""

LENGTH = 80
NUM_WORDS, NUM_WORDS_IN_SENTENCE = 10_000, 20
_PADDING = "<padding>"
_SPECIAL = ("<unknown>", "<begin>", "<end>")

CHARACTER_NAMES = (_PADDING, *CHARACTERS.decode(), *_SPECIAL)
"""What the numbers of characters stand for: 90 of them."""


def characters(texts: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Texts as rows of 80 characters; a text begins a row of its own, and no character is lost between rows.

    Returns:
        `character` and `label`, (N, 80) int32.
    """
    table = np.full(256, len(CHARACTERS) + 1, np.int32)
    table[np.frombuffer(CHARACTERS, np.uint8)] = np.arange(1, len(CHARACTERS) + 1)
    begin, end = len(CHARACTERS) + 2, len(CHARACTERS) + 3
    rows = [np.zeros((0, LENGTH + 1), np.int32)]
    for text in texts:
        ids = np.concatenate([[begin], table[np.frombuffer(text, np.uint8)], [end]])
        count = -(-(len(ids) - 1) // LENGTH)
        padded = np.pad(ids, (0, count * LENGTH + 1 - len(ids)))
        rows.append(padded[np.arange(count)[:, None] * LENGTH + np.arange(LENGTH + 1)])
    made = np.concatenate(rows).astype(np.int32)
    return {"character": made[:, :-1], "label": made[:, 1:]}


@dataclass(frozen=True)
class Sentences:
    """Sentences of words between blanks, a row each; a longer one is cut."""

    words: tuple[str, ...]
    """The vocabulary, most frequent first."""
    length: int = NUM_WORDS_IN_SENTENCE
    """Words in a row."""
    _numbers: dict[bytes, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._numbers.update({word.encode(): number for number, word in enumerate(self.words, start=1)})

    @staticmethod
    def of_counts(raw: bytes, *, most: int = NUM_WORDS) -> "Sentences":
        """The first words of a file of lines "word count", most frequent first.

        Raises:
            DataError: a line that is not so, or fewer words.
        """
        words: list[str] = []
        for number, line in enumerate(raw.decode(errors="replace").splitlines(), start=1):
            if len(words) == most:
                break
            word, _, count = line.partition(" ")
            if not word or not count.strip().isdigit():
                raise DataError(f"Expected 'word count' in line {number} of the words' counts, got {line[:40]!r}.")
            words.append(word)
        if len(words) < most:
            raise DataError(f"Expected the counts of at least {most} words, got {len(words)}.")
        return Sentences(tuple(words))

    @property
    def names(self) -> tuple[str, ...]:
        """What the numbers stand for."""
        return (_PADDING, *self.words, *_SPECIAL)

    def __call__(self, sentences: Sequence[bytes]) -> dict[str, np.ndarray]:
        """`word` and `label`, (N, length) int32."""
        unknown = len(self.words) + 1
        made = np.zeros((len(sentences), self.length + 1), np.int32)
        for row, sentence in zip(made, sentences, strict=True):
            ids = [unknown + 1, *(self._numbers.get(word, unknown) for word in sentence.split()), unknown + 2]
            row[: len(ids)] = ids[: self.length + 1]
        return {"word": made[:, :-1], "label": made[:, 1:]}
