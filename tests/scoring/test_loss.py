"""The loss of rows is the same however a batch is cut and filled."""

import pytest
import torch

from veneer.base.batching import Way
from veneer.base.ragged import RaggedBatch, ragged_attention
from veneer.config import LoRAConfig
from veneer.nn.attach import attach
from veneer.scoring.loss import summed_loss


@pytest.mark.parametrize("tokens", [31, 32, 33])
def test_filling_up_changes_no_loss_and_no_gradient(tiny, tokens):
    model = tiny()
    attachment = attach(model, LoRAConfig(rank=2))
    for parameter in attachment.parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    marks = torch.ones(tokens, dtype=torch.bool)
    marks[[0, 9]] = False
    given = RaggedBatch(torch.arange(tokens) + 3, marks, (9, tokens - 9))

    def found(multiple):
        model.zero_grad()
        with ragged_attention(model):
            loss = summed_loss(model, given, way=Way(multiple=multiple))
        loss.backward()
        return [loss.detach(), *(one.grad for one in attachment.parameters().values())]

    for filled, bare in zip(found(32), found(1), strict=True):
        # Another number of rows may be computed in another order: the last bits of sums of this size differ.
        torch.testing.assert_close(filled, bare, rtol=1e-5, atol=1e-4 * bare.abs().max().item())
