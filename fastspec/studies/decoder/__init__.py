"""Finetuning a decoder on Python's own documentation: held-out loss by method and learning rate."""
