"""What a criterion takes out of a response, or a sentence on why it is not there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import OptionError
from wsiscale.types import Outputs, ScaleResponse


def outputs_of(response: ScaleResponse, criterion: str) -> Outputs:
    """The network's class outputs."""
    if response.outputs is None:
        raise OptionError(f"{criterion} needs class outputs, and this network only gives features; choose another criterion")
    return response.outputs


def head_of(response: ScaleResponse, criterion: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The pooled features (N, S, F) and the weights (C, F) of the linear head on them.

    A single logit z becomes the two classes -z/2 and z/2, whose softmax is the sigmoid of z.
    """
    if response.features is None or response.head_weight is None:
        raise OptionError(
            f"{criterion} works on the input and the weights of a linear head, and none was found in this network; "
            "choose another criterion"
        )
    weight = response.head_weight.astype(np.float64)
    return response.features.astype(np.float64), np.concatenate([-weight / 2, weight / 2]) if len(weight) == 1 else weight
