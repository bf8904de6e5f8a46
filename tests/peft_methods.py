"""Tiny models with adapters of PEFT's other methods, as PEFT itself makes and saves them."""

import warnings
from copy import deepcopy

import torch
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, VeraConfig, get_peft_model
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 6, bias=False)

    def forward(self, x):
        return self.v(torch.tanh(self.k(torch.tanh(self.q(x)))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.score = nn.ModuleList([Block(), Block()]), nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.score(x)


class Convolutions(nn.Module):
    """Kernels of one and more, over one dimension and two, square and not."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(12, 16, 3), nn.Conv2d(12, 16, (3, 2))
        self.point1, self.point2 = nn.Conv1d(12, 16, 1), nn.Conv2d(12, 16, 1)


def net(kind=Net):
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


def randomized(model, seed=1):
    """Give every trainable parameter a random value, so that a lost one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def peft_model(config, kind=Net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # VeRA without projections warns of itself
        return randomized(get_peft_model(net(kind), deepcopy(config))).eval()


def saved(config, folder, kind=Net):
    """Make, fill and save a PEFT adapter; return its model."""
    model = peft_model(config, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ranks pruned to nothing
        model.save_pretrained(folder)
    return model


def shapes(kind=Net):
    """What a caller who has the base gives."""
    return {
        path: one.weight.shape for path, one in net(kind).named_modules() if "weight" in dict(one.named_parameters())
    }


def deltas(model):
    """PEFT's own updates by module path, computed in float64."""
    adapted = {
        path.removeprefix("base_model.model."): module
        for path, module in model.double().named_modules()
        if "get_delta_weight" in dir(module)
    }
    found = {path: module.get_delta_weight("default").detach() for path, module in adapted.items()}
    model.float()
    return found


TARGETS = ["q", "k", "v"]
LINEAR = {
    "loha": LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
    "loha of high rank": LoHaConfig(r=3, alpha=1, target_modules=TARGETS, module_dropout=0.1, rank_dropout=0.2),
    "loha with patterns": LoHaConfig(
        r=2, alpha=3, target_modules=TARGETS, rank_pattern={"q": 1, r"layers\.1\.k": 3}, alpha_pattern={"v": 5}
    ),
    "loha and a whole module": LoHaConfig(r=1, target_modules=["k"], modules_to_save=["score"]),
    "lokr": LoKrConfig(r=1, alpha=3, target_modules=TARGETS),
    "lokr of full halves": LoKrConfig(r=8, alpha=2, target_modules=TARGETS, rank_dropout_scale=True),
    "lokr cut in half": LoKrConfig(r=1, alpha=2, target_modules=TARGETS, decompose_factor=2),
    "lokr decomposed": LoKrConfig(r=1, alpha=2, target_modules=TARGETS, decompose_both=True, decompose_factor=4),
    "lokr with patterns": LoKrConfig(r=1, target_modules=TARGETS, rank_pattern={"q": 4}, alpha_pattern={"k": 2}),
    "vera": VeraConfig(r=3, target_modules=TARGETS, vera_dropout=0.1),
    "vera with biases": VeraConfig(r=5, target_modules=["q", "v"], bias="vera_only", projection_prng_key=7),
    "vera with all biases": VeraConfig(r=2, target_modules=["k"], bias="all", d_initial=0.3),
    "adalora": AdaLoraConfig(init_r=4, lora_alpha=6, target_modules=TARGETS, total_step=9, lora_dropout=0.1),
    "adalora with alpha 0": AdaLoraConfig(init_r=3, lora_alpha=0, target_modules=TARGETS, total_step=9),
    "adalora, pruned": AdaLoraConfig(
        init_r=4, lora_alpha=6, target_modules=["q", "v"], total_step=9, bias="lora_only",
        rank_pattern={
            "layers.0.q.lora_E": [True, False, True, False],
            "layers.1.q.lora_E": [False, False, False, False],
            "layers.1.v.lora_E": [True, True, True, True],
        },
    ),
}  # fmt: skip
KERNELS = ["one", "two", "point1", "point2"]
CONVOLUTIONS = {
    "loha": LoHaConfig(r=2, alpha=3, target_modules=KERNELS),
    "loha, effective": LoHaConfig(r=2, alpha=3, target_modules=KERNELS, use_effective_conv2d=True),
    "lokr": LoKrConfig(r=1, alpha=3, target_modules=KERNELS),
    # With r=1 PEFT 0.21.2 cannot form the update of a Conv1d.
    "lokr, effective": LoKrConfig(r=2, alpha=3, target_modules=KERNELS, use_effective_conv2d=True, decompose_factor=2),
    "lokr of full halves": LoKrConfig(r=9, alpha=3, target_modules=KERNELS),
    "adalora": AdaLoraConfig(init_r=3, target_modules=["two", "point2"], total_step=9),
}
