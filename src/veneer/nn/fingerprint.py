"""The fingerprint of a base model: by it an adapter knows the weights that it was made for."""

import hashlib

from torch import nn

from veneer.ops.sample import sample_values


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's parameters: names, shapes, and up to 1,024 evenly spread values of each.

    It does not depend on the dtype that the weights were loaded in, as long as no value was rounded: values are hashed
    in float32. Call it on the bare model; parameters tied to each other count once.

    Cost:
        A few milliseconds; it is a sample, made to notice another model, revision or quantisation, not tampering.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> fingerprint(a) == fingerprint(a), fingerprint(a) == fingerprint(b)
        (True, False)
    """
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sha.update(f"{name}\0{tuple(parameter.shape)}\0".encode())
        sha.update(sample_values(parameter).numpy().data)
    return sha.hexdigest()
