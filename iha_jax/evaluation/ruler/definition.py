"""The published definition of RULER's 13 tasks: wording, needles, counts, tokens to generate.

The texts are RULER's own, letter by letter (github.com/NVIDIA/RULER at c3f5e3b, `scripts/data/synthetic/constants.py`,
`niah.py`, `variable_tracking.py`, `qa.py` and `scripts/synthetic.yaml`; Apache-2.0, (c) 2024 NVIDIA): scores on other
texts would be scores of another benchmark.
"""

from dataclasses import dataclass

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DOCUMENT = "Document {number}:\n{document}"
DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # per cent of an essay's sentences before a needle
DEFAULT_LENGTH = 4096  # the shortest published
SHORT = 4096  # below it, word lists are counted out more thinly


@dataclass(frozen=True)
class Wording:
    """The question around a context, how its answer begins, tokens to generate, and whether any answer will do."""

    template: str
    answer_prefix: str
    max_tokens: int
    any_answer: bool = False


NIAH = Wording(
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
    128,
)
VARIABLE_TRACKING = Wording(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {variables} variables are assigned "
    "the value {query}, they are: ",
    30,
)
COMMON_WORDS = Wording(
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
    120,
)
FREQUENT_WORDS = Wording(
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
    50,
)
QUESTION = Wording(
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me "
    "the answer and do not output any other words.\n\nQuestion: {query}",
    " Answer:",
    32,
    any_answer=True,
)


@dataclass(frozen=True, kw_only=True)
class Needles:
    """Needles in a haystack: of what kinds keys and values are, how many, and how many keys are asked for."""

    haystack: str  # noise, essays, or needles
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1  # of each key
    queries: int = 1
    wording: Wording = NIAH

    @property
    def needs(self) -> tuple[str, ...]:
        words = ("words",) if "words" in (self.key, self.value) else ()
        return (*words, "essays") if self.haystack == "essays" else words


@dataclass(frozen=True)
class Chain:
    """Variable tracking: one chain, the first variable assigned a number and `hops` more each the one before."""

    hops: int = 4
    example_tokens: int = 500  # of the solved example, at most
    wording: Wording = VARIABLE_TRACKING
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class WordList:
    """Common words: how often the 10 common words and the others occur, in the list and in the solved example.

    An example is (words, occurrences of common ones, of others).
    """

    common: int = 10
    occurrences: tuple[int, int] = (30, 3)
    example: tuple[int, int, int] = (40, 10, 3)
    short_occurrences: tuple[int, int] = (6, 1)
    short_example: tuple[int, int, int] = (20, 3, 1)
    wording: Wording = COMMON_WORDS
    needs: tuple[str, ...] = ("words",)


@dataclass(frozen=True)
class CodedText:
    """Frequent words: the k-th of `(length - max_tokens) // 50` words occurs n k^-alpha / zeta(alpha) times."""

    alpha: float = 2.0
    letters: int = 6
    tokens_a_word: int = 50
    answers: int = 3
    wording: Wording = FREQUENT_WORDS
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Documents:
    """Questions over documents, among others that do not answer them."""

    dataset: str  # squad or hotpotqa
    wording: Wording = QUESTION

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.dataset,)


Subtask = Needles | Chain | WordList | CodedText | Documents

SUBTASKS: dict[str, Subtask] = {
    "niah_single_1": Needles(haystack="noise"),
    "niah_single_2": Needles(haystack="essays"),
    "niah_single_3": Needles(haystack="essays", value="uuids"),
    "niah_multikey_1": Needles(haystack="essays", keys=4),
    "niah_multikey_2": Needles(haystack="needles"),
    "niah_multikey_3": Needles(haystack="needles", key="uuids", value="uuids"),
    "niah_multivalue": Needles(haystack="essays", values=4),
    "niah_multiquery": Needles(haystack="essays", keys=4, queries=4),
    "vt": Chain(),
    "cwe": WordList(),
    "fwe": CodedText(),
    "qa_1": Documents("squad"),
    "qa_2": Documents("hotpotqa"),
}
