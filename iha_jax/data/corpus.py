"""The data of a run, opened and checked against its config."""

from dataclasses import dataclass

from iha_jax.config import Config, ConfigError
from iha_jax.data.retrieval import RetrievalRows, evaluation_lengths, is_retrieval
from iha_jax.data.rows import RowSource, open_rows
from iha_jax.data.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Corpus:
    """Tokenizer, training rows of every source, and the validation rows (of the first source)."""

    tokenizer: Tokenizer
    train: list[RowSource]
    validation: RowSource

    @property
    def digests(self) -> dict[str, str]:
        """What `provenance.json` records and a resumed run must find again."""
        rows = [*self.train, self.validation]
        return {
            "corpus_digest": "+".join(r.corpus_digest for r in rows),
            "tokenizer_digest": self.tokenizer.digest,
            "rows_digest": "+".join(r.digest for r in rows),
        }

    @property
    def counts(self) -> dict[str, int]:
        """What was made of the training sources, added up: for the first lines of a run and `provenance.json`."""
        names = ("num_documents", "num_tokens", "left_out", "truncated", "truncated_tokens")
        return {"rows": sum(map(len, self.train))} | {n: sum(getattr(r, n) for r in self.train) for n in names}

    def describe(self) -> str:
        """The same in words."""
        counts = self.counts
        text = f"{counts['num_documents']:,} documents of {counts['num_tokens']:,} tokens in {counts['rows']:,} rows"
        if counts["truncated"]:
            text += f"; {counts['truncated']:,} truncated, by {counts['truncated_tokens']:,} tokens"
        return text + (f"; {counts['left_out']:,} left out" if counts["left_out"] else "")


def open_tokenizer(config: Config) -> Tokenizer:
    """The run's tokenizer. Raises ConfigError when the model's vocabulary is too small for it."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            [
                f"config.model.vocab_size = {config.model.vocab_size}: smaller than the {tokenizer.vocab_size} ids of "
                f"config.data.tokenizer = {config.data.tokenizer!r}; set --config.model.vocab_size="
                f"{tokenizer.vocab_size} or more"
            ]
        )
    return tokenizer


def open_corpus(config: Config) -> Corpus:
    """Opens (on first use: prepares) the rows of every source. Raises ValueError for data that cannot be used."""
    tokenizer = open_tokenizer(config)
    train = [_open(config, tokenizer, source, config.data.train_split) for source in config.data.sources]
    return Corpus(tokenizer, train, open_validation_rows(config, tokenizer))


def open_validation_rows(config: Config, tokenizer: Tokenizer) -> RowSource:
    """The validation rows: those of the first source."""
    return _open(config, tokenizer, config.data.sources[0], config.data.validation_split)


def _open(config: Config, tokenizer: Tokenizer, source: str, split: str) -> RowSource:
    data = config.data
    if is_retrieval(source):
        rows = [RetrievalRows(source, split, tokenizer, n) for n in evaluation_lengths(config.model.context_length)]
        return next(r for r in rows if r.context_length == config.model.context_length)
    return open_rows(
        source=source,
        split=split,
        data_dir=data.data_dir,
        tokenizer=tokenizer,
        context_length=config.model.context_length,
        cache_dir=data.cache_dir,
        text_feature=data.text_feature,
    )
