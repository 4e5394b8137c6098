"""Reading an example back out of an update.

Where a dense layer is the first, its gradient is the example: of each neuron the weights' gradient is the input times the bias' gradient. So
one division reads the input of a device that took one step on one example, exactly (Geiping et al. 2020, "Inverting Gradients", proposition 3.1;
"robbing" attacks build such layers on purpose). Of a sum over a group it reads a mixture, of a sum with noise nothing.
"""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import uniform_filter

WINDOW = 7


def dense_input(kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The input that an update of a dense layer gives away, (inputs,) float64: by the neuron whose bias moved most.

    Args:
        kernel: change of the layer's kernel, (inputs, outputs).
        bias: change of its bias, (outputs,).
    """
    if kernel.ndim != 2 or bias.shape != kernel.shape[1:]:
        raise ValueError(f"Expected a kernel (inputs, outputs) and its bias, got {kernel.shape} and {bias.shape}.")
    most = int(np.argmax(np.abs(bias)))
    if not bias[most]:
        raise ValueError("Expected an update that moves the layer's bias, got zeros.")
    return np.asarray(kernel[:, most], np.float64) / float(bias[most])


def similarity(one: np.ndarray, other: np.ndarray, *, span: float = 1.0) -> float:
    """Structural similarity of two pictures, at most 1 (Wang et al. 2004, "Image Quality Assessment", equation 13; uniform windows).

    Args:
        one, other: (height, width), of the same shape.
        span: difference of the largest and the smallest value there can be.
    """
    if one.shape != other.shape or one.ndim != 2:
        raise ValueError(f"Expected two pictures (height, width) of one shape, got {one.shape} and {other.shape}.")
    x, y = one.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = uniform_filter(x, WINDOW), uniform_filter(y, WINDOW)
    var_x, var_y = uniform_filter(x * x, WINDOW) - mean_x**2, uniform_filter(y * y, WINDOW) - mean_y**2
    both = uniform_filter(x * y, WINDOW) - mean_x * mean_y
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    made = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(np.mean(made))


def best_similarity(found: np.ndarray, among: Sequence[np.ndarray], *, span: float = 1.0) -> float:
    """Of what was read with the nearest of those whose it may be; clipped to what a picture can be."""
    shown = np.clip(found, 0.0, span)
    return max(similarity(shown, picture, span=span) for picture in among)
