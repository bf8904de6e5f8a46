"""The fingerprint of a base model: by it an adapter knows the weights that it was made for."""

import hashlib

from torch import nn

from veneer.ops.sample import sample_digest, sample_values
from veneer.storage.registry import storage_of


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's parameters: names, shapes, and up to 1,024 evenly spread values of each.

    Of quantised weights, codes and scales count. It does not depend on the dtype that the weights were loaded in, as
    long as no value was rounded: values are hashed in float32. Call it on the bare model; tied parameters count once.

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
    for path, module in model.named_modules():
        storage = storage_of(module)
        if storage is not None and storage.name != "plain":
            for name, stored in module.state_dict().items():
                sha.update(f"{path}.{name}\0{sample_digest(stored)}\0".encode())
    return sha.hexdigest()
