"""Summed losses: against logarithms written out, in fp32, with and without targets."""

import math

import torch

from stacking_ds.model.bert import pretraining_loss


def test_sums_of_negative_log_probabilities() -> None:
    mlm_MV = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 1.0], [0.5, 0.5, 0.5]]).log()
    nsp_B2 = torch.tensor([[1.0, 3.0], [2.0, 6.0]]).log()
    # probabilities 2/6, 4/5 and one ignored; 3/4 and 2/8
    mlm_MV[1, 1] = -1e4
    loss = pretraining_loss(mlm_MV, torch.tensor([1, 0, -100]), nsp_B2, torch.tensor([1, 0]))
    assert math.isclose(loss.mlm_sum.item(), math.log(3) + math.log(1.25), rel_tol=1e-6)
    assert math.isclose(loss.nsp_sum.item(), math.log(4 / 3) + math.log(4), rel_tol=1e-6)


def test_all_positions_or_the_masked_ones_are_the_same_sum() -> None:
    logits_BSV = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels_BS = torch.tensor([[-100, 4, -100], [0, -100, 2]])
    nsp = torch.zeros(2, 2), torch.tensor([0, -100])
    chosen_BS = labels_BS != -100
    whole = pretraining_loss(logits_BSV, labels_BS, *nsp)
    gathered = pretraining_loss(logits_BSV[chosen_BS], labels_BS[chosen_BS], *nsp)
    torch.testing.assert_close(whole.mlm_sum, gathered.mlm_sum)
    assert math.isclose(whole.nsp_sum.item(), math.log(2), rel_tol=1e-6)


def test_bf16_logits_are_summed_in_fp32() -> None:
    # in bf16 a sum of 1000 x log(2) would stall at 256
    logits_MV = torch.zeros(1000, 2, dtype=torch.bfloat16)
    labels_M = torch.zeros(1000, dtype=torch.long)
    loss = pretraining_loss(logits_MV, labels_M, logits_MV, labels_M)
    for total in loss:
        assert total.dtype == torch.float32
        assert math.isclose(total.item(), 1000 * math.log(2), rel_tol=1e-5)


def test_no_target_is_zero_with_a_zero_gradient() -> None:
    mlm_MV = torch.randn(4, 5, requires_grad=True)
    nsp_B2 = torch.randn(2, 2, requires_grad=True)
    loss = pretraining_loss(mlm_MV, torch.full((4,), -100), nsp_B2, torch.full((2,), -100))
    assert loss.mlm_sum.item() == loss.nsp_sum.item() == 0.0
    (loss.mlm_sum + loss.nsp_sum).backward()
    assert not mlm_MV.grad.any()
    assert not nsp_B2.grad.any()
