"""Ready forwards: the model's own loss of its labels, as a sum; which positions are compared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from tram_ds.integrations import causal_lm, classification


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    return GPT2LMHeadModel(config).eval()


def right_padded() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, 2, 3, 4, 5], [6, 7, 8, -100, -100]])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_causal_lm_is_the_models_own_loss_summed_over_its_targets() -> None:
    model, batch = gpt2(), right_padded()
    out = causal_lm(model, batch)
    # predicted: 2 3 4 5 of the first row, 7 8 of the second, whose first has no predecessor
    assert int(out.count) == 4 + 2
    own = model(**batch).loss
    torch.testing.assert_close(out.loss_sum / out.count, own, rtol=1e-6, atol=0.0)
    assert out.logits.shape == (5 + 3, 16) and out.rows == 2
    assert out.counted is not None
    assert out.counted.tolist() == [True] * 4 + [False] + [True, True, False]
    whole = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert torch.equal(out.logits[:5], whole[0]) and torch.equal(out.logits[5:], whole[1, :3])


def test_causal_lm_without_a_mask_or_with_labels_shifted_already() -> None:
    model, batch = gpt2(), right_padded()
    plain = causal_lm(model, {"input_ids": batch["input_ids"], "labels": batch["labels"]})
    assert plain.logits.shape == (10, 16) and int(plain.count) == 6
    shifted = torch.full((2, 5), -100)
    shifted[:, :-1] = batch["labels"][:, 1:]
    again = causal_lm(model, {"input_ids": batch["input_ids"], "shift_labels": shifted})
    assert torch.equal(again.loss_sum, plain.loss_sum) and int(again.count) == 6


def test_a_target_beside_the_mask_is_counted_as_transformers_counts_it() -> None:
    model, batch = gpt2(), right_padded()
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == -100, 3)
    out = causal_lm(model, batch)
    torch.testing.assert_close(out.loss_sum / out.count, model(**batch).loss, rtol=1e-6, atol=0.0)
    assert int(out.count) == 8 and len(out.logits) == 5 + 4  # the last position predicts nothing


def classifiers() -> dict[str, tuple[nn.Module, dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "num_labels": 3,
    }
    text = BertForSequenceClassification(BertConfig(vocab_size=16, **small)).eval()
    image = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **small)).eval()
    labels = torch.tensor([2, -100, 0, 1])
    return {
        "text": (text, {"input_ids": torch.randint(16, (4, 5)), "labels": labels}),
        "image": (image, {"pixel_values": torch.randn(4, 3, 8, 8), "labels": labels}),
    }


@pytest.mark.parametrize("kind", ["text", "image"])
def test_classification_is_the_models_own_loss_summed_over_its_examples(kind: str) -> None:
    model, batch = classifiers()[kind]
    out = classification(model, batch)
    assert int(out.count) == 3 and out.logits.shape == (4, 3) and out.rows == 4
    assert out.counted is not None and out.counted.tolist() == [True, False, True, True]
    own = model(**batch).loss
    torch.testing.assert_close(out.loss_sum / out.count, own, rtol=1e-6, atol=0.0)


def answering(logits: torch.Tensor, **more: Any) -> Any:
    return lambda **_: SimpleNamespace(logits=logits, **more)


def test_what_is_no_such_loss_is_refused() -> None:
    pair, three = torch.zeros(2, 2), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="no labels, only input_ids"):
        causal_lm(gpt2(), {"input_ids": torch.zeros(1, 2).long()})
    with pytest.raises(ValueError, match=r"float32.*one whole-numbered label"):
        classification(answering(pair), {"labels": torch.zeros(2)})
    with pytest.raises(ValueError, match="one whole-numbered label"):
        classification(answering(pair), {"labels": three.long()})
    with pytest.raises(ValueError, match="regression"):
        classification(answering(torch.zeros(2, 1)), {"labels": torch.zeros(2).long()})
    with pytest.raises(ValueError, match="output_router_logits=False"):
        classification(answering(pair, aux_loss=torch.ones(())), {"labels": torch.zeros(2).long()})
    with pytest.raises(ValueError, match="which positions are padding"):
        batch = {"labels": three.long(), "attention_mask": torch.ones(2, 1, 3, 3)}
        causal_lm(answering(torch.zeros(2, 3, 4)), batch)
