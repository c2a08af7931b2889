"""The kinds of tasks, by the name a task gives. To add one, write a `Scorer` and put it here."""

from neuron_methods.evaluation.kinds.generation import Generation, TextToText
from neuron_methods.evaluation.kinds.harness import Harness
from neuron_methods.evaluation.kinds.likelihood import MultipleChoice, Perplexity
from neuron_methods.evaluation.kinds.scorer import Scorer
from neuron_methods.evaluation.kinds.text_classification import TextClassification
from neuron_methods.evaluation.kinds.vision import ImageClassification, ZeroShotImageClassification

KINDS: dict[str, type[Scorer]] = {
    "image-classification": ImageClassification,
    "zero-shot-image-classification": ZeroShotImageClassification,
    "text-to-text": TextToText,
    "generation": Generation,
    "multiple-choice": MultipleChoice,
    "perplexity": Perplexity,
    "text-classification": TextClassification,
    "lm-eval": Harness,
}
