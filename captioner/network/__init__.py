"""The neural network in PyTorch: encoder, attention, decoder. This part of the package needs torch.

Tensors in, tensors out: what reads images and writes captions for people stays outside.
"""
