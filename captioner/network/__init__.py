"""The neural network in PyTorch: encoder, attention, decoder. This part of the package needs torch.

Tensors in, tensors out: what reads images and writes captions for people stays outside.
"""

try:
    import torch  # noqa: F401
    import torchvision  # noqa: F401
except ImportError as error:
    raise ImportError("this needs PyTorch: pip install 'captioner[torch]'") from error
