"""LoRA at its smallest: a frozen linear regression, a shifted target, and how much rank the shift needs.

The base W0 solves one regression; then the target moves by a matrix of rank 4. Low-rank updates B·A of rank 1 to full
learn the shift beside the frozen W0, against training all of W0. What is left in the end is the noise of the targets.

    python examples/linear_regression.py        # prints a table, writes linear_regression.png
"""

import torch
from matplotlib.figure import Figure
from torch import nn

import veneer

INPUTS = OUTPUTS = 32
TRUE_RANK, SAMPLES, STEPS = 4, 512, 400


def fit(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False)).requires_grad_(False)
    shift = torch.randn(OUTPUTS, TRUE_RANK) @ torch.randn(TRUE_RANK, INPUTS) / INPUTS**0.5
    x = torch.randn(SAMPLES, INPUTS)
    y = x @ (base[0].weight + shift).T + 0.1 * torch.randn(SAMPLES, OUTPUTS)

    ranks, losses = [1, 2, 3, 4, 6, 8, 16, 32], []
    print(f"{'rank':>6}  {'parameters':>10}  {'loss':>8}")
    for rank in ranks:
        veneer.attach(base, veneer.LoRAConfig(rank=rank, alpha=rank, target_modules=["0"]))  # in place
        losses.append(fit(base, x, y))
        adapter = veneer.detach(base)  # the base is as it was, bit for bit
        print(f"{rank:>6}  {adapter.num_parameters:>10,}  {losses[-1]:>8.4f}")
    base.requires_grad_(True)
    full = fit(base, x, y)
    print(f"{'full':>6}  {base[0].weight.numel():>10,}  {full:>8.4f}")

    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).add_subplot()
    axes.loglog(ranks, losses, "o-", label="LoRA")
    axes.axhline(full, color="gray", linestyle="--", label=f"full fine-tuning ({INPUTS * OUTPUTS:,} parameters)")
    axes.axvline(TRUE_RANK, color="tab:red", linewidth=0.8, label=f"rank of the shift ({TRUE_RANK})")
    axes.set(xlabel="rank", ylabel="loss after training", xticks=ranks, xticklabels=ranks)
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig("linear_regression.png", dpi=120)


if __name__ == "__main__":
    main()
