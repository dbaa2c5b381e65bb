"""Adapters: targets over the model code of transformers, one small file per family."""
