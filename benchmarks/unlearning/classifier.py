"""A classifier of 150 intents that knows CLINC150: all-MiniLM-L6-v2 with one linear head. Begin with IntentClassifier.

The encoder stays as it was pretrained, and the head is trained to its optimum on the utterances it may see. So a model
that never saw a request is exact and cheap: the same head, trained without the request's utterances.

Axes: N utterances, B rows, L tokens, D width, C classes.
"""

from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

INVERSE_PENALTY = 30.0
"""C of scikit-learn's logistic regression: as in `examples/ten_skills.py`, for features of unit length."""

MOST_ITERATIONS = 200


@final
class IntentClassifier(BertPreTrainedModel):
    """A linear map of the mean over an utterance's tokens, at unit length."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Logits of all classes, and with labels their cross-entropy."""
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        output = self.bert(
            input_ids,
            attention_mask=mask_BL,
            token_type_ids=token_type_ids,
            output_hidden_states=output_hidden_states,
        )
        mask_BL1 = mask_BL.unsqueeze(-1).to(output.last_hidden_state.dtype)
        mean_BD = (output.last_hidden_state * mask_BL1).sum(1) / mask_BL1.sum(1)
        logits_BC = self.head(F.normalize(mean_BD, dim=-1))
        loss = None if labels is None else F.cross_entropy(logits_BC, labels)
        fields: dict[str, Any] = {"loss": loss, "logits": logits_BC, "hidden_states": output.hidden_states}
        return SequenceClassifierOutput(**fields)


def load_encoder(folder: "str | Path", classes: int) -> tuple[IntentClassifier, Any]:
    """The pretrained encoder without dropout, under a head that has learned nothing yet, and its tokenizer."""
    config = BertConfig.from_pretrained(
        folder, num_labels=classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = IntentClassifier(config)
    model.bert = BertModel.from_pretrained(folder, config=config, add_pooling_layer=False)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def train_head(means_ND: Float[Tensor, "N D"], label_N: Int[Tensor, " N"], classes: int) -> nn.Linear:
    """The head of least cross-entropy plus |W|^2 / (2 * 30 * N): a convex problem, so it depends on no seed."""
    unit_ND = F.normalize(means_ND, dim=-1)
    head = nn.Linear(unit_ND.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=MOST_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = head.weight.square().sum() / (2 * INVERSE_PENALTY * len(unit_ND))
        loss = F.cross_entropy(head(unit_ND), label_N) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return head.requires_grad_(False)
