"""The feeder for a model in memory, by its kind."""

from __future__ import annotations

from transformers import PreTrainedModel

from neuron_methods.data.feeders import Feeder
from neuron_methods.data.images import ImageFeeder, ImageTextFeeder
from neuron_methods.data.texts import TextFeeder, TextToTextFeeder
from neuron_methods.models.kinds import model_kind, text_limit
from neuron_methods.models.loading import load_processor
from neuron_methods.models.reference import ModelName
from neuron_methods.support.errors import UserError


def make_feeder(
    name: ModelName, model: PreTrainedModel, max_length: int, context: int, separator: str = "\n"
) -> Feeder:
    """Make the feeder for a model's kind, with the tokenizer or image processor saved beside the model.

    Raises:
        UserError: it is of no kind that can be fed, or the tokenizer or image processor is missing.
    """
    architecture, where = type(model).__name__, f"model {name.shown}"
    kind = model_kind(architecture, model.config)

    def images() -> ImageFeeder:
        processor = load_processor("AutoImageProcessor", name.base, where)
        return ImageFeeder(processor, model.config, has_loss=kind == "image-classification")

    if kind != "image-text" and model.main_input_name == "pixel_values":
        return images()
    tokenizer = load_processor("AutoTokenizer", name.base, where)
    limit = min(max_length, text_limit(model.config) or max_length)
    if kind == "image-text":
        return ImageTextFeeder(images(), TextFeeder(tokenizer, limit, context, causal=False))
    if model.config.is_encoder_decoder and not architecture.endswith(("EncoderModel", "ForTokenClassification")):
        if not hasattr(model, "_shift_right") or not architecture.endswith(("ForConditionalGeneration", "Model")):
            raise UserError(f"{where}: {architecture} cannot be profiled; save it as a model that generates")
        return TextToTextFeeder(tokenizer, max_length, context, model)
    return TextFeeder(tokenizer, limit, context, kind == "causal", separator)
