"""The language model that describes neurons: asked in its own chat format, in batches.

A description is written greedily. How likely the describer holds each name for is the likelihood of the name's tokens
as its answer: summed, not per token, since a name is compared with its own mean over all neurons (see `describing`),
which takes out its length.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from neuron_methods.adapters.live import opened_model
from neuron_methods.data.batching import pad
from neuron_methods.models.chat import rendered
from neuron_methods.models.greedy import greedy_answers
from neuron_methods.models.kinds import facts_of, text_limit
from neuron_methods.models.loading import computing_dtype, load_processor, read_architecture, read_config
from neuron_methods.models.reference import ModelName
from neuron_methods.profiling.prompts import Conversation, without_marks
from neuron_methods.support.errors import UserError

#: Tokens of a description at most.
NEW_TOKENS = 40


class Describer:
    """A causal model with a chat template, in memory."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, shown: str) -> None:
        self.model, self.tokenizer, self.device, self.shown = model, tokenizer, device, shown
        self.limit = text_limit(model.config)
        self.marks = sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens})
        arguments = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in arguments
        self._keep_last = {"logits_to_keep": 1} if "logits_to_keep" in arguments else {}

    @torch.inference_mode()
    def answers(self, conversations: Sequence[Conversation]) -> list[str]:
        """Answer greedily, with `NEW_TOKENS` tokens at most."""
        settings = greedy_answers(self.model, self.tokenizer, NEW_TOKENS)
        ids, mask = self._laid_out(conversations, NEW_TOKENS, settings.pad_token_id)
        said = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        return self.tokenizer.batch_decode(said[:, ids.shape[1] :], skip_special_tokens=True)

    @torch.inference_mode()
    def likelihoods(self, conversations: Sequence[Conversation], names: Sequence[str]) -> Tensor:
        """Measure how likely each name is as an answer: log-likelihoods, float32 (conversations, names), on the CPU."""
        tokens = [self.tokenizer(name, add_special_tokens=False)["input_ids"] for name in names]
        ids, mask = self._laid_out(conversations, max(map(len, tokens)), 0)
        start = self._forward(ids, mask, 0, **self._keep_last)
        first = start.logits[:, -1].float().log_softmax(-1)
        found = [first[:, ids_of_name[0]] for ids_of_name in tokens]
        for number, (known, *rest) in enumerate(tokens):
            if not rest:
                continue
            # A copy, since the model writes into what it is given.
            past = copy.deepcopy(start.past_key_values)
            given = torch.tensor([[known, *rest[:-1]]] * len(ids), device=self.device)
            seen = torch.cat((mask, torch.ones_like(given)), dim=1)
            said = self._forward(given, seen, ids.shape[1], past_key_values=past).logits.float().log_softmax(-1)
            wanted = torch.tensor(rest, device=said.device).expand(len(ids), -1)
            found[number] = found[number] + said.gather(2, wanted[:, :, None]).sum((1, 2))
        scores = torch.stack(found, dim=1).cpu()
        if not bool(torch.isfinite(scores).all()):
            raise UserError(
                f"--describer {self.shown}: its output is NaN or Inf; compute in another dtype (--dtype float32)"
            )
        return scores

    def _forward(self, ids: Tensor, mask: Tensor, start: int, **options: Any) -> Any:
        """Run the model on tokens that stand from `start` on; the mask is that of all tokens, read before included."""
        if self._takes_positions:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        return self.model(input_ids=ids, attention_mask=mask, use_cache=True, **options)

    def _laid_out(self, conversations: Sequence[Conversation], room: int, fill: int) -> tuple[Tensor, Tensor]:
        """Token ids of conversations that the model is to answer, padded on the left, and their mask."""
        tokens = [self._tokens(conversation) for conversation in conversations]
        longest = max(map(len, tokens))
        if self.limit is not None and longest + room > self.limit:
            raise UserError(
                f"--describer {self.shown}: a prompt has {longest} tokens, and with an answer of {room} that is more "
                f"than the {self.limit} it can read; show fewer contexts (--contexts)"
            )
        ids, mask = pad(tokens, fill, left=True)
        return ids.to(self.device), mask.long().to(self.device)

    def _tokens(self, conversation: Conversation) -> list[int]:
        safe = [{**turn, "content": without_marks(turn["content"], self.marks)} for turn in conversation]
        text = rendered(self.tokenizer, safe, f"--describer {self.shown}", enable_thinking=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


@contextmanager
def opened_describer(name: ModelName, dtype: str, device: str | None = None) -> Iterator[Describer]:
    """Load a describer for as long as the block lasts.

    Args:
        name: of the model.
        dtype: as for `models.loading.computing_dtype`.
        device: where it goes; None: where accelerate finds room.

    Raises:
        UserError: it cannot be loaded, or is no causal model with a chat template.
    """
    where = f"--describer {name.shown}"
    config = read_config(name.base, where)
    facts = facts_of(read_architecture(config, where), bool(getattr(config, "is_encoder_decoder", False)))
    if facts is None or facts.kind != "causal":
        raise UserError(f"{where}: {config.architectures[0]} is no causal language model; take one that can chat")
    tokenizer = load_processor("AutoTokenizer", name.base, where)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{where}: has no chat template, so it cannot be asked; take a model that was trained to chat")
    with opened_model(name, computing_dtype(dtype), device=device) as (model, inputs_on):
        yield Describer(model, tokenizer, inputs_on, name.shown)
