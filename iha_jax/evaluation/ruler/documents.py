"""Questions over documents: qa_1 (SQuAD), qa_2 (HotpotQA)."""

import itertools

from iha_jax.evaluation.ruler.definition import DOCUMENT, Documents
from iha_jax.evaluation.ruler.sample import Draw, Growing, Sample


def documents(task: Documents, draw: Draw) -> Growing:
    """The documents that answer the question, then others of its article, then any, shuffled. A unit is a document.

    When all are in the prompt they repeat, as published.
    """
    source = draw.material.questions[task.dataset]
    question = source.questions[draw.index]
    rng = draw.generator("items")
    order = [*question.answered_by, *rng.sample(question.related, len(question.related))]

    def at(size: int) -> Sample:
        if size > len(order):  # once, and not for questions that do not fit as they are
            rest = sorted(set(range(len(source.documents))).difference(order))
            order.extend(rng.sample(rest, len(rest)))
        chosen = list(itertools.islice(itertools.cycle(order), size))
        draw.generator("order").shuffle(chosen)
        context = "\n\n".join(
            DOCUMENT.format(number=number, document=source.documents[i]) for number, i in enumerate(chosen, 1)
        )
        return Sample(
            task.wording.template.format(context=context, query=question.text),
            task.wording.answer_prefix,
            question.answers,
        )

    return Growing(len(question.answered_by), at)
