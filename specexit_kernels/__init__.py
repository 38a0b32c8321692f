"""Operators of speculative decoding with early exit: stateless functions on tensors, each with its PyTorch twin."""
