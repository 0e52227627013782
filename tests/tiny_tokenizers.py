"""Tiny tokenizers of every kind, trained on the spot."""

import json

TEXTS = [
    "plain text, twice plain text",
    "é à ç — 漢字 🎉",
    "  two  spaces\n\tand a tab ",
    "<|endoftext|> <0xAB> [UNK] </s>",
    "¡ÿĂ ń",
]


def huggingface(kind, folder):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<|endoftext|>"]
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special
        )
    elif kind == "byte-fallback":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        special = ["<unk>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]]
        trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=special)
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[SEP]"])
    else:  # unigram over characters, no special token at all
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
        trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=[], unk_token=None)
    training = [text for text in TEXTS if kind not in ("byte-fallback",) or "<" not in text]
    tokenizer.train_from_iterator(training * 20, trainer)
    path = folder / f"{kind}.json"
    if kind == "byte-fallback":  # bytes are ordinary tokens of the vocabulary there, as in Llama's
        settings = json.loads(tokenizer.to_str())
        settings["added_tokens"] = [t for t in settings["added_tokens"] if not t["content"].startswith("<0x")]
        path.write_text(json.dumps(settings))
    else:
        tokenizer.save(str(path))
    return f"hf:{path}"


def sentencepiece(folder, **options):
    import sentencepiece as spm

    (folder / "text.txt").write_text("\n".join(text.replace("\n", " ") for text in TEXTS * 20))
    settings = dict(vocab_size=330, byte_fallback=True, normalization_rule_name="identity", minloglevel=2)
    settings |= dict(remove_extra_whitespaces=False, add_dummy_prefix=False, hard_vocab_limit=False) | options
    prefix = folder / "sp"
    spm.SentencePieceTrainer.Train(input=str(folder / "text.txt"), model_prefix=str(prefix), **settings)
    return f"sp:{prefix}.model"
