"""The kinds of tasks, by the name a task gives. To add one, write a `Scorer` and put it here."""

from neuron_methods.evaluation.kinds.base import Scorer
from neuron_methods.evaluation.kinds.generation import Generation, TextToText
from neuron_methods.evaluation.kinds.images import ImageClassification

KINDS: dict[str, type[Scorer]] = {
    "image-classification": ImageClassification,
    "text-to-text": TextToText,
    "generation": Generation,
}
