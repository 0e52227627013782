"""RULER (Hsieh et al. 2024, arXiv 2404.06654): 13 tasks over contexts of an exact length in tokens.

Wording, needles, counts, depths, tokens to generate and metrics are the published definition: the benchmark's own
repository, github.com/NVIDIA/RULER at c3f5e3b (`scripts/synthetic.yaml`, `scripts/data/synthetic/`, `scripts/eval/`).
The generators are written anew. `definition.py` has the texts and the 13 tasks.

A length holds everything that the model reads and writes: the document separator that begins every prompt, the prompt
with its answer prefix, and the tokens to generate. Each sample has the most units of haystack (sentences, needles,
words, documents) that fit: one more would exceed the length.

Where this differs from RULER:

| what | RULER | here |
|---|---|---|
| size of the haystack | searched once a length, cut by 5 to 500 units where too long | each sample's own |
| shuffles | one permutation for all samples of a length (needles, word lists, documents) | drawn for each sample |
| separator | not counted | counted, one token |
| keys | may repeat; then a question has two answers | those asked for occur once |
| sentences of essays | NLTK's punkt | a word that ends in . ! or ?, quotes and brackets after it aside |
| essays | Paul Graham's, downloaded | `--data=essays=FILE`; else *variant*: Python's manual, as pydoc has it |
| words | the lists of `wonderwords` | the same where it is installed; else *variant*: made of syllables |
| cwe with more words than the lists have (8 166; near 128 k tokens) | another list | goes on with made words |
| cwe with 10 words, all of them common | allowed | at least 11 |
| fwe where the third and fourth word occur equally often (short lengths) | asked nonetheless | shorter instead |
| vt's solved example | one, its names replaced | drawn for each sample; at most 500 tokens, at least 5 lines of noise |
| questions whose own documents do not fit | never returns | left out, and counted |
| samples | 500 | 100 unless `limit` says otherwise |

A *variant* is marked in the names of its metrics. What does not fit a length, such as a word list of 4096 bytes, is
skipped and said so with the tokens it needs.

Where lm-evaluation-harness 0.4.13's port (`lm_eval/tasks/ruler`) differs from RULER, as its source reads:

- vt: the answer prefix says "assgined" and has no space after it; noise lines are joined by a line break and a space;
  at five lines of noise or fewer they are cut into sentences; the global generator is used without a seed; it does not
  return where the prompt does not fit; the solved examples of all samples have one value.
- cwe: the solved example is made, but not part of the prompt; no space before the example's answers.
- fwe: the size leaves no room for the tokens to generate, so that prompt and answer exceed the length by up to 50.
- Sizes include the answers' tokens and grow by steps of 5 to 500 units, so prompts are shorter than asked for.
- Answer prefixes stand after one space, cwe's after an empty line.
- QA: `string_match_part` is the fraction of the reference answers that occur, not whether any does.
- Essays are never repeated: beyond their length prompts stop growing.
"""
