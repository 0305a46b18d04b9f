"""Finetune and score pretrained encoders on GLUE."""
