"""How the spectral basis of a model behaves: under finetuning, between tasks, over pretraining."""
