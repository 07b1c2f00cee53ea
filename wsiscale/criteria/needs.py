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


def bias_of(response: ScaleResponse) -> NDArray[np.float64]:
    """(C,) the bias of the head of `head_of`, zero where it has none."""
    assert response.head_weight is not None
    if response.head_bias is None:
        return np.zeros(max(len(response.head_weight), 2))
    bias = response.head_bias.astype(np.float64)
    return np.concatenate([-bias / 2, bias / 2]) if len(bias) == 1 else bias


def view_of(response: ScaleResponse, view: str, criterion: str) -> ScaleResponse:
    """What the network answers to the same places in a view."""
    if view not in response.views:
        raise OptionError(f"{criterion} compares with the view {view}, and it was not taken; respond with views=({view!r},)")
    return response.views[view]
